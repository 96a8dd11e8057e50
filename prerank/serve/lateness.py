"""When a request's stages are too late: its own deadline, their limits, and what is kept of it for a fallback."""

from __future__ import annotations

from dataclasses import dataclass, field

from prerank.kernels.stop import Stop
from prerank.serve.graph import Deadline, RequestGraph, Stage

_MOST_SPARED = 0.1  # of a short deadline, so that the stage itself has its chance


@dataclass(slots=True)
class Watched:
    """A stage that is left behind at `until`, seconds on the graph's clock; None: when it is done."""

    stage: Stage
    until: float | None
    why: str
    stop: Stop = field(default_factory=Stop)

    def is_late(self, now: float) -> bool:
        """Whether its time is up at `now`."""
        return self.until is not None and now >= self.until


@dataclass(frozen=True, slots=True)
class Lateness:
    """Of one request through `graph`, which may have a deadline."""

    graph: RequestGraph
    deadline: Deadline | None

    def why(self) -> str | None:
        """Why nothing more may start, if so."""
        if self.deadline is None or not self.deadline.passed(self.graph.clock()):
            return None
        return f"the deadline of {self.deadline.ms:g} ms passed before it could start"

    def watched(self, stage: Stage, is_bound: bool) -> Watched:
        """A stage that starts now, and when and why it will be left; the deadline counts where it `is_bound` by it."""
        limit, now = self.graph.limits.get(stage.name), self.graph.clock()
        own = None if limit is None or limit.deadline_ms is None else now + limit.deadline_ms / 1000.0
        whole = None if self.deadline is None or not is_bound else now + self.deadline.left_s(now)
        has_fallback, spare_ms = stage.name in self.graph.fallbacks, self._spare_ms()
        if whole is not None and has_fallback and whole > now:
            whole = max(now, whole - spare_ms / 1000.0)
        if own is not None and (whole is None or own < whole):
            assert limit is not None
            return Watched(stage, own, f"it was not done in its {limit.deadline_ms:g} ms")
        why, ms = self.why(), 0.0 if self.deadline is None else self.deadline.ms
        if why is None and has_fallback and spare_ms:
            why = f"it was not done {spare_ms:g} ms before the deadline of {ms:g} ms"
        return Watched(stage, whole, why or f"the deadline of {ms:g} ms passed before it was done")

    def _spare_ms(self) -> float:
        """What is kept of the request's time for a fallback, and for what comes after it."""
        return 0.0 if self.deadline is None else min(self.graph.spare_ms, _MOST_SPARED * self.deadline.ms)
