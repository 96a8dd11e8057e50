"""A log of requests asked again: how far the winners of a version are from those that were served.

The user is as he was known then, so what differs is the version, or the items: their bids, pacing and switches are as
they are now. Of the winners that is told; of candidates that did not win then and would now, it is not known.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from prerank.errors import RequestError, SchemaMismatch
from prerank.serve.asked import Asked, Standing
from prerank.stores.requests import LoggedRequest
from prerank.types import Array, Report, silent

OVERLAPS = (1, 10, 100)
NUM_WORST = 5
_QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


class Asker(Protocol):
    """A version that can be asked; `serve.replaying.Replaying` is one."""

    @property
    def version(self) -> str:
        """Which."""
        ...

    def ask(self, logged: LoggedRequest) -> Asked:
        """What it answers; see `serve.replaying.Replaying.ask`."""
        ...

    def standing(self, item_ids: Array) -> Standing:
        """How these items stand in it."""
        ...


@dataclass(frozen=True, slots=True)
class Difference:
    """One request whose winners are not the same: `overlap` is the share of either list that both have.

    `first` is the first place, from 0, where they differ; `gone` are winners of then that it does not have, or not on.
    """

    request_id: str
    user_id: int
    time_ms: int
    overlap: float
    first: int
    then: tuple[int, ...]
    now: tuple[int, ...]
    gone: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Replayed:
    """What came of a log. Shares and means are of the `num_compared` requests; None where there is none to tell of.

    `logged_by` counts the requests by the version that served them, `skipped` those that are not compared, by why.
    `same_winners` is the share with the same winners in the same order; `same_features`, of requests that this version
    had served, the share whose features are made again to the bit. `overlap` is by how many of the first winners;
    `rank_correlation` (Spearman's) is over what both lists have; `utility_change` is that of the mean utility of a
    winner, relative. Of `num_winners` of then, `num_gone` are not in the version, `num_off` are off, and of
    `num_changed` of the rest a value or the pacing is another now. Times are in milliseconds.
    """

    version: str
    num_requests: int
    num_compared: int
    logged_by: Mapping[str, int]
    skipped: Mapping[str, int]
    same_winners: float | None
    same_features: float | None
    overlap: Mapping[int, float]
    rank_correlation: float | None
    utility_change: float | None
    num_winners: int
    num_gone: int
    num_off: int
    num_changed: int
    ms: Mapping[str, float]
    logged_ms: Mapping[str, float]
    worst: tuple[Difference, ...]


@dataclass(slots=True)
class _Tally:
    logged_by: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    same: list[bool] = field(default_factory=list)
    same_features: list[bool] = field(default_factory=list)
    overlaps: dict[int, list[float]] = field(default_factory=lambda: {k: [] for k in OVERLAPS})
    correlations: list[float] = field(default_factory=list)
    utility_then: float = 0.0
    utility_now: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    ms: list[float] = field(default_factory=list)
    logged_ms: list[float] = field(default_factory=list)
    worst: list[tuple[float, int, Difference]] = field(default_factory=list)


def replay(requests: Iterable[LoggedRequest], asker: Asker, report: Report = silent) -> Replayed:
    """Ask `asker` each of `requests` and compare.

    Requests that were answered degraded are not asked, for what they were answered without is not what was known; nor
    are those compared that the version does not take, or degrades.
    """
    tally, num = _Tally(), 0
    for num, logged in enumerate(requests, start=1):
        tally.logged_by[logged.version] += 1
        _ask(tally, logged, asker)
        report("ask again", num, 0, "requests")
    report("ask again", num, num, "requests")
    return _told(tally, num, asker.version)


def overlap(then: Array, now: Array, k: int) -> float:
    """The share of the first k of either list (the longer, if one is shorter than k) that the first k of both have."""
    then, now = then[:k], now[:k]
    most = max(len(then), len(now))
    return 1.0 if not most else len(np.intersect1d(then, now)) / most


def rank_correlation(then: Array, now: Array) -> float | None:
    """Spearman's over what both lists, without repeats, have; None where that is less than two."""
    _, at_then, at_now = np.intersect1d(then, now, return_indices=True)
    num = len(at_then)
    if num < 2:
        return None
    apart = at_then.argsort().argsort() - at_now.argsort().argsort()
    return float(1 - 6 * (apart.astype(np.float64) ** 2).sum() / (num * (num * num - 1)))


def _ask(tally: _Tally, logged: LoggedRequest, asker: Asker) -> None:
    if logged.degraded:
        tally.skipped["it was answered degraded"] += 1
        return
    try:
        asked = asker.ask(logged)
    except (RequestError, SchemaMismatch) as error:
        tally.skipped[str(error)] += 1
        return
    if asked.degraded:
        tally.skipped["it is answered degraded now"] += 1
        return
    then, now = logged.item_ids, asked.item_ids
    tally.same.append(np.array_equal(then, now))
    tally.ms.append(asked.ms)
    tally.logged_ms.append(logged.ms)
    if logged.version == asker.version:
        tally.same_features.append(logged.digest == asked.digest)
    for k, found in tally.overlaps.items():
        found.append(overlap(then, now, k))
    if (correlation := rank_correlation(then, now)) is not None:
        tally.correlations.append(correlation)
    tally.utility_then += float(logged.utility.sum(dtype=np.float64))
    tally.utility_now += float(asked.utility.sum(dtype=np.float64))
    tally.counts["then"] += len(then)
    tally.counts["now"] += len(now)
    gone = _count_changes(tally, logged, asker)
    if not tally.same[-1]:
        _keep_worst(tally, logged, now, gone)


def _count_changes(tally: _Tally, logged: LoggedRequest, asker: Asker) -> tuple[int, ...]:
    """Which winners of then cannot win now; counts them, and those that are worth something else."""
    stands = asker.standing(logged.item_ids)
    is_off = stands.is_known & ~stands.is_on
    is_other = stands.pacing != logged.pacing
    for at, name in enumerate(logged.value_names):
        if name in stands.values:
            is_other = is_other | (stands.values[name] != logged.values[:, at])
    tally.counts["gone"] += int((~stands.is_known).sum())
    tally.counts["off"] += int(is_off.sum())
    tally.counts["changed"] += int((stands.is_known & stands.is_on & is_other).sum())
    return tuple(logged.item_ids[~stands.is_known | is_off].tolist())


def _keep_worst(tally: _Tally, logged: LoggedRequest, now: Array, gone: tuple[int, ...]) -> None:
    then, num = logged.item_ids, min(len(logged.item_ids), len(now))
    differs = np.flatnonzero(then[:num] != now[:num])
    one = Difference(
        request_id=logged.request_id,
        user_id=logged.user_id,
        time_ms=logged.time_ms,
        overlap=overlap(then, now, max(len(then), len(now))),
        first=int(differs[0]) if len(differs) else num,
        then=tuple(then.tolist()),
        now=tuple(now.tolist()),
        gone=gone,
    )
    entry = (-one.overlap, -len(tally.same), one)
    if len(tally.worst) < NUM_WORST:
        heapq.heappush(tally.worst, entry)
    else:
        heapq.heappushpop(tally.worst, entry)


def _told(tally: _Tally, num: int, version: str) -> Replayed:
    counts = tally.counts
    change = None
    if counts["then"] and counts["now"] and tally.utility_then:
        change = (tally.utility_now / counts["now"]) / (tally.utility_then / counts["then"]) - 1
    return Replayed(
        version=version,
        num_requests=num,
        num_compared=len(tally.same),
        logged_by=dict(tally.logged_by.most_common()),
        skipped=dict(tally.skipped.most_common()),
        same_winners=_mean(tally.same),
        same_features=_mean(tally.same_features),
        overlap={k: float(np.mean(found)) for k, found in tally.overlaps.items() if found},
        rank_correlation=_mean(tally.correlations),
        utility_change=change,
        num_winners=counts["then"],
        num_gone=counts["gone"],
        num_off=counts["off"],
        num_changed=counts["changed"],
        ms=_quantiles(tally.ms),
        logged_ms=_quantiles(tally.logged_ms),
        worst=tuple(one for *_, one in sorted(tally.worst, key=lambda entry: (entry[0], entry[1]), reverse=True)),
    )


def _mean(found: list[bool] | list[float]) -> float | None:
    return float(np.mean(found)) if found else None


def _quantiles(ms: list[float]) -> dict[str, float]:
    return {name: float(np.quantile(ms, share)) for name, share in _QUANTILES.items()} if ms else {}
