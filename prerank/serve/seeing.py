"""What a server shows of its requests besides metrics: when one leaves, it is told to all who watch."""

from __future__ import annotations

import random
from dataclasses import dataclass

import structlog

from prerank.serve.seen import Seen
from prerank.serve.traces import LATEST, Trace, Traces

_log = structlog.get_logger(__name__)
_TRACED = "/v1/recommend"


@dataclass(frozen=True, slots=True)
class Sight:
    """How much is shown: the latest `traces` requests are kept (0: none), and a share `lines` has a line in the log."""

    traces: int = LATEST
    lines: float = 0.0


AS_USUAL = Sight()


class Seeing:
    """Those who watch the requests of one app."""

    def __init__(self, sight: Sight = AS_USUAL) -> None:
        self.traces, self._lines = Traces(sight.traces), sight.lines

    def leaves(self, seen: Seen, path: str, status: int, seconds: float) -> None:
        """Tell of a request that left with this HTTP status, if it was one for winners."""
        if seen.request is None and path != _TRACED:
            return
        if self.traces.most:
            self.traces.add(Trace.of(seen, status, seconds * 1000.0))
        if self._lines and random.random() < self._lines:
            answer = seen.answer
            _log.info(
                "request",
                request_id=seen.request_id,
                version=None if answer is None else answer.version,
                status=status,
                ms=round(seconds * 1000.0, 3),
                degraded=answer is not None and answer.degraded,
                error=None if seen.error is None else seen.error[0],
            )
