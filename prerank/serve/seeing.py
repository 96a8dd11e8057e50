"""What a server shows of its requests besides metrics: when one leaves, it is told to all who watch."""

from __future__ import annotations

import random
from dataclasses import dataclass

import structlog

from prerank.serve.request_log import LogOptions, RequestLog
from prerank.serve.seen import Seen
from prerank.serve.traces import LATEST, Trace, Traces

_log = structlog.get_logger(__name__)
_TRACED = "/v1/recommend"
_ANSWERED = 200


@dataclass(frozen=True, slots=True)
class Sight:
    """How much is shown: the latest `traces` requests are kept (0: none), and a share `lines` has a line in the log.

    A share of `requests` is kept as it was answered, in files.
    """

    traces: int = LATEST
    lines: float = 0.0
    requests: LogOptions | None = None


AS_USUAL = Sight()


class Seeing:
    """Those who watch the requests of one app. Raises ConfigError where requests cannot be logged."""

    def __init__(self, sight: Sight = AS_USUAL) -> None:
        self.traces, self._lines = Traces(sight.traces), sight.lines
        self.requests = None if sight.requests is None else RequestLog(sight.requests)

    def comes(self, request_id: str) -> Seen:
        """A request that has just arrived."""
        return Seen(request_id, is_logged=self.requests is not None and self.requests.wants(request_id))

    def leaves(self, seen: Seen, path: str, status: int, seconds: float) -> None:
        """Tell of a request that left with this HTTP status, if it was one for winners."""
        if seen.request is None and path != _TRACED:
            return
        if self.traces.most:
            self.traces.add(Trace.of(seen, status, seconds * 1000.0))
        if self.requests is not None and seen.served is not None and status == _ANSWERED:
            self.requests.put(seen.served, seconds * 1000.0)
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

    def close(self) -> None:
        """Write what is waiting to be."""
        if self.requests is not None:
            self.requests.close()
