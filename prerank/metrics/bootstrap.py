"""How sure a mean over users is: intervals from resampling users, not rows, since one user's rows move together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prerank.errors import DataError
from prerank.types import Array


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean, and the percentiles that hold `level` of the resampled means between them."""

    mean: float
    low: float
    high: float
    level: float


def mean_interval(values: Array, users: Array, seed: int, draws: int = 1000, level: float = 0.95) -> Interval:
    """The mean of `values` float [Q] and its percentile interval over users int [Q] (Efron 1979; clusters whole).

    Each draw takes as many users as there are, with replacement, with all their values. NaN values (a query without
    anything relevant) are left out. Raises DataError where fewer than two users have a value: one says nothing of
    how users differ.
    """
    assert values.shape == users.shape
    assert 0 < level < 1
    assert draws > 0
    defined = ~np.isnan(values)
    names, member = np.unique(users[defined], return_inverse=True)
    if len(names) < 2:
        raise DataError(f"an interval over users: expected values of at least 2 users, found {len(names)}")
    total = np.bincount(member, values[defined])
    count = np.bincount(member)
    rng = np.random.default_rng(seed)
    means = np.empty(draws)
    for draw in range(draws):
        times = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))
        means[draw] = (times @ total) / (times @ count)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(total.sum() / count.sum()), float(low), float(high), level)


def difference_interval(
    ours: Array, theirs: Array, users: Array, seed: int, draws: int = 1000, level: float = 0.95
) -> Interval:
    """`mean_interval` of ours - theirs, float [Q] each, query by query: what both find hard cancels out.

    A query that is NaN in either is left out of both.
    """
    assert ours.shape == theirs.shape
    return mean_interval(ours - theirs, users, seed, draws, level)
