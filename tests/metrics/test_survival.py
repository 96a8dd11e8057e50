"""What one order keeps of another's top: all of it where they are the same, and counted by hand where not."""

import numpy as np
import pytest
import pytrec_eval
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from prerank.errors import DataError
from prerank.metrics.ranking import ndcg_per_query, recall_per_query
from prerank.metrics.survival import falling_order, ndcg_of_order, soft_auc_per_query, survival_per_query


def a_world(seed: int, num_queries: int = 4, num_candidates: int = 30, levels: int = 12):
    rng = np.random.default_rng(seed)
    shape = (num_queries, num_candidates)
    teacher, student = (rng.integers(0, levels, shape) / levels for _ in range(2))
    valid = rng.random(shape) < 0.8
    valid[:, :12] = True
    return teacher, student, valid


def test_order_is_by_falling_prediction_then_column_and_what_is_not_valid_comes_last():
    prob = np.array([[0.2, 0.9, 0.5, 0.9, 0.5]])
    valid = np.array([[True, True, True, True, False]])
    assert falling_order(prob, valid).tolist() == [[1, 3, 2, 0, 4]]


def test_a_student_that_cannot_tell_candidates_apart_keeps_the_columns_order():
    assert (
        falling_order(np.full((2, 5), 0.3, dtype=np.float32), np.ones((2, 5), bool)).tolist() == [[0, 1, 2, 3, 4]] * 2
    )


def test_what_is_not_valid_may_hold_anything():
    prob = np.array([[np.nan, 0.1, 0.2]])
    assert falling_order(prob, np.array([[False, True, True]])).tolist() == [[2, 1, 0]]
    with pytest.raises(DataError, match="query 0, candidate 0: expected a finite prediction, found nan"):
        falling_order(prob, np.ones((1, 3), bool))


def test_survival_counted_by_hand():
    teacher, student = np.array([[4, 1, 3, 0, 2]]), np.array([[0, 1, 2, 3, 4]])
    kept = survival_per_query(teacher, student, np.array([5]), 2, (1, 2, 4, 5))
    np.testing.assert_array_equal(kept, [[0, 0.5, 0.5, 1.0]])


def test_the_same_order_keeps_everything_and_the_reversed_nothing():
    teacher, _, valid = a_world(0)
    teacher += np.arange(teacher.shape[1]) / 1e3  # no ties, so that reversed is reversed
    everything = np.ones_like(valid)
    best, worst = falling_order(teacher, everything), falling_order(-teacher, everything)
    num = everything.sum(1)
    assert (survival_per_query(best, best, num, 10, (10, 20)) == 1).all()
    assert (survival_per_query(best, worst, num, 10, (10, 20)) == 0).all()


@given(st.integers(0, 2**32), st.integers(1, 30), st.integers(1, 30))
def test_survival_is_recall_of_the_teachers_top(seed, top, k):
    teacher, student, valid = a_world(seed)
    best, mine = falling_order(teacher, valid), falling_order(student, valid)
    num_valid = valid.sum(1)
    wanted = [best[q, : min(top, n)] for q, n in enumerate(num_valid)]
    offsets = np.cumsum([0, *[len(ids) for ids in wanted]])
    retrieved = np.where(np.arange(30) < num_valid[:, None], mine, -1)
    expected = recall_per_query(retrieved, offsets, np.concatenate(wanted), k)
    np.testing.assert_allclose(survival_per_query(best, mine, num_valid, top, (k,))[:, 0], expected)


def test_a_query_without_candidates_has_no_survival_and_no_ndcg():
    order = np.array([[0, 1]])
    assert np.isnan(survival_per_query(order, order, np.array([0]), 1, (1,)))
    assert np.isnan(ndcg_of_order(order, np.array([[0.5, 0.5]]), np.zeros((1, 2), bool), 2))


@given(st.integers(0, 2**32), st.integers(1, 12))
def test_ndcg_is_that_of_the_lists_and_of_trec_eval(seed, k):
    rng = np.random.default_rng(seed)
    _, student, valid = a_world(seed)
    gains = rng.integers(0, 5, student.shape)
    gains[:, 0] = 1
    order = falling_order(student, valid)
    mine = ndcg_of_order(order, gains, valid, k)
    offsets = np.append(0, np.cumsum(valid.sum(1)))
    retrieved = np.where(np.arange(30) < valid.sum(1)[:, None], order, -1)
    expected = ndcg_per_query(retrieved, offsets, np.nonzero(valid)[1], gains[valid].astype(float), k)
    np.testing.assert_allclose(mine, expected)
    judged = {str(q): {str(c): int(gains[q, c]) for c in np.flatnonzero(valid[q])} for q in range(len(order))}
    run = {str(q): {str(c): float(-r) for r, c in enumerate(row) if c >= 0} for q, row in enumerate(retrieved)}
    said = pytrec_eval.RelevanceEvaluator(judged, {f"ndcg_cut.{k}"}).evaluate(run)
    np.testing.assert_allclose(mine, [said[str(q)][f"ndcg_cut_{k}"] for q in range(len(order))])


@given(st.integers(0, 2**32), st.integers(1, 12))
def test_soft_auc_of_certain_labels_is_scikit_learns_auc_of_each_query(seed, levels):
    _, student, valid = a_world(seed, levels=levels)
    label = np.random.default_rng(seed).integers(0, 2, student.shape).astype(float)
    label[:, 0], label[:, 1] = 0, 1
    mine = soft_auc_per_query(falling_order(student, valid), student, label, valid)
    expected = [roc_auc_score(label[q][valid[q]], student[q][valid[q]]) for q in range(len(student))]
    np.testing.assert_allclose(mine, expected)


@given(st.integers(0, 2**32), st.integers(1, 6))
def test_soft_auc_is_the_expected_won_pairs_over_the_expected_pairs(seed, levels):
    teacher, student, valid = a_world(seed, num_queries=2, num_candidates=14, levels=levels)
    mine = soft_auc_per_query(falling_order(student, valid), student, teacher, valid)
    for query, found in enumerate(mine):
        t, s = teacher[query][valid[query]], student[query][valid[query]]
        pairs = t[:, None] * (1 - t)[None, :]
        np.fill_diagonal(pairs, 0)
        won = (s[:, None] > s[None, :]) + 0.5 * (s[:, None] == s[None, :])
        if pairs.sum() > 0:
            assert found == pytest.approx((pairs * won).sum() / pairs.sum())
        else:
            assert np.isnan(found)


def test_bad_cuts_and_gains_are_refused():
    order = np.array([[0, 1, 2]])
    for top, k, said in ((4, 1, "at top = 4"), (0, 1, "at top = 0"), (1, 4, "at k = 4")):
        with pytest.raises(DataError, match=f"{said}: expected 1 to 3, the candidates of a query"):
            survival_per_query(order, order, np.array([3]), top, (k,))
    everything = np.ones((1, 3), bool)
    with pytest.raises(DataError, match="at k = 4: expected 1 to 3, the candidates of a query"):
        ndcg_of_order(order, np.ones((1, 3)), everything, 4)
    with pytest.raises(DataError, match="expected gains that are finite and not negative"):
        ndcg_of_order(order, np.array([[1, -1, 0.0]]), everything, 1)
