"""How well Q ordered lists hold what is relevant: recall and NDCG at k.

What is relevant to query q is ids[offsets[q] : offsets[q + 1]], each once. A query with nothing relevant has no
recall and no NDCG: NaN per query, left out of the mean.
"""

from __future__ import annotations

import numpy as np

from prerank.errors import DataError
from prerank.types import Array


def recall_per_query(retrieved: Array, offsets: Array, ids: Array, k: int) -> Array:
    """The share of each query's relevant ids among its first k -> float64 [Q].

    retrieved int [Q, K], best first, -1 where there is none; offsets int [Q+1] and ids int [R] as above.
    Raises DataError where k is not in 1..K, or an id comes twice in one list.
    """
    relevant = gains_at(retrieved, offsets, ids, np.ones(len(ids)), k)
    num_relevant = np.diff(offsets).astype(np.float64)
    return _share(relevant.sum(1), num_relevant)


def recall_at_k(retrieved: Array, offsets: Array, ids: Array, k: int) -> float:
    """The mean of `recall_per_query`; raises DataError also where no query has anything relevant."""
    return mean_defined(recall_per_query(retrieved, offsets, ids, k), f"recall at {k}")


def ndcg_per_query(retrieved: Array, offsets: Array, ids: Array, gains: Array, k: int) -> Array:
    """The discounted gain of the first k over that of the best order -> float64 [Q].

    As `recall_per_query`, with gains float [R] >= 0, the worth of each relevant id (1 for plain relevance). The gain
    counts as it is, over log2(rank + 1) (Järvelin & Kekäläinen 2002 with b = 2 and the rank counted from 1, as in
    trec_eval). A query whose gains are all 0 is NaN too. Raises DataError also for a negative or non-finite gain.
    """
    if not (np.isfinite(gains).all() and (gains >= 0).all()):
        raise DataError("NDCG: expected gains that are finite and not negative, found others")
    discount = discounts(k)
    found = gains_at(retrieved, offsets, ids, gains, k) @ discount
    query = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    best = np.lexsort((-gains, query))
    rank = np.arange(len(ids)) - offsets[query]
    kept = rank < k
    ideal = np.bincount(query[kept], gains[best][kept] * discount[rank[kept]], len(offsets) - 1)
    return _share(found, ideal)


def ndcg_at_k(retrieved: Array, offsets: Array, ids: Array, gains: Array, k: int) -> float:
    """The mean of `ndcg_per_query`; raises DataError also where no query has a gain."""
    return mean_defined(ndcg_per_query(retrieved, offsets, ids, gains, k), f"NDCG at {k}")


def discounts(k: int) -> Array:
    """What a gain at each of ranks 1..k is worth -> float64 [k]: 1 / log2(rank + 1)."""
    return 1 / np.log2(np.arange(2, k + 2))


def gains_at(retrieved: Array, offsets: Array, ids: Array, gains: Array, k: int) -> Array:
    """The gain of each of the first k retrieved, 0 where not relevant -> float64 [Q, k]. Shapes and errors as above."""
    assert len(offsets) == len(retrieved) + 1
    assert offsets[-1] == len(ids) == len(gains)
    assert not (ids == -1).any(), "-1 stands for no item"
    if not 1 <= k <= retrieved.shape[1]:
        raise DataError(f"at k = {k}: expected 1 to {retrieved.shape[1]}, the candidates retrieved")
    top = retrieved[:, :k]
    _refuse_repeats(np.arange(len(top)).repeat(k), top.ravel(), "retrieved")
    query = np.repeat(np.arange(len(top)), np.diff(offsets))
    _refuse_repeats(query, ids, "relevant")
    out = np.zeros(top.shape)
    if not len(ids):
        return out
    # one integer a (query, id) pair: ids are renumbered so that the product cannot overflow
    names, renumbered = np.unique(ids, return_inverse=True)
    pairs = query * len(names) + renumbered
    order = np.argsort(pairs)
    place = np.searchsorted(names, top)
    place[place == len(names)] = 0
    wanted = np.arange(len(top))[:, None] * len(names) + place
    at = order[np.searchsorted(pairs, wanted, sorter=order).clip(max=len(pairs) - 1)]
    relevant = (pairs[at] == wanted) & (names[place] == top)
    out[relevant] = gains[at][relevant]
    return out


def mean_defined(per_query: Array, what: str) -> float:
    """The mean of float64 [Q] over the queries that are not NaN; raises DataError naming `what` where none is."""
    defined = per_query[~np.isnan(per_query)]
    if not len(defined):
        raise DataError(f"{what}: none of {len(per_query)} queries has anything relevant; measure on other days")
    return float(defined.mean())


def _share(part: Array, whole: Array) -> Array:
    share = np.full(len(whole), np.nan)
    np.divide(part, whole, out=share, where=whole > 0)
    return share


def _refuse_repeats(query: Array, ids: Array, what: str) -> None:
    order = np.lexsort((ids, query))
    again = (ids[order][1:] == ids[order][:-1]) & (query[order][1:] == query[order][:-1]) & (ids[order][1:] != -1)
    if again.any():
        at = order[1:][again][0]
        raise DataError(f"query {query[at]}: expected each id once, but {what} holds {ids[at]} twice")
