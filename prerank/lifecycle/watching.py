"""Servers' own numbers while a version is new: how many requests failed, were degraded, were slow; and a verdict.

What is judged is the difference between two readings of a server's counters, so what happened before does not count. A
server that restarted counts from 0 again, and so does the watch. One that breaks is enough.
"""

from __future__ import annotations

import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from http.client import HTTPException
from typing import TypeAlias

from prometheus_client.parser import text_string_to_metric_families

from prerank.errors import PrerankError

_SECONDS, _STATUS, _EDGE = "prerank_request_seconds", "status", "le"
_TIMEOUT_S = 5.0
_MOST_UNANSWERED = 5


@dataclass(frozen=True, slots=True)
class Sample:
    """A server's counters at one moment: requests and errors (5xx) since it started, how many answers were degraded,
    how many versions it could not load, the version that serves, and requests by the upper edge, in ms, of how long
    they took, each edge's with all below it."""

    version: str = ""
    requests: float = 0.0
    errors: float = 0.0
    degraded: float = 0.0
    failed_loads: float = 0.0
    took: Mapping[float, float] = field(default_factory=dict)

    def is_restarted_since(self, earlier: Sample) -> bool:
        """Whether the server counts from 0 again."""
        return self.requests < earlier.requests or self.failed_loads < earlier.failed_loads

    def since(self, earlier: Sample) -> Sample:
        """What came after `earlier`; all of it where the server restarted between the two."""
        if self.is_restarted_since(earlier):
            return self
        return Sample(
            self.version,
            self.requests - earlier.requests,
            self.errors - earlier.errors,
            self.degraded - earlier.degraded,
            self.failed_loads - earlier.failed_loads,
            {edge: number - earlier.took.get(edge, 0.0) for edge, number in self.took.items()},
        )

    def quantile_ms(self, share: float) -> float:
        """Below how many ms that share of requests took, straight between edges; infinite past the last one."""
        total = max(self.took.values(), default=0.0)
        below, low = 0.0, 0.0
        for edge, number in sorted(self.took.items()):
            if number >= share * total:
                return low + (edge - low) * (share * total - below) / max(number - below, 1e-9)
            below, low = number, edge
        return float("inf")


def together(samples: Iterable[Sample]) -> Sample:
    """The counters of several servers as those of one; the version is that of all, or ""."""
    found = list(samples)
    versions = {one.version for one in found}
    took: Counter[float] = Counter()
    for one in found:
        took.update(one.took)
    return Sample(
        versions.pop() if len(versions) == 1 else "",
        sum(one.requests for one in found),
        sum(one.errors for one in found),
        sum(one.degraded for one in found),
        sum(one.failed_loads for one in found),
        took,
    )


Metrics: TypeAlias = Callable[[], Sample]
"""Reads a server's counters now. Raises PrerankError where it cannot be reached."""


def metrics_of(url: str) -> Metrics:
    """Reads `url`/metrics, of `prerank serve`."""
    address = f"{url.rstrip('/')}/metrics"

    def read() -> Sample:
        try:
            with urllib.request.urlopen(address, timeout=_TIMEOUT_S) as response:
                return sample_of(response.read().decode())
        except (OSError, HTTPException, ValueError) as error:
            raise PrerankError(f"{address}: a server's metrics cannot be read there: {error}") from None

    return read


def sample_of(text: str) -> Sample:
    """The counters of a scrape. Raises PrerankError where it is no prerank server's."""
    found = {family.name: family.samples for family in text_string_to_metric_families(text)}
    if "prerank_version_loads" not in found:
        raise PrerankError(f"expected the metrics of a prerank server, found {sorted(found)[:5]}")
    total, errors, took = 0.0, 0.0, dict[float, float]()
    for one in found.get(_SECONDS, []):
        if one.name == f"{_SECONDS}_count":
            total += one.value
            errors += one.value if one.labels[_STATUS] >= "500" else 0.0
        elif one.name == f"{_SECONDS}_bucket" and one.labels[_STATUS] == "200":
            edge = float(one.labels[_EDGE]) * 1000.0
            took[edge] = took.get(edge, 0.0) + one.value
    loads = [s.value for s in found["prerank_version_loads"] if s.labels.get("outcome") == "failed"]
    degraded = [s.value for s in found.get("prerank_degraded", []) if s.name == "prerank_degraded_total"]
    version = next((s.labels["version"] for s in found.get("prerank_version", [])), "")
    return Sample(version, total, errors, sum(degraded), sum(loads), took)


@dataclass(frozen=True, slots=True)
class Limits:
    """How bad a new version's numbers may be: shares of requests, and milliseconds that 99 of 100 are answered within.

    A share is judged once there were `least` requests; the server must serve the version after `switch_s` seconds.
    """

    errors: float = 0.01
    degraded: float = 0.05
    p99_ms: float = 1000.0
    least: int = 50
    switch_s: float = 120.0

    def broken(self, seen: Sample, version: str, after_s: float) -> str:
        """What is wrong with what was `seen` in `after_s` seconds since `version` was rolled out; "" for nothing."""
        if seen.failed_loads:
            return f"the server could not load {version}"
        if seen.version != version and after_s > self.switch_s:
            return f"the server serves {seen.version or 'nothing'} {after_s:.0f} s after {version} was rolled out"
        if seen.requests < self.least:
            return ""
        shares = {"errors": (seen.errors, self.errors), "degraded answers": (seen.degraded, self.degraded)}
        for what, (number, most) in shares.items():
            if number > most * seen.requests:
                share = number / seen.requests
                return f"{share:.1%} of {seen.requests:.0f} requests were {what}, expected at most {most:.1%}"
        p99 = seen.quantile_ms(0.99)
        if p99 > self.p99_ms and seen.took:
            return f"p99 is {p99:.0f} ms over {seen.requests:.0f} requests, expected at most {self.p99_ms:.0f} ms"
        return ""


@dataclass(frozen=True, slots=True)
class Watched:
    """What was seen of each server since the roll-out, by name, and how often one did not answer, where that happened.

    `why` says what is broken; "" where all held to the end.
    """

    why: str
    seen: Mapping[str, Sample]
    missed: Mapping[str, int]

    @property
    def total(self) -> Sample:
        """All servers together."""
        return together(self.seen.values())

    def said(self) -> str:
        """In a sentence."""
        total = self.total
        p99 = f"{total.quantile_ms(0.99):.0f} ms" if total.requests else "unknown"
        of = f" of {len(self.seen)} servers" if len(self.seen) > 1 else ""
        missed = [f"{name} did not answer {times} times" for name, times in self.missed.items()]
        return "; ".join([f"{total.requests:.0f} requests{of}, {total.errors:.0f} errors, p99 {p99}", *missed])


@dataclass(frozen=True, slots=True)
class Watch:
    """Reads the metrics of `servers`, by name, every `every_s` seconds for `for_s` seconds, all at the same time."""

    servers: Mapping[str, Metrics]
    for_s: float
    limits: Limits
    every_s: float = 5.0
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic

    def look(self) -> dict[str, Sample]:
        """The counters of each now. Raises PrerankError naming those that cannot be reached, unless all can."""
        watched = self._watched({})
        _look(watched)
        if unreached := [one.error for one in watched if one.unanswered]:
            raise PrerankError("; ".join(unreached))
        return {one.name: one.before for one in watched if one.before is not None}

    def over(self, version: str, before: Mapping[str, Sample], tick: Callable[[], None] = lambda: None) -> Watched:
        """Watch `version`, rolled out just now; `before` is what servers had counted until then, where that is known.

        It ends as soon as one server breaks a limit, or all together do: requests of servers that each had too few to
        be judged may be enough.
        """
        start, watched = self.clock(), self._watched(before)
        while True:
            after_s = self.clock() - start
            _look(watched)
            is_over = after_s >= self.for_s
            why = self._broken(watched, version, after_s, is_over)
            if why or is_over:
                missed = {one.name: one.missed for one in watched if one.missed}
                return Watched(why, {one.name: one.seen for one in watched}, missed)
            tick()
            self.sleep(min(self.every_s, max(self.for_s - after_s, 0.0)))

    def _watched(self, before: Mapping[str, Sample]) -> list[_Server]:
        return [_Server(name, metrics, before.get(name)) for name, metrics in self.servers.items()]

    def _broken(self, watched: Sequence[_Server], version: str, after_s: float, is_over: bool) -> str:
        own = [(one.name, one.broken(self.limits, version, after_s, is_over)) for one in watched]
        if found := [f"{name}: {why}" for name, why in own if why]:
            return "; ".join(found)
        total = replace(together(one.seen for one in watched), version=version)
        why = self.limits.broken(total, version, after_s) if len(watched) > 1 else ""
        return f"all {len(watched)} servers together: {why}" if why else ""


@dataclass(slots=True)
class _Server:
    """One server while it is watched: what was `seen` since `before`, and how often in a row it did not answer."""

    name: str
    metrics: Metrics
    before: Sample | None
    seen: Sample = Sample()
    unanswered: int = 0
    missed: int = 0
    error: str = ""

    def look(self) -> None:
        try:
            now = self.metrics()
        except PrerankError as error:
            self.unanswered, self.missed, self.error = self.unanswered + 1, self.missed + 1, str(error)
            return
        self.unanswered = 0
        if self.before is None:
            self.before = now
        elif now.is_restarted_since(self.before):
            self.before = Sample()  # or it would be taken for one that did not, as soon as it counted as far
        self.seen = now.since(self.before)

    def broken(self, limits: Limits, version: str, after_s: float, is_over: bool) -> str:
        """What is wrong with it; "" for nothing, or nothing that is known now."""
        if self.unanswered >= _MOST_UNANSWERED:
            return f"the server did not answer {self.unanswered} times: {self.error}"
        why = "" if self.unanswered else limits.broken(self.seen, version, after_s)
        if is_over and not why and self.seen.version != version:
            return f"the server serves {self.seen.version or 'nothing'} at the end of the watch, and not {version}"
        return why


def _look(watched: Sequence[_Server]) -> None:
    """At all at the same time: one that hangs keeps nobody from seeing that another breaks, or not for long."""
    with ThreadPoolExecutor(len(watched)) as pool:
        list(pool.map(_Server.look, watched))
