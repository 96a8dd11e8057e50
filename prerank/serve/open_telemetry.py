"""Requests as OpenTelemetry spans, one a request and one a stage, sent in the background. The one file that knows it.

A span has times, counts, and what was replaced or went wrong; never who asked, which items, or an error's message.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

import structlog
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from prerank import __version__
from prerank.errors import ConfigError
from prerank.serve.seeing import RANKED_BY_GRPC
from prerank.serve.seen import Seen

MOST_WAITING = 2048
"""How many spans wait to be sent at most, unless OTEL_BSP_MAX_QUEUE_SIZE says otherwise."""
END_S = 3.0
"""For so long at most an ending server sends what waits, and then gives up."""

_PROTOCOL = "http/protobuf"
_ROUTES = ("/v1/recommend", "/v1/metadata", "/v1/events", "/v1/items")
_INFER = "/v2/models/{model}/infer"
_log = structlog.get_logger(__name__)


class OpenTelemetry:
    """`Spans` that go to an `exporter`, of which `most` wait; one more request, and its spans are dropped together."""

    def __init__(self, exporter: SpanExporter, most: int = MOST_WAITING, delay_ms: float | None = None) -> None:
        self.most = most
        self._out = _Counting(exporter)
        self._provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
        # OTEL_BSP_* say the rest
        self._provider.add_span_processor(BatchSpanProcessor(self._out, most, delay_ms))
        self._tracer = self._provider.get_tracer("prerank", __version__)
        self._read = TraceContextTextMapPropagator()
        self._ending = threading.Lock()
        self._is_closed = False

    @classmethod
    def open(cls, environment: Mapping[str, str]) -> OpenTelemetry:
        """Those that go by OTLP over HTTP to where the standard variables say, by default this machine's port 4318.

        Raises ConfigError for variables that ask for another protocol, or that are wrong.
        """
        for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
            if environment.get(name, _PROTOCOL) != _PROTOCOL:
                raise ConfigError(f"{name}: expected {_PROTOCOL}, the one there is, got {environment[name]!r}")
        for name in ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"):
            if (said := environment.get(name)) and not _is_url(said):
                raise ConfigError(f"{name}: expected a url such as http://localhost:4318, got {said!r}")
        most = environment.get("OTEL_BSP_MAX_QUEUE_SIZE", str(MOST_WAITING))
        _quiet()
        try:
            return cls(OTLPSpanExporter(), int(most))
        except ValueError as error:
            raise ConfigError(f"OTEL_*: expected what OpenTelemetry takes: {error}") from None

    def begin(self, seen: Seen, headers: Mapping[str, str]) -> _Request:
        """See `Spans`. The caller's trace goes on where `traceparent` names one."""
        arrived_ns = time.time_ns() - int((time.perf_counter() - seen.arrived) * 1e9)
        context = self._read.extract(headers)
        return _Request(
            self, self._tracer.start_span("POST", context, SpanKind.SERVER, start_time=arrived_ns), arrived_ns
        )

    def counts(self) -> Mapping[str, int]:
        """See `Spans`: sent, failed (the collector did not take them), dropped (too many waited)."""
        return self._out.counts()

    def close(self) -> None:
        """See `Spans`; once is enough."""
        if self._is_closed:
            return
        self._is_closed = True
        ending = threading.Thread(target=self._provider.shutdown, name="last-spans", daemon=True)
        ending.start()
        ending.join(END_S)
        if ending.is_alive():
            self._out.inner.shutdown()  # which wakes it, where it waits to try again
            ending.join(1.0)

    def _send(self, request: _Request, seen: Seen) -> None:
        """End the request's span and make its stages', or none of them."""
        began_ns = 0 if seen.began is None else int((seen.began - seen.arrived) * 1e9)
        stages = seen.stages if seen.answer is None else seen.answer.stages
        with self._ending:
            if not self._out.has_room(1 + len(stages), self.most):
                return
            context = trace.set_span_in_context(request.span)
            for stage in stages:
                start_ns = request.arrived_ns + began_ns + int(stage.start_ms * 1e6)
                said = {"prerank.num_in": stage.num_in, "prerank.num_out": stage.num_out}
                span = self._tracer.start_span(stage.name, context, attributes=said, start_time=start_ns)
                span.end(start_ns + int(stage.ms * 1e6))
            request.span.end()


class _Request:
    """See `Span`."""

    def __init__(self, to: OpenTelemetry, span: trace.Span, arrived_ns: int) -> None:
        self.span, self.arrived_ns = span, arrived_ns
        self._to = to
        self.trace_id = trace.format_trace_id(span.get_span_context().trace_id)

    def ends(self, seen: Seen, path: str, status: int) -> None:
        """See `Span`."""
        span = self.span
        if not span.is_recording():  # whoever asked does not want it kept
            return
        if path == RANKED_BY_GRPC:
            span.update_name(path[1:])
            service, _, method = path[1:].partition("/")
            span.set_attributes({"rpc.system": "grpc", "rpc.service": service, "rpc.method": method})
        else:
            route = _route(path)
            span.update_name(f"POST {route}".strip())
            span.set_attributes({"http.request.method": "POST", "http.route": route})
        # of the notes only the graph's own: others name the user
        notes, answer = list(seen.notes), seen.answer
        span.set_attributes(
            {
                "http.response.status_code": status,
                "prerank.request_id": seen.request_id,
                "prerank.version": (seen.version if answer is None else answer.version) or "",
                "prerank.degraded": bool(notes) if answer is None else answer.degraded,
                "prerank.notes": notes,
            }
        )
        if seen.request is not None:
            span.set_attribute("prerank.k", seen.request.k)
        if seen.error is not None:
            span.set_attribute("error.type", seen.error[0])
        if status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        self._to._send(self, seen)


class _Counting(SpanExporter):
    """Sends by `inner`, and counts what came of it and what has not been sent yet."""

    def __init__(self, inner: SpanExporter) -> None:
        self.inner = inner
        self._lock = threading.Lock()
        self._waiting, self._came = 0, Counter(sent=0, failed=0, dropped=0)

    def has_room(self, num: int, most: int) -> bool:
        """Whether so many more may wait: then they do, and are dropped otherwise."""
        with self._lock:
            if self._waiting + num > most:
                self._came["dropped"] += num
                return False
            self._waiting += num
            return True

    def counts(self) -> Mapping[str, int]:
        with self._lock:
            return dict(self._came)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        with self._lock:
            self._waiting -= len(spans)
        outcome = "failed"
        try:
            result = self.inner.export(spans)
            outcome = "sent" if result is SpanExportResult.SUCCESS else "failed"
            return result
        finally:
            with self._lock:
                self._came[outcome] += len(spans)

    def shutdown(self) -> None:
        self.inner.shutdown()


class _Lines(logging.Handler):
    """OpenTelemetry's own complaints, as lines like all others."""

    def emit(self, record: logging.LogRecord) -> None:
        tell = _log.error if record.levelno >= logging.ERROR else _log.warning
        tell("OpenTelemetry", says=record.getMessage())


def _quiet() -> None:
    logger = logging.getLogger("opentelemetry")
    logger.propagate = False
    logger.handlers = [_Lines(logging.WARNING)]


def _resource() -> Resource:
    """As OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES say, and prerank where they name no service."""
    made = Resource.create({SERVICE_VERSION: __version__})
    is_named = not str(made.attributes.get(SERVICE_NAME, "")).startswith("unknown_service")
    return made if is_named else made.merge(Resource({SERVICE_NAME: "prerank"}))


def _route(path: str) -> str:
    """Few names for all paths."""
    if path in _ROUTES:
        return path
    return _INFER if path.startswith("/v2/models/") and path.endswith("/infer") else ""


def _is_url(said: str) -> bool:
    try:
        parts = urlsplit(said)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        return False
