"""How sure a number over users is: intervals from resampling users, not rows, since one user's rows move together.

A number that is no mean of rows (an AUC, a ratio of sums) is computed again on each resample, its rows weighted by how
often their user was drawn. The same rows and seed give the same resamples, so two models' numbers can be subtracted
resample by resample: what both find hard cancels out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from prerank.errors import DataError
from prerank.types import Array

_AT_ONCE = 1 << 22  # counts of users turned into float64 at once


@dataclass(frozen=True, slots=True)
class Interval:
    """A number (`mean`, which it often is), and the percentiles that hold `level` of the resamples between them."""

    mean: float
    low: float
    high: float
    level: float


@dataclass(frozen=True, slots=True)
class Resamples:
    """The users of R rows as they are, then D resamples of them; with D > 0, every row of a result is one of these.

    member int64 [R]: each row's user, 0..U-1. times uint8 [D + 1, U]: how often each user is in it; 1 in the first.
    """

    member: Array
    times: Array

    @classmethod
    def of(cls, users: Array, seed: int, draws: int) -> Resamples:
        """Of users int [R], one a row. Each resample takes as many users as there are, with replacement.

        Raises DataError where there are fewer than two users: one says nothing of how users differ.
        """
        assert draws > 0
        names, member = np.unique(users, return_inverse=True)
        if len(names) < 2:
            raise DataError(f"an interval over users: expected values of at least 2 users, found {len(names)}")
        rng = np.random.default_rng(seed)
        times = np.ones((draws + 1, len(names)), dtype=np.uint8)
        for drawn in times[1:]:
            counts = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))
            assert counts.max() <= np.iinfo(np.uint8).max  # of 256 or more users, one drawn so often is never seen
            drawn[:] = counts
        return cls(member, times)

    @property
    def num_users(self) -> int:
        """U."""
        return int(self.times.shape[1])

    def sums(self, columns: Array) -> Array:
        """The sums of columns [R, C] over each resample's rows -> float64 [D + 1, C]."""
        own = [np.bincount(self.member, column, self.num_users) for column in columns.T]
        return self.sums_of_users(np.stack(own, axis=1))

    def sums_by_group(self, group: Array, num_groups: int, values: Array) -> Array:
        """The sums of values [R] in each group, int [R] of 0..G-1 -> float64 [D + 1, G]."""
        cell = self.member * num_groups + group
        own = np.bincount(cell, values, self.num_users * num_groups)
        return self.sums_of_users(own.reshape(self.num_users, num_groups))

    def sums_of_users(self, own: Array) -> Array:
        """The sums of what each user has, float64 [U, C] -> float64 [D + 1, C]."""
        step = max(1, _AT_ONCE // self.num_users)
        parts = [self.times[at : at + step].astype(np.float64) @ own for at in range(0, len(self.times), step)]
        return np.concatenate(parts)

    def weights(self) -> Iterator[Array]:
        """D + 1 times float64 [R]: how often each row is in the resample."""
        for times in self.times:
            yield times.astype(np.float64)[self.member]


def interval_of(drawn: Array, level: float = 0.95) -> Interval:
    """The percentile interval (Efron 1979) of float64 [D + 1]: the number itself, then the same on D resamples.

    Resamples where it is not defined (NaN) are left out; how many may be is the caller's to judge.
    """
    assert 0 < level < 1
    low, high = np.nanquantile(drawn[1:], [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(drawn[0]), float(low), float(high), level)


def mean_interval(values: Array, users: Array, seed: int, draws: int = 1000, level: float = 0.95) -> Interval:
    """The mean of `values` float [Q] and its interval over users int [Q].

    NaN values (a query without anything relevant) are left out. Raises DataError where fewer than two users have one.
    """
    assert values.shape == users.shape
    defined = ~np.isnan(values)
    resamples = Resamples.of(users[defined], seed, draws)
    sums = resamples.sums(np.stack([values[defined], np.ones(int(defined.sum()))], axis=1))
    return interval_of(sums[:, 0] / sums[:, 1], level)


def difference_interval(
    ours: Array, theirs: Array, users: Array, seed: int, draws: int = 1000, level: float = 0.95
) -> Interval:
    """`mean_interval` of ours - theirs, float [Q] each, query by query.

    A query that is NaN in either is left out of both.
    """
    assert ours.shape == theirs.shape
    return mean_interval(ours - theirs, users, seed, draws, level)
