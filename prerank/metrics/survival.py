"""How much of one order's top another order keeps: of the teacher's best, how many the student lets through.

Arguments everywhere: Q queries of N candidates as columns, valid bool [Q, N]. An order int64 [Q, N] is columns, best
first, those not valid last. Equal predictions are ordered by column: where columns are in retrieval's order, a student
that cannot tell candidates apart keeps retrieval's order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prerank.errors import DataError
from prerank.metrics.ranking import discounts
from prerank.types import Array


def falling_order(prob: Array, valid: Array) -> Array:
    """Columns by falling prob float [Q, N], ties by column, not valid last -> int64 [Q, N].

    Raises DataError where a valid candidate's prediction is not finite.
    """
    assert prob.shape == valid.shape
    bad = valid & ~np.isfinite(prob)
    if bad.any():
        query, column = np.argwhere(bad)[0]
        raise DataError(f"query {query}, candidate {column}: expected a finite prediction, found {prob[query, column]}")
    order: Array = np.argsort(np.where(valid, -prob, np.inf), axis=1, kind="stable")
    return order


def survival_per_query(teacher_order: Array, order: Array, num_valid: Array, top: int, ks: Sequence[int]) -> Array:
    """The share of the teacher's first `top` among the first k of `order`, for each k -> float64 [Q, len(ks)].

    num_valid int [Q]; where fewer than `top` are valid the share is of those, and NaN where none is. k = top is the
    overlap of the two tops. Raises DataError where top or a k is not in 1..N.
    """
    num_candidates = order.shape[1]
    for what, k in [("top", top), *(("k", k) for k in ks)]:
        if not 1 <= k <= num_candidates:
            raise DataError(f"at {what} = {k}: expected 1 to {num_candidates}, the candidates of a query")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(num_candidates)[None, :], axis=1)
    best = np.take_along_axis(rank, teacher_order[:, :top], axis=1)
    counted = np.arange(top)[None, :] < num_valid[:, None]
    kept = np.stack([((best < k) & counted).sum(1) for k in ks], axis=1).astype(np.float64)
    wanted = np.minimum(num_valid, top).astype(np.float64)[:, None]
    share: Array = np.divide(kept, wanted, out=np.full(kept.shape, np.nan), where=wanted > 0)
    return share


def ndcg_of_order(order: Array, gains: Array, valid: Array, k: int) -> Array:
    """NDCG at k of `order` with gains float [Q, N] >= 0 (the teacher's probabilities), as they are -> float64 [Q].

    What `ranking.ndcg_per_query` gives where every valid candidate is relevant by its gain, without its search by id.
    NaN where no valid candidate has a gain. Raises DataError where k is not in 1..N or a gain is no worth.
    """
    assert order.shape == gains.shape == valid.shape
    if not 1 <= k <= order.shape[1]:
        raise DataError(f"at k = {k}: expected 1 to {order.shape[1]}, the candidates of a query")
    if not (np.isfinite(gains) & (gains >= 0) | ~valid).all():
        raise DataError("NDCG: expected gains that are finite and not negative, found others")
    worth = np.where(valid, gains, 0.0)
    found = np.take_along_axis(worth, order[:, :k], axis=1).astype(np.float64) @ discounts(k)
    best = -np.sort(-worth, axis=1)[:, :k].astype(np.float64) @ discounts(k)
    share: Array = np.divide(found, best, out=np.full(len(order), np.nan), where=best > 0)
    return share


def soft_auc_per_query(order: Array, prob: Array, positive: Array, valid: Array) -> Array:
    """Each query's expected AUC of prob float [Q, N] if labels were drawn from `positive` float [Q, N] -> float64 [Q].

    Candidate i counts `positive` as a positive and 1 - `positive` as a negative: the expected pairs it wins over the
    expected pairs there are, i's with itself left out; ties count half. `order` is prob's. The best order's is below
    1 unless every `positive` is 0 or 1. NaN where no pair is expected.
    """
    assert order.shape == prob.shape == positive.shape == valid.shape
    rising = order[:, ::-1]
    is_in, score = (np.take_along_axis(x, rising, axis=1) for x in (valid, prob))
    yes = np.where(is_in, np.take_along_axis(positive, rising, axis=1), 0.0).astype(np.float64)
    no = np.where(is_in, 1.0 - yes, 0.0)
    fresh = np.ones(order.shape, dtype=bool)  # the first of each run of equal predictions
    fresh[:, 1:] = (score[:, 1:] != score[:, :-1]) | ~is_in[:, :-1]
    first = np.flatnonzero(fresh)
    query = first // order.shape[1]
    yes_run, no_run, own_run = (np.add.reduceat(x.ravel(), first) for x in (yes, no, yes * no))
    seen = np.cumsum(no_run) - no_run
    start = np.searchsorted(query, np.arange(len(order)))
    below = seen - seen[start][query]
    wins = np.bincount(query, yes_run * (below + no_run / 2) - own_run / 2, len(order))
    pairs = yes.sum(1) * no.sum(1) - (yes * no).sum(1)
    share: Array = np.divide(wins, pairs, out=np.full(len(order), np.nan), where=pairs > 1e-12)
    return share
