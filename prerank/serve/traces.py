"""The latest requests, by id: when each of their stages ran and what it let through. A bounded ring in memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec
from msgspec import Meta

from prerank.serve.graph import StageReport
from prerank.serve.seen import Seen
from prerank.serve.wire import StageBody

LATEST = 256
"""How many a server keeps unless told otherwise."""


@dataclass(frozen=True, slots=True)
class Trace:
    """One request that left: `ms` from its arrival to its answer, `began_ms` until its first stage could begin.

    What is None was not known when it was turned away.
    """

    request_id: str
    time_ms: int
    status: int
    ms: float
    began_ms: float | None
    version: str | None
    user_id: int | None
    k: int | None
    deadline_ms: float | None
    degraded: bool
    notes: Sequence[str]
    error: tuple[str, str] | None
    stages: Sequence[StageReport]

    @classmethod
    def of(cls, seen: Seen, status: int, ms: float) -> Trace:
        """What there is to say of a request that left with this HTTP status after `ms`."""
        request, answer = seen.request, seen.answer
        return cls(
            seen.request_id,
            seen.time_ms,
            status,
            ms,
            None if seen.began is None else max(0.0, (seen.began - seen.arrived) * 1000.0),
            seen.version if answer is None else answer.version,
            None if request is None else request.user_id,
            None if request is None else request.k,
            None if request is None else request.deadline_ms,
            answer is not None and answer.degraded,
            seen.notes if answer is None else answer.notes,
            seen.error,
            seen.stages if answer is None else answer.stages,
        )


class Traces:
    """The latest `most` traces; one more, and the oldest goes. A request_id that comes again is the later request."""

    def __init__(self, most: int = LATEST) -> None:
        self.most = most
        self._kept: OrderedDict[str, Trace] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, trace: Trace) -> None:
        """Keep one."""
        with self._lock:
            self._kept.pop(trace.request_id, None)
            self._kept[trace.request_id] = trace
            while len(self._kept) > self.most:
                self._kept.popitem(last=False)

    def get(self, request_id: str) -> Trace | None:
        """The one of this id, if it is still there."""
        with self._lock:
            return self._kept.get(request_id)

    def latest(self) -> list[Trace]:
        """All that are there, the latest first."""
        with self._lock:
            return list(reversed(self._kept.values()))


class TraceError(msgspec.Struct):
    """What the client got instead of an answer."""

    type: str
    message: str


class TraceBody(msgspec.Struct):
    """What `GET /v1/trace/{id}` gives: one request, stage by stage."""

    request_id: str
    time_ms: Annotated[int, Meta(description="When it arrived, UTC milliseconds.")]
    status: Annotated[int, Meta(description="The HTTP status of its answer.")]
    ms: Annotated[float, Meta(description="From its arrival to its answer, waiting included.")]
    began_ms: Annotated[float, Meta(description="When its stages began, from its arrival; null: none did.")] | None
    version: str | None
    user_id: int | None
    k: int | None
    deadline_ms: float | None
    degraded: bool
    notes: list[str]
    error: TraceError | None
    stages: Annotated[list[StageBody], Meta(description="As they began; start_ms is from began_ms.")]

    @classmethod
    def of(cls, trace: Trace) -> TraceBody:
        """`trace` as JSON has it, times to the microsecond."""
        return cls(
            trace.request_id,
            trace.time_ms,
            trace.status,
            round(trace.ms, 3),
            None if trace.began_ms is None else round(trace.began_ms, 3),
            trace.version,
            trace.user_id,
            trace.k,
            trace.deadline_ms,
            trace.degraded,
            list(trace.notes),
            None if trace.error is None else TraceError(*trace.error),
            [StageBody(s.name, round(s.start_ms, 3), round(s.ms, 3), s.num_in, s.num_out) for s in trace.stages],
        )


class TraceLine(msgspec.Struct):
    """One request of those that `GET /v1/traces` lists."""

    request_id: str
    time_ms: int
    status: int
    ms: float
    degraded: bool


class TracesBody(msgspec.Struct):
    """What `GET /v1/traces` gives: the latest requests that are kept, the latest first."""

    kept: Annotated[int, Meta(description="How many are kept at most; 0: tracing is off.")]
    traces: list[TraceLine]

    @classmethod
    def of(cls, traces: Traces) -> TracesBody:
        """What is there now."""
        lines = [TraceLine(t.request_id, t.time_ms, t.status, round(t.ms, 3), t.degraded) for t in traces.latest()]
        return cls(traces.most, lines)
