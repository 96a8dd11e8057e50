"""A server's own numbers while a version is new: how many requests failed, were degraded, were slow; and a verdict.

What is judged is the difference between two readings of its counters, so what happened before does not count. A server
that restarted counts from 0 again, and so does the watch.
"""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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

    def since(self, earlier: Sample) -> Sample:
        """What came after `earlier`; all of it where the server restarted between the two."""
        if self.requests < earlier.requests or self.failed_loads < earlier.failed_loads:
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
class Watch:
    """Reads `metrics` every `every_s` seconds for `for_s` seconds."""

    metrics: Metrics
    for_s: float
    limits: Limits
    every_s: float = 5.0
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic

    def over(self, version: str, before: Sample | None, tick: Callable[[], None] = lambda: None) -> tuple[str, Sample]:
        """Watch `version`, rolled out just now; `before` is what the server had counted until then, if that is known.

        Why it is broken, as soon as it is ("" where it held to the end), and all that was seen of it.
        """
        start, unanswered, seen = self.clock(), 0, Sample()
        while True:
            after_s = self.clock() - start
            try:
                now, unanswered = self.metrics(), 0
                before = now if before is None else before
                seen = now.since(before)
            except PrerankError as error:
                unanswered += 1
                if unanswered >= _MOST_UNANSWERED:
                    return f"the server did not answer {unanswered} times: {error}", seen
            is_over = after_s >= self.for_s
            why = "" if unanswered else self.limits.broken(seen, version, after_s)
            if is_over and not why and seen.version != version:
                why = f"the server serves {seen.version or 'nothing'} at the end of the watch, and not {version}"
            if why or is_over:
                return why, seen
            tick()
            self.sleep(min(self.every_s, max(self.for_s - after_s, 0.0)))
