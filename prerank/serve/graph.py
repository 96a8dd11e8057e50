"""A request as stages with declared reads and writes; the graph owns time, counts, deadlines and failure.

Stages are pure: what a stage may read and must write is said once, by the stage, and from that the graph derives
what waits for what. `RequestGraph` is that declaration, checked when it is built; `_Run` is one request's passage
through it, here one stage after another. Stages that do not wait for each other may overlap one day without a
change to any stage: only the loop in `RequestGraph.run` would.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from typing import Any, Protocol, TypeAlias

import structlog

from prerank.errors import DeadlineExceeded, GraphError, PrerankError

Values: TypeAlias = Mapping[str, Any]
"""What stages read and write, by name."""

_log = structlog.get_logger(__name__)


class Stage(Protocol):
    """One step of a request. It keeps no state between requests, and neither times nor catches anything itself."""

    @property
    def name(self) -> str:
        """What reports, metrics and errors call it."""
        ...

    @property
    def reads(self) -> frozenset[str]:
        """The values `run` is given; it sees no others."""
        ...

    @property
    def writes(self) -> frozenset[str]:
        """The values `run` returns, all of them and no others."""
        ...

    def run(self, values: Values) -> Values:
        """Do the work. A PrerankError is the request's own answer; any other exception may be met by a fallback."""
        ...

    def count(self, values: Values, written: Values) -> tuple[int, int]:
        """How many things (candidates, events, winners) went in and came out; not part of the stage's time."""
        ...


@dataclass(frozen=True, slots=True)
class StageReport:
    """One stage that ran: its wall time in milliseconds and how many things went in and came out."""

    name: str
    ms: float
    num_in: int
    num_out: int


@dataclass(frozen=True, slots=True)
class GraphRun:
    """What one request left: the declared outputs, a report a stage, and why it is degraded if it is."""

    outputs: Values
    reports: tuple[StageReport, ...]
    notes: tuple[str, ...]

    @property
    def degraded(self) -> bool:
        """Whether any stage was replaced by its fallback."""
        return bool(self.notes)


@dataclass(frozen=True, slots=True)
class Deadline:
    """`ms` milliseconds from the moment `start` on the run's clock, in seconds."""

    start: float
    ms: float

    def passed(self, now: float) -> bool:
        """Whether no time is left at `now`, in seconds."""
        return (now - self.start) * 1000.0 >= self.ms


class RequestGraph:
    """Stages wired by the names they read and write. Raises GraphError for a wiring that cannot work.

    `inputs` are given to every run and `outputs` are what it returns. `fallbacks` maps a stage's name to the stage
    that takes its place when it fails or cannot start in time; a stage without one is required. The deadline holds
    until the value `answer` exists: from then on the request can be answered, so what is left runs even if late.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        inputs: frozenset[str],
        outputs: frozenset[str],
        answer: str,
        fallbacks: Mapping[str, Stage],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.inputs, self.outputs, self.answer = inputs, outputs, answer
        self.fallbacks = dict(fallbacks)
        self._clock = clock
        writers = _writers(stages, inputs)
        _check_fallbacks(stages, self.fallbacks)
        self.waits_for = {stage.name: self._waits_for(stage, writers) for stage in stages}
        written = sorted(name for name, stage in writers.items() if stage is not None)
        for name in sorted({*outputs, answer} - set(writers)):
            raise GraphError(f"output {name!r}: no stage writes it; stages write {written}")
        self.order = _order(stages, self.waits_for)

    def _waits_for(self, stage: Stage, writers: Mapping[str, str | None]) -> frozenset[str]:
        # what a fallback reads must be there before its stage starts, so both count as the stage's needs
        either = [stage, *(f for name, f in self.fallbacks.items() if name == stage.name)]
        for one in either:
            for name in sorted(one.reads - set(writers)):
                raise GraphError(f"stage {one.name!r} reads {name!r}, which no stage writes and no input gives")
        return frozenset(writer for one in either for name in one.reads if (writer := writers[name]) is not None)

    def run(self, values: Values, deadline: Deadline | None = None) -> GraphRun:
        """Every stage in turn. Raises DeadlineExceeded if time runs out before an answer exists."""
        if frozenset(values) != self.inputs:
            raise GraphError(f"expected the inputs {sorted(self.inputs)}, got {sorted(values)}")
        run = _Run(self, dict(values), deadline, self._clock)
        for stage in self.order:
            run.step(stage)
        return GraphRun({n: run.values[n] for n in self.outputs}, tuple(run.reports), tuple(run.notes))


@dataclass(slots=True)
class _Run:
    graph: RequestGraph
    values: dict[str, Any]
    deadline: Deadline | None
    clock: Callable[[], float]
    reports: list[StageReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def step(self, stage: Stage) -> None:
        fallback = self.graph.fallbacks.get(stage.name)
        if self._late(stage, fallback):
            return
        try:
            self._run(stage)
        except PrerankError:
            raise
        except Exception as error:
            if fallback is None:
                raise
            _log.exception("stage failed", stage=stage.name, fallback=fallback.name)
            self._fall_back(stage, fallback, f"it failed ({type(error).__name__})")

    def _late(self, stage: Stage, fallback: Stage | None) -> bool:
        if self.deadline is None or not self.deadline.passed(self.clock()):
            return False
        reason = f"the deadline of {self.deadline.ms:g} ms passed before it could start"
        if fallback is not None:
            self._fall_back(stage, fallback, reason)
        elif self.graph.answer not in self.values:
            raise DeadlineExceeded(f"{stage.name}: {reason}; allow more with deadline_ms")
        return fallback is not None

    def _fall_back(self, stage: Stage, fallback: Stage, reason: str) -> None:
        self._run(fallback)
        self.notes.append(f"{stage.name}: {reason}; {fallback.name} took its place")

    def _run(self, stage: Stage) -> None:
        given = {name: self.values[name] for name in stage.reads}
        start = self.clock()
        written = stage.run(given)
        ms = (self.clock() - start) * 1000.0
        if frozenset(written) != stage.writes:
            missing, extra = sorted(stage.writes - set(written)), sorted(set(written) - stage.writes)
            raise GraphError(f"stage {stage.name!r} did not write {missing} as declared, and wrote {extra} undeclared")
        self.reports.append(StageReport(stage.name, ms, *stage.count(given, written)))
        self.values.update(written)


def _writers(stages: Sequence[Stage], inputs: frozenset[str]) -> dict[str, str | None]:
    """The name of the stage that writes each value; None for an input."""
    writers: dict[str, str | None] = dict.fromkeys(inputs)
    seen: set[str] = set()
    for stage in stages:
        if stage.name in seen:
            raise GraphError(f"two stages are called {stage.name!r}; rename one")
        seen.add(stage.name)
        for name in sorted(stage.writes):
            if name in writers:
                first = "an input" if writers[name] is None else f"stage {writers[name]!r}"
                raise GraphError(f"{name!r} is written twice: by {first} and by stage {stage.name!r}")
            writers[name] = stage.name
    return writers


def _check_fallbacks(stages: Sequence[Stage], fallbacks: Mapping[str, Stage]) -> None:
    by_name = {stage.name: stage for stage in stages}
    for name, fallback in fallbacks.items():
        if name not in by_name:
            raise GraphError(f"fallback {fallback.name!r} is for {name!r}, which is no stage; stages: {list(by_name)}")
        if fallback.writes != by_name[name].writes:
            raise GraphError(
                f"fallback {fallback.name!r} writes {sorted(fallback.writes)}, and stage {name!r} in whose place it "
                f"runs writes {sorted(by_name[name].writes)}"
            )


def _order(stages: Sequence[Stage], waits_for: Mapping[str, frozenset[str]]) -> tuple[Stage, ...]:
    by_name = {stage.name: stage for stage in stages}
    try:
        return tuple(by_name[name] for name in TopologicalSorter(waits_for).static_order())
    except CycleError as error:
        circle = " -> ".join(repr(name) for name in reversed(error.args[1]))
        raise GraphError(f"stages wait for each other in a circle: {circle}") from None
