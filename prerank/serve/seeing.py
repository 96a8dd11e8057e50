"""What a server shows of its requests besides metrics: when one leaves, it is told to all who watch."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from dataclasses import dataclass

import structlog

from prerank.errors import ConfigError
from prerank.serve.request_log import LogOptions, RequestLog
from prerank.serve.seen import Seen, Spans
from prerank.serve.traces import LATEST, Trace, Traces

_log = structlog.get_logger(__name__)
_TRACED = "/v1/recommend"
_RANKED = "/v2/models/", "/infer"
RANKED_BY_GRPC = "/inference.GRPCInferenceService/ModelInfer"
"""The path of that call, as gRPC has it."""
_ANSWERED = 200


@dataclass(frozen=True, slots=True)
class Sight:
    """How much is shown: the latest `traces` requests are kept (0: none), and a share `lines` has a line in the log.

    `spans`, if any, is told of every call that asks for work. A share of `requests` is kept as they were answered, in
    files.
    """

    traces: int = LATEST
    lines: float = 0.0
    spans: Spans | None = None
    requests: LogOptions | None = None


AS_USUAL = Sight()


class Seeing:
    """Those who watch the requests of one app. Raises ConfigError where requests cannot be logged."""

    def __init__(self, sight: Sight = AS_USUAL) -> None:
        self.traces, self._lines, self.spans = Traces(sight.traces), sight.lines, sight.spans
        self.requests = None if sight.requests is None else RequestLog(sight.requests)

    def arrives(self, seen: Seen, method: str, headers: Mapping[str, str]) -> None:
        """Tell of a request that came, if it asks for work."""
        if method != "POST":
            return
        if self.spans is not None:
            seen.span = self.spans.begin(seen, headers)
        seen.is_logged = self.requests is not None and self.requests.wants(seen.request_id)

    def leaves(self, seen: Seen, path: str, status: int, seconds: float) -> None:
        """Tell of a request that left with this HTTP status; traces and lines are of those for winners alone."""
        if seen.span is not None:
            seen.span.ends(seen, path, status)
        if seen.request is None and not _asks_for_winners(path):
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
                version=seen.version if answer is None else answer.version,
                status=status,
                ms=round(seconds * 1000.0, 3),
                degraded=answer is not None and answer.degraded,
                error=None if seen.error is None else seen.error[0],
            )

    def close(self) -> None:
        """Write what is waiting to be."""
        if self.requests is not None:
            self.requests.close()


def spans_of(wanted: bool | None, environment: Mapping[str, str] = os.environ) -> Spans | None:
    """What sends spans, if it is `wanted`; where nothing is said, if OpenTelemetry's variables name an endpoint.

    OTEL_SDK_DISABLED turns it off whatever is said. Raises ConfigError without the extra, and for variables that ask
    for what there is not.
    """
    if wanted is None:
        is_told = any(environment.get(f"OTEL_EXPORTER_OTLP_{name}") for name in ("ENDPOINT", "TRACES_ENDPOINT"))
        wanted = is_told and environment.get("OTEL_TRACES_EXPORTER", "otlp") != "none"
    if not wanted or environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    try:
        from prerank.serve.open_telemetry import OpenTelemetry  # an extra, and only needed here
    except ImportError as error:
        raise ConfigError(
            f"OpenTelemetry needs an extra, {error}; pip install 'prerank[otel]', or leave it off with --no-otel"
        ) from None
    return OpenTelemetry.open(environment)


def _asks_for_winners(path: str) -> bool:
    before, after = _RANKED
    return path in (_TRACED, RANKED_BY_GRPC) or (path.startswith(before) and path.endswith(after))
