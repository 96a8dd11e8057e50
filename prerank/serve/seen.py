"""What is seen of one request while it is here: noted where it happens, told when the request leaves.

The one of the running request is a context variable, so that a graph, which knows nothing of HTTP, can tell what came
of its stages, also where a request fails.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import Protocol

from prerank.serve.answer import Answer
from prerank.serve.graph import StageReport
from prerank.serve.served import Served
from prerank.types import Request


@dataclass(slots=True)
class Seen:
    """One request: `arrived` in seconds (`time.perf_counter`), `time_ms` the same moment in UTC milliseconds.

    `began` is when its stages did, in seconds; `stages` and `notes` are what the graph said, `error` the type and
    message of what the client got instead of an answer. `version` is of an answer that is no `answer`: of the ranking
    stage alone. `span` is where a tracing system is told, if one is. `served` is what it was answered from, where
    `is_logged`.
    """

    request_id: str
    arrived: float = field(default_factory=time.perf_counter)
    time_ms: int = field(default_factory=lambda: time.time_ns() // 1_000_000)
    request: Request | None = None
    answer: Answer | None = None
    began: float | None = None
    stages: Sequence[StageReport] = ()
    notes: Sequence[str] = ()
    error: tuple[str, str] | None = None
    version: str | None = None
    span: Span | None = None
    is_logged: bool = False
    served: Served | None = None

    @property
    def named(self) -> dict[str, str]:
        """What every line of the log says of it."""
        said = {"request_id": self.request_id}
        return said if self.span is None else {**said, "trace_id": self.span.trace_id}

    def passed(self, began: float, stages: Sequence[StageReport], notes: Sequence[str]) -> None:
        """Note what came of the stages, of a request that failed those that were done."""
        self.began, self.stages, self.notes = began, stages, notes


class Span(Protocol):
    """One request as a tracing system has it."""

    @property
    def trace_id(self) -> str:
        """32 hex digits: the caller's, where it said."""
        ...

    def ends(self, seen: Seen, path: str, status: int) -> None:
        """The request left with this HTTP status."""
        ...


class Spans(Protocol):
    """What begins them; `serve.open_telemetry` is one."""

    def begin(self, seen: Seen, headers: Mapping[str, str]) -> Span:
        """One for a request that arrived with these headers, their names in small letters."""
        ...

    def counts(self) -> Mapping[str, int]:
        """How many spans, by what came of them."""
        ...

    def close(self) -> None:
        """Send what waits, as far as that is soon done."""
        ...


_current: ContextVar[Seen | None] = ContextVar("prerank_seen", default=None)


def current() -> Seen | None:
    """What is seen of the request that runs here, or None where nobody looks."""
    return _current.get()


def begin(seen: Seen) -> Token[Seen | None]:
    """Let `seen` be the current one; `end` takes what this gives."""
    return _current.set(seen)


def end(token: Token[Seen | None]) -> None:
    """Let the one before be the current one again."""
    _current.reset(token)
