"""One request's way through a graph: what starts when, what is waited for and how long, and what takes its place.

The caller's thread runs stages itself while there are any that nothing watches, and otherwise waits. A stage that is
ready beside others goes to the pool; so does every one that is watched, which is one with a fallback for when it is
late or a deadline of its own, for a thread that runs a stage cannot leave it. What is left behind when its time is up,
or its client has gone, is told so (`kernels.stop`), and native code then ends; what it writes is not looked at. A stage
that heeds that is told until when instead, and runs where it is: nobody else has to wake.
"""

from __future__ import annotations

import contextvars
import threading
from collections import deque
from math import inf
from typing import Any

import structlog

from prerank.errors import Cancelled, DataError, DeadlineExceeded, GraphError, PrerankError
from prerank.kernels import ranges
from prerank.kernels.stop import Stop
from prerank.serve.graph import Deadline, GraphRun, RequestGraph, Stage, StageReport, Values
from prerank.serve.lateness import Lateness, Watched
from prerank.serve.seen import current

_log = structlog.get_logger(__name__)


def run_graph(
    graph: RequestGraph, values: Values, deadline: Deadline | None = None, cancelled: Stop | None = None
) -> GraphRun:
    """Every stage as soon as what it waits for is there.

    Raises DeadlineExceeded if time runs out before an answer exists, Cancelled if `cancelled` is set and that is seen
    before another stage starts, while one is waited for or by one that heeds it, and what a required stage raises.
    """
    if frozenset(values) != graph.inputs:
        raise GraphError(f"expected the inputs {sorted(graph.inputs)}, got {sorted(values)}")
    passage = _Passage(graph, dict(values), deadline, cancelled)
    try:
        passage.go()
    finally:
        reports = tuple(sorted(passage.reports, key=lambda one: one.start_ms))
        if (seen := current()) is not None:
            seen.passed(passage.start, reports, tuple(passage.notes))
    return GraphRun({n: passage.values[n] for n in graph.outputs}, reports, tuple(passage.notes))


class _Passage:
    def __init__(
        self,
        graph: RequestGraph,
        values: dict[str, Any],
        deadline: Deadline | None,
        cancelled: Stop | None,
    ) -> None:
        self.graph, self.values, self.deadline, self.cancelled = graph, values, deadline, cancelled
        self._lateness = Lateness(graph, deadline)
        self.reports: list[StageReport] = []
        self.notes: list[str] = []
        self._changed = threading.Condition()
        self._done: set[str] = set()
        self._started: set[str] = set()
        self._ready: deque[Stage] = deque()  # that any thread may run, short ones first
        self._watched: dict[str, Watched] = {}  # in the pool
        self._heeding: dict[str, Watched] = {}  # where they are
        self._error: BaseException | None = None
        self._is_over = False
        self._wakes = inf  # when the caller, if it waits, looks again by itself
        self.start = graph.clock()

    def go(self) -> None:
        """All of it, from the caller's thread."""
        try:
            self._find_ready()
            while (task := self._next()) is not None:
                stage, reason = task
                if reason is None:
                    self._attempt(stage)
                else:
                    self._replace(stage, reason)
                    self._find_ready()
        finally:
            with self._changed:
                self._is_over = True
                for one in [*self._watched.values(), *self._heeding.values()]:
                    one.stop.set()

    def _next(self) -> tuple[Stage, str | None] | None:
        """A stage for the caller to run, or to replace and why; waits until there is one. None when all are done."""
        with self._changed:
            while len(self._done) < len(self.graph.order):
                if self._error is not None:
                    raise self._error
                self._check_cancelled()
                if self._ready:
                    return self._ready.popleft(), None
                late = self._leave_late()
                if late is not None:
                    return late
                wait_s = self._wait_s()
                self._wakes = inf if wait_s is None else self.graph.clock() + wait_s
                self._changed.wait(wait_s)
            return None

    def _find_ready(self) -> None:
        """Start what waits for nothing any more: what is watched in the pool, and all but one of what is long."""
        with self._changed:
            if self._is_over or self._error is not None:
                return
            begin = [
                stage
                for stage in self.graph.order
                if stage.name not in self._started and self.graph.waits_for[stage.name] <= self._done
            ]
            is_alone = len(begin) == 1 and self._started == self._done
            self._started |= {stage.name for stage in begin}
            for stage in begin:
                self._begin(stage, is_alone)
            # what is short comes first and by one thread, for two would wait for each other's turn at Python
            self._ready = deque(sorted(self._ready, key=lambda one: self.graph.precedence[one.name]))
            if self.graph.pool is not None and self._ready and self._ready[0].name not in self.graph.short:
                for _ in range(len(self._ready) - 1):
                    self._submit(None)
            # a caller that is woken takes its turn at Python from the thread that goes on with what is ready
            soonest = min((one.until for one in self._watched.values() if one.until is not None), default=inf)
            if len(self._ready) > 1 or soonest < self._wakes or len(self._done) == len(self.graph.order):
                self._changed.notify_all()

    def _begin(self, stage: Stage, is_alone: bool) -> None:
        """Make a stage ready for any thread, or hand it to the pool: with others under way somebody must leave it."""
        name, graph = stage.name, self.graph
        if graph.pool is None or not graph.is_watched(name):
            self._ready.append(stage)
            return
        one = self._lateness.watched(stage, self._is_bound(stage))
        if is_alone and name in graph.heeding and name not in graph.turns:  # for a turn it would wait past its time
            self._heeding[name] = one
            self._ready.append(stage)
            return
        self._watched[name] = one
        if not one.is_late(graph.clock()):
            self._submit(one)

    def _submit(self, watched: Watched | None) -> None:
        """Let a thread of the pool run this stage, and then whatever is ready."""
        assert self.graph.pool is not None
        context = contextvars.copy_context()  # what logs are bound to, such as the request's id
        self.graph.pool.submit(context.run, self._work, watched)

    def _work(self, watched: Watched | None) -> None:
        with self.graph.around():
            if watched is not None:
                with watched.stop.here():  # and no longer: others wait for what this thread does next
                    self._attempt(watched.stage)
            while True:
                with self._changed:
                    if self._is_over or not self._ready:
                        return
                    stage = self._ready.popleft()
                self._attempt(stage)

    def _attempt(self, stage: Stage) -> None:
        """Run a stage, or its fallback where it fails or is late; whatever comes of it is told to who waits."""
        try:
            reason = self._run_in_time(stage)
            if reason is not None:
                self._replace(stage, reason)
        except BaseException as error:
            with self._changed:
                if not self._was_left(stage):
                    self._error = self._error or error
                self._changed.notify_all()
            return
        self._find_ready()

    def _run_in_time(self, stage: Stage) -> str | None:
        """Why the stage's fallback must take its place, or None: then it is done, or nobody waits for it."""
        name, turn = stage.name, self.graph.turns.get(stage.name)
        has_fallback, heeding = name in self.graph.fallbacks, self._heeding.get(name)
        reason = self._lateness.why() if self._is_bound(stage) else None
        if reason is None and heeding is not None and heeding.is_late(self.graph.clock()):
            reason = heeding.why
        if reason is not None:
            turn = None
        elif turn is not None and not turn.acquire(timeout=self._left_s(stage)):
            reason, turn = "it had no turn in time", None
        try:
            if self._was_left(stage):  # while it waited for a thread or its turn
                return None
            if reason is None:
                reason = self._run_till_late(stage, heeding)
            is_replaced = has_fallback and (name not in self.graph.patient or self.graph.is_watched(name))
            if reason is None or is_replaced:
                return reason
            raise DeadlineExceeded(f"{name}: {reason}; allow more with deadline_ms")
        except Exception as error:
            is_answer = isinstance(error, PrerankError) and not isinstance(error, DataError)
            if is_answer or not has_fallback or self._was_left(stage):
                raise
            told = _log.warning if isinstance(error, PrerankError) else _log.exception
            told("stage failed", stage=name, fallback=self.graph.fallbacks[name].name, error=str(error))
            return f"it failed ({type(error).__name__})"
        finally:
            if turn is not None:
                turn.release()

    def _run_till_late(self, stage: Stage, heeding: Watched | None) -> str | None:
        """Run a stage to its end, or one that heeds a Stop until its time is up; then why it was left."""
        if heeding is None:
            self._run(stage, stage)
            return None
        left_s = None if heeding.until is None else heeding.until - self.graph.clock()
        stop = heeding.stop if self.cancelled is None else self.cancelled  # which may be set meanwhile
        try:
            with stop.here(left_s):
                self._run(stage, stage)
        except Cancelled:
            self._check_cancelled()
            if not self._is_over and not heeding.is_late(self.graph.clock()):
                raise  # by something else
            return None if self._is_over else heeding.why
        return None

    def _replace(self, stage: Stage, reason: str) -> None:
        """The fallback in the stage's place, and the answer says so."""
        fallback = self.graph.fallbacks[stage.name]
        if self._run(stage, fallback):
            with self._changed:
                self.notes.append(f"{stage.name}: {reason}; {fallback.name} took its place")

    def _run(self, stage: Stage, doer: Stage) -> bool:
        """Let `doer` write what `stage` must; False where nobody waits for it from this thread any more."""
        self._check_cancelled()
        given = {name: self.values[name] for name in doer.reads}
        start = self.graph.clock()
        with ranges.stage(doer.name):
            written = doer.run(given)
        ms = (self.graph.clock() - start) * 1000.0
        if frozenset(written) != stage.writes:
            missing, extra = sorted(stage.writes - set(written)), sorted(set(written) - stage.writes)
            raise GraphError(f"stage {doer.name!r} did not write {missing} as declared, and wrote {extra} undeclared")
        report = StageReport(doer.name, ms, *doer.count(given, written), (start - self.start) * 1000.0)
        with self._changed:
            if stage.name in self._done or (doer is stage and self._was_left(stage)):
                return False
            self.reports.append(report)
            self.values.update(written)
            self._done.add(stage.name)
            self._watched.pop(stage.name, None)
        return True

    def _leave_late(self) -> tuple[Stage, str] | None:
        """A watched stage whose time is up, and why. Raises DeadlineExceeded where nothing can take its place."""
        now = self.graph.clock()
        for name, one in list(self._watched.items()):
            if one.is_late(now):
                del self._watched[name]
                one.stop.set()
                if name in self.graph.fallbacks:
                    return one.stage, one.why
                raise DeadlineExceeded(f"{name}: {one.why}; allow more with deadline_ms")
        if self.deadline is not None and self.deadline.passed(now) and self.graph.answer not in self.values:
            raise DeadlineExceeded(
                f"the deadline of {self.deadline.ms:g} ms passed before there was an answer; allow more with "
                "deadline_ms"
            )
        return None

    def _was_left(self, stage: Stage) -> bool:
        """Whether a watched stage is waited for no more, or the whole passage is over."""
        is_pooled = (
            self.graph.pool is not None and self.graph.is_watched(stage.name) and stage.name not in self._heeding
        )
        return self._is_over or (is_pooled and stage.name not in self._watched)

    def _left_s(self, stage: Stage) -> float | None:
        """For how long a stage may wait for its turn; where the answer exists, as long as it takes."""
        now, watched = self.graph.clock(), self._watched.get(stage.name)
        ends = [] if watched is None or watched.until is None else [watched.until - now]
        if self.deadline is not None and self._is_bound(stage):
            ends.append(self.deadline.left_s(now))
        return max(0.0, min(ends)) if ends else None

    def _is_bound(self, stage: Stage) -> bool:
        """Whether the request's deadline is the stage's: with an answer there, what has no other way runs late."""
        return self.graph.answer not in self.values or stage.name in self.graph.fallbacks

    def _wait_s(self) -> float | None:
        """For how long there is nothing to do but wait."""
        now = self.graph.clock()
        times = [one.until - now for one in self._watched.values() if one.until is not None]
        if self.deadline is not None and self.graph.answer not in self.values:
            times.append(self.deadline.left_s(now))
        if self.cancelled is not None:
            times.append(0.05)  # an event cannot be waited for beside a condition
        return max(0.0, min(times)) if times else None

    def _check_cancelled(self) -> None:
        if self.cancelled is not None and self.cancelled.is_set():
            raise Cancelled("the request was given up")
