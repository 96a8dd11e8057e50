"""A server's counters without a server: a hundred requests between two looks."""

from dataclasses import replace
from pathlib import Path

from prerank.bundle.registry import Registry
from prerank.lifecycle.watching import Limits, Sample, Watch


class Server:
    """Counts as a server would: `bad` of each hundred requests fail once `version` is another than `of`."""

    def __init__(self, home: Path, bad: float = 0.0, slow: bool = False, loads: bool = True) -> None:
        self.registry, self.bad, self.slow, self.loads = Registry(home), bad, slow, loads
        self.first, self.now, self.at = str(self.registry.live()), Sample(), 0.0

    def __call__(self) -> Sample:
        live = str(self.registry.live())
        is_new = live != self.first
        if is_new and not self.loads:
            self.now = replace(self.now, version=self.first, failed_loads=1.0, requests=self.now.requests + 100)
            return self.now
        before, edges = self.now, (10.0, 1000.0, 5000.0)
        share = [0.0, 0.0, 1.0] if is_new and self.slow else [1.0, 1.0, 1.0]
        took = {edge: before.took.get(edge, 0.0) + 100 * part for edge, part in zip(edges, share, strict=True)}
        errors = before.errors + (self.bad if is_new else 0.0)
        self.now = Sample(live, before.requests + 100, errors, 0.0, 0.0, took)
        return self.now

    def watch(self, for_s: float = 20.0) -> Watch:
        return Watch({"server": self}, for_s, Limits(), sleep=self._sleep, clock=lambda: self.at)

    def _sleep(self, seconds: float) -> None:
        self.at += max(seconds, 0.01)
