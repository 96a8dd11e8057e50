"""A request as stages with declared reads and writes; the graph owns time, counts, deadlines and failure.

Stages are pure: what a stage may read and must write is said once, by the stage, and from that the graph derives
what waits for what. `RequestGraph` is that declaration, checked when it is built; `serve.passage` is one request's way
through it, where stages that do not wait for each other overlap.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Any, Protocol, TypeAlias

from prerank.errors import GraphError

Values: TypeAlias = Mapping[str, Any]
"""What stages read and write, by name."""


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
        """Do the work. A PrerankError is the request's own answer; what else is raised may be met by a fallback.

        So may a DataError, for a request is never the cause of what a store has or lacks.
        """
        ...

    def count(self, values: Values, written: Values) -> tuple[int, int]:
        """How many things (candidates, events, winners) went in and came out; not part of the stage's time."""
        ...


@dataclass(frozen=True, slots=True)
class StageReport:
    """One stage that ran: its wall time in milliseconds and how many things went in and came out.

    `start_ms` is when it began, from the beginning of the run.
    """

    name: str
    ms: float
    num_in: int
    num_out: int
    start_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class GraphRun:
    """What one request left: the declared outputs, a report a stage as they began, and why it is degraded if it is."""

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
        return self.left_s(now) <= 0

    def left_s(self, now: float) -> float:
        """How many seconds are left at `now`, in seconds."""
        return self.ms / 1000.0 - (now - self.start)


@dataclass(frozen=True, slots=True)
class Limit:
    """What one stage may take: `deadline_ms` from its start (None: the request's), and `at_once` of it at a time."""

    deadline_ms: float | None = None
    at_once: int | None = None


class RequestGraph:
    """Stages wired by the names they read and write. Raises GraphError for a wiring that cannot work.

    `inputs` are given to every run and `outputs` are what it returns. `fallbacks` maps a stage's name to the stage
    that takes its place when it fails, cannot start in time, or is not done in time; a stage without one is required.
    One of `patient` is replaced where it fails or passes a limit of its own, and else waited for while there is time:
    at the request's deadline what comes after it could not start either.
    The deadline holds until the value `answer` exists: from then on the request can be answered, so what is left runs
    even if late. `limits` are of stages, by name. A stage with a fallback is left `spare_ms` before the deadline, or a
    tenth of it if that is less, for what takes its place needs time too.

    With a `pool` stages that do not wait for each other overlap, and one that has a fallback or a deadline of its own
    is waited for no longer than that; without, a run is one stage after another on its caller's thread, and nothing is
    left before it is done. Stages named in `short` are done sooner than another thread could begin: while one is ready
    nothing is handed on. Of the others a thread begins with the one that stands first in `stages`. Those in `heeding`
    end by themselves soon after the `kernels.stop.Stop` of their thread is left, so none has to wait for them from
    another thread. `around` is entered on each thread that runs stages.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        inputs: frozenset[str],
        outputs: frozenset[str],
        answer: str,
        fallbacks: Mapping[str, Stage],
        patient: frozenset[str] = frozenset(),
        limits: Mapping[str, Limit] | None = None,
        short: frozenset[str] = frozenset(),
        heeding: frozenset[str] = frozenset(),
        spare_ms: float = 0.0,
        pool: Executor | None = None,
        around: Callable[[], AbstractContextManager[object]] = nullcontext,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.stages = tuple(stages)
        self.inputs, self.outputs, self.answer = inputs, outputs, answer
        self.fallbacks, self.limits, self.patient = dict(fallbacks), dict(limits or {}), patient
        self.short, self.heeding, self.spare_ms = short, heeding, spare_ms
        self.pool, self.around, self.clock = pool, around, clock
        writers = _writers(stages, inputs)
        _check_fallbacks(stages, self.fallbacks)
        self.waits_for = {stage.name: self._waits_for(stage, writers) for stage in stages}
        written = sorted(name for name, stage in writers.items() if stage is not None)
        for name in sorted({*outputs, answer} - set(writers)):
            raise GraphError(f"output {name!r}: no stage writes it; stages write {written}")
        self.order = _order(stages, self.waits_for)
        self.precedence = {one.name: (one.name not in short, place) for place, one in enumerate(stages)}
        for said, names in (("short", short), ("heeding", heeding)):
            for name in sorted(names - set(self.waits_for)):
                raise GraphError(f"{name!r} is said to be {said}, and is no stage; stages: {list(self.waits_for)}")
        for name in sorted(patient - set(self.fallbacks)):
            raise GraphError(f"{name!r} is patient and has no fallback; fallbacks are for {list(self.fallbacks)}")
        for name, limit in self.limits.items():
            if name not in self.waits_for:
                raise GraphError(f"a limit is for {name!r}, which is no stage; stages: {list(self.waits_for)}")
            if limit.at_once is not None and limit.at_once < 1:
                raise GraphError(f"stage {name!r}: expected at_once of 1 or more, got {limit.at_once}")
        self.turns = {
            name: threading.BoundedSemaphore(limit.at_once) for name, limit in self.limits.items() if limit.at_once
        }

    def with_stages(self, others: Iterable[Stage]) -> RequestGraph:
        """The same with `others` in the places of the stages of their names, which there must be."""
        by_name = {stage.name: stage for stage in others}
        for name in sorted(set(by_name) - set(self.waits_for)):
            raise GraphError(f"{name!r} is to take a stage's place, and is no stage; stages: {list(self.waits_for)}")
        return RequestGraph(
            [by_name.get(stage.name, stage) for stage in self.stages],
            inputs=self.inputs,
            outputs=self.outputs,
            answer=self.answer,
            fallbacks=self.fallbacks,
            patient=self.patient,
            limits=self.limits,
            short=self.short,
            heeding=self.heeding,
            spare_ms=self.spare_ms,
            pool=self.pool,
            around=self.around,
            clock=self.clock,
        )

    def is_watched(self, name: str) -> bool:
        """Whether this stage is waited for no longer than its time, or the request's."""
        limit = self.limits.get(name)
        is_replaced = name in self.fallbacks and name not in self.patient
        return is_replaced or (limit is not None and limit.deadline_ms is not None)

    def _waits_for(self, stage: Stage, writers: Mapping[str, str | None]) -> frozenset[str]:
        # what a fallback reads must be there before its stage starts, so both count as the stage's needs
        either = [stage, *(f for name, f in self.fallbacks.items() if name == stage.name)]
        for one in either:
            for name in sorted(one.reads - set(writers)):
                raise GraphError(f"stage {one.name!r} reads {name!r}, which no stage writes and no input gives")
        return frozenset(writer for one in either for name in one.reads if (writer := writers[name]) is not None)


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
