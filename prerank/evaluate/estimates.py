"""A number with its interval over users, or the reason why there is none; and the parts a report is cut into."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from prerank.errors import DataError, SchemaMismatch
from prerank.metrics.bootstrap import interval_of
from prerank.types import Array

Where: TypeAlias = Literal["winners", "candidates"]
ALL = "all"
LEAST_USERS = 20
"""Of fewer users no number is told: resamples of so few say little of how users differ."""
MOST_UNDEFINED = 0.05
"""Of resamples on which a number is not defined, the share up to which its interval is told."""


@dataclass(frozen=True, slots=True)
class Resampling:
    """How intervals are made: `draws` resamples of users from `seed`, `level` of them between low and high."""

    draws: int = 300
    seed: int = 0
    level: float = 0.95


class Key(NamedTuple):
    """Which number: `segment` is one of the caller's names, or "all"."""

    where: Where
    task: str
    segment: str
    metric: str


@dataclass(frozen=True, slots=True)
class Drawn:
    """A number and the same on each resample (`metrics.bootstrap`), float64 [D + 1], or `why` there is none."""

    values: Array
    rows: int
    users: int
    why: str = ""

    @classmethod
    def of(cls, values: Array, rows: int, users: int, needs: str) -> Drawn:
        """Of float64 [D + 1], NaN where the number is not defined because what it `needs` is not there."""
        undefined = int(np.isnan(values[1:]).sum())
        if np.isnan(values[0]):
            return cls(values[:0], rows, users, f"it needs {needs}")
        if undefined > MOST_UNDEFINED * (len(values) - 1):
            why = f"too rare to say how sure: it needs {needs}, which {undefined} of {len(values) - 1} resamples lack"
            return cls(values[:0], rows, users, why)
        return cls(values, rows, users)


Draws: TypeAlias = Mapping[Key, Drawn]


@dataclass(frozen=True, slots=True)
class Estimate:
    """value, and low..high its interval over users; all None where `why` says why. Of `rows` rows of `users` users."""

    value: float | None
    low: float | None
    high: float | None
    rows: int
    users: int
    why: str = ""


def estimate(drawn: Drawn, level: float) -> Estimate:
    """What a report tells of a number."""
    if drawn.why:
        return Estimate(None, None, None, drawn.rows, drawn.users, drawn.why)
    interval = interval_of(drawn.values, level)
    return Estimate(interval.mean, interval.low, interval.high, drawn.rows, drawn.users)


def difference(ours: Drawn, theirs: Drawn) -> Drawn:
    """ours - theirs, resample by resample; both of the same rows and seed."""
    assert (ours.rows, ours.users) == (theirs.rows, theirs.users)
    if ours.why or theirs.why:
        return Drawn(ours.values[:0], ours.rows, ours.users, ours.why or theirs.why)
    return Drawn(ours.values - theirs.values, ours.rows, ours.users)


@dataclass(frozen=True, slots=True)
class Part:
    """Positions `rows` int64 of one segment, or of all."""

    segment: str
    rows: Array


def parts(segment: Array, names: Sequence[str]) -> Iterator[Part]:
    """All of segment int [R], then each of `names`, which it counts in; one name alone is all and not told twice."""
    yield Part(ALL, np.arange(len(segment)))
    if len(names) > 1:
        for number, name in enumerate(names):
            yield Part(name, np.flatnonzero(segment == number))


def too_few(users: int) -> str:
    """Why a part of so few users has no numbers, or nothing where it may have."""
    return f"{users} users here, expected at least {LEAST_USERS}" if users < LEAST_USERS else ""


def check_segments(where: Where, segment: Array, names: Sequence[str], rows: int) -> None:
    """Raises DataError unless `segment` is `rows` places in `names`, which are distinct and none of them "all"."""
    if ALL in names or len(set(names)) != len(names):
        raise DataError(f'{where}: expected segment names that are distinct and not "{ALL}", found {list(names)}')
    if segment.shape != (rows,):
        raise DataError(f"{where}: expected a segment for each of {rows} rows, found shape {list(segment.shape)}")
    outside = (segment < 0) | (segment >= max(len(names), 1))
    if outside.any():
        raise DataError(
            f"{where}: expected segments from 0 to {max(len(names), 1) - 1}, places in {list(names)}, "
            f"found {segment[outside][0]} in row {int(np.flatnonzero(outside)[0])}"
        )


def check_prob(what: str, prob: Array, shape: Sequence[int], tasks: Sequence[str], valid: Array | None = None) -> None:
    """Refuse predictions [..., T] of another shape or that are no probabilities, where `valid` bool [...] is True.

    Raises SchemaMismatch for another number of tasks, DataError for the rest.
    """
    check_shape(what, prob, shape, tasks)
    bad = ~((prob >= 0) & (prob <= 1))  # NaN is neither
    if valid is not None:
        bad &= valid[..., None]
    if bad.any():
        at = tuple(np.argwhere(bad)[0])
        raise DataError(
            f"{what}, {tasks[at[-1]]}: expected probabilities from 0 to 1, found {prob[at]} in row "
            f"{', '.join(str(n) for n in at[:-1])}; {int(bad.sum())} of {bad.size} are none"
        )


def check_shape(what: str, prob: Array, shape: Sequence[int], tasks: Sequence[str]) -> None:
    """Raises SchemaMismatch unless the last axis is `tasks`, DataError unless the others are `shape`."""
    if prob.ndim and prob.shape[-1] != len(tasks):
        raise SchemaMismatch(f"{what}: expected {len(tasks)} tasks, {', '.join(tasks)}; found {prob.shape[-1]}")
    if prob.shape != (*shape, len(tasks)):
        raise DataError(f"{what}: expected the shape {[*shape, len(tasks)]}, found {list(prob.shape)}")
