"""Recall and NDCG on lists small enough to count, and as trec_eval counts them."""

import numpy as np
import pytest
import pytrec_eval
from hypothesis import given
from hypothesis import strategies as st

from prerank.errors import DataError
from prerank.metrics.ranking import gains_at, ndcg_at_k, ndcg_per_query, recall_at_k, recall_per_query


def csr(relevant: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.cumsum([0, *[len(ids) for ids in relevant]])
    return offsets, np.array([i for ids in relevant for i in ids], dtype=np.int64)


def ones(ids: np.ndarray) -> np.ndarray:
    return np.ones(len(ids))


RETRIEVED = np.array([[5, 9, 7, 2], [1, 2, -1, -1], [8, 6, 4, 0]])
OFFSETS, IDS = csr([[7, 5, 100], [2], []])


def test_recall_is_the_share_of_the_relevant_among_the_first_k():
    np.testing.assert_array_equal(recall_per_query(RETRIEVED, OFFSETS, IDS, 2), [1 / 3, 1.0, np.nan])
    np.testing.assert_array_equal(recall_per_query(RETRIEVED, OFFSETS, IDS, 4), [2 / 3, 1.0, np.nan])


def test_the_mean_leaves_out_queries_with_nothing_relevant():
    assert recall_at_k(RETRIEVED, OFFSETS, IDS, 4) == (2 / 3 + 1) / 2


def test_ndcg_discounts_by_the_logarithm_of_the_rank():
    ideal = 1 + 1 / np.log2(3) + 1 / np.log2(4)
    expected = [(1 + 1 / np.log2(4)) / ideal, 1 / np.log2(3), np.nan]
    np.testing.assert_allclose(ndcg_per_query(RETRIEVED, OFFSETS, IDS, ones(IDS), 4), expected, rtol=1e-15)


def test_the_best_order_has_ndcg_one_whatever_the_gains():
    gains = np.array([1.0, 3.0, 2.0])
    assert ndcg_at_k(np.array([[20, 30, 10]]), *csr([[10, 20, 30]]), gains, 3) == pytest.approx(1)
    assert ndcg_at_k(np.array([[10, 30, 20]]), *csr([[10, 20, 30]]), gains, 3) < 1


def test_a_query_whose_gains_are_all_zero_has_no_ndcg():
    per_query = ndcg_per_query(np.array([[1], [2]]), *csr([[1], [2]]), np.array([0.0, 1.0]), 1)
    np.testing.assert_array_equal(per_query, [np.nan, 1.0])


def test_ids_may_be_as_large_as_ids_get():
    large = 2**63 - 1
    np.testing.assert_array_equal(
        gains_at(np.array([[large, -(2**63)]]), *csr([[-(2**63)]]), np.array([2.0]), 2), [[0.0, 2.0]]
    )


@given(st.integers(0, 2**32), st.integers(1, 12))
def test_both_equal_trec_eval(seed, k):
    rng = np.random.default_rng(seed)
    num_queries, num_items = 4, 20
    retrieved = np.stack([rng.permutation(num_items)[:12] for _ in range(num_queries)])
    relevant = [rng.permutation(num_items)[: rng.integers(1, 8)].tolist() for _ in range(num_queries)]
    offsets, ids = csr(relevant)
    gains = rng.integers(1, 5, len(ids))
    judged = {
        str(q): {str(i): int(g) for i, g in zip(ids[offsets[q] :], gains[offsets[q] : offsets[q + 1]], strict=False)}
        for q in range(num_queries)
    }
    run = {str(q): {str(i): float(-rank) for rank, i in enumerate(row)} for q, row in enumerate(retrieved)}
    said = pytrec_eval.RelevanceEvaluator(judged, {f"recall.{k}", f"ndcg_cut.{k}"}).evaluate(run)
    theirs = [said[str(q)] for q in range(num_queries)]
    np.testing.assert_allclose(recall_per_query(retrieved, offsets, ids, k), [t[f"recall_{k}"] for t in theirs])
    np.testing.assert_allclose(
        ndcg_per_query(retrieved, offsets, ids, gains.astype(float), k), [t[f"ndcg_cut_{k}"] for t in theirs]
    )


def test_k_beyond_what_was_retrieved_is_refused():
    with pytest.raises(DataError, match="at k = 5: expected 1 to 4, the candidates retrieved"):
        recall_at_k(RETRIEVED, OFFSETS, IDS, 5)
    with pytest.raises(DataError, match="at k = 0"):
        recall_at_k(RETRIEVED, OFFSETS, IDS, 0)


def test_an_id_that_comes_twice_is_refused():
    with pytest.raises(DataError, match="query 1: expected each id once, but retrieved holds 3 twice"):
        recall_at_k(np.array([[1, 2], [3, 3]]), *csr([[1], [3]]), 2)
    with pytest.raises(DataError, match="query 0: expected each id once, but relevant holds 4 twice"):
        recall_at_k(np.array([[1, 2]]), *csr([[4, 4]]), 2)


def test_nothing_relevant_anywhere_is_refused():
    for measure in (lambda *a: recall_at_k(*a, 1), lambda r, o, i: ndcg_at_k(r, o, i, ones(i), 1)):
        with pytest.raises(DataError, match="at 1: none of 2 queries has anything relevant; measure on other days"):
            measure(np.array([[1], [2]]), *csr([[], []]))


@pytest.mark.parametrize("gain", [-1.0, np.nan, np.inf])
def test_a_gain_that_is_not_a_worth_is_refused(gain):
    with pytest.raises(DataError, match="expected gains that are finite and not negative"):
        ndcg_at_k(np.array([[1]]), *csr([[1]]), np.array([gain]), 1)
