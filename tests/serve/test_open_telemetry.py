"""Spans of requests: whose trace they go on with, what they say and never say, where they go, and what they cost."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import structlog

from prerank.errors import ConfigError
from prerank.serve.funnel import Funnel
from prerank.serve.http import create_app
from prerank.serve.seeing import Sight, spans_of
from prerank.serve.stages import Rank
from tests.serve.client import Client
from tests.serve.fake import FakeFunnel
from tests.serve.test_open_inference import inputs

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs the extra: pip install 'prerank[otel]'")

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from prerank.serve.open_telemetry import OpenTelemetry
from tests.serve.collector import collector

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
CALLER = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
REAL = {"user_id": 1, "k": 3, "context": {"hour": 1, "surface": "feed"}}


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def spans(exporter: InMemorySpanExporter) -> Iterator[OpenTelemetry]:
    spans = OpenTelemetry(exporter)
    yield spans
    spans.close()


def sent(spans: OpenTelemetry, exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    """By name, once all that waits has been sent."""
    spans.close()
    return {one.name: one for one in exporter.get_finished_spans()}


def test_a_request_is_a_span_in_its_callers_trace_and_each_stage_a_span_below_it(
    funnel: Funnel, spans: OpenTelemetry, exporter: InMemorySpanExporter
) -> None:
    before = time.time_ns()
    with Client(create_app(funnel, sight=Sight(spans=spans))) as client:
        answer = client.post("/v1/recommend", json=REAL, headers=CALLER).json()
    found = sent(spans, exporter)
    whole = found.pop("POST /v1/recommend")
    assert set(found) == {stage["name"] for stage in answer["stages"]}
    assert f"{whole.context.trace_id:032x}" == TRACE
    assert f"{whole.parent.span_id:016x}" == PARENT
    assert whole.kind is SpanKind.SERVER
    assert whole.status.status_code is StatusCode.UNSET
    assert dict(whole.attributes) == {
        "http.request.method": "POST",
        "http.route": "/v1/recommend",
        "http.response.status_code": 200,
        "prerank.request_id": answer["request_id"],
        "prerank.version": answer["version"],
        "prerank.degraded": False,
        "prerank.notes": (),
        "prerank.k": 3,
    }
    assert whole.resource.attributes["service.name"] == "prerank"
    for stage in answer["stages"]:
        span = found[stage["name"]]
        assert (span.context.trace_id, span.parent.span_id) == (whole.context.trace_id, whole.context.span_id)
        assert dict(span.attributes) == {"prerank.num_in": stage["in"], "prerank.num_out": stage["out"]}
        assert before <= whole.start_time <= span.start_time <= span.end_time <= whole.end_time
        assert (span.end_time - span.start_time) / 1e6 == pytest.approx(stage["ms"], abs=0.002)
    starts = {name: span.start_time for name, span in found.items()}
    first = min(starts.values())
    for stage in answer["stages"]:
        offset_ms = stage["start_ms"] - min(one["start_ms"] for one in answer["stages"])
        assert (starts[stage["name"]] - first) / 1e6 == pytest.approx(offset_ms, abs=0.005)


def test_without_a_caller_that_says_one_a_trace_is_new_and_lines_of_the_log_name_it(
    spans: OpenTelemetry, exporter: InMemorySpanExporter
) -> None:
    processors = [structlog.contextvars.merge_contextvars]
    with (
        structlog.testing.capture_logs(processors=processors) as logs,
        Client(create_app(FakeFunnel(), sight=Sight(lines=1.0, spans=spans))) as client,
    ):
        for headers in ({}, {"traceparent": "00-no-trace-01"}, CALLER):
            client.post("/v1/recommend", json=REAL, headers=headers)
        client.get("/healthz")
        assert structlog.contextvars.get_contextvars() == {}
    spans.close()
    whole = [one for one in exporter.get_finished_spans() if one.name == "POST /v1/recommend"]
    assert [one["trace_id"] for one in logs] == [f"{one.context.trace_id:032x}" for one in whole]
    assert len({one["trace_id"] for one in logs}) == 3
    assert logs[2]["trace_id"] == TRACE
    assert whole[0].parent is None


def test_what_a_caller_does_not_sample_is_in_the_log_and_not_sent(
    spans: OpenTelemetry, exporter: InMemorySpanExporter
) -> None:
    processors = [structlog.contextvars.merge_contextvars]
    with (
        structlog.testing.capture_logs(processors=processors) as logs,
        Client(create_app(FakeFunnel(), sight=Sight(lines=1.0, spans=spans))) as client,
    ):
        client.post("/v1/recommend", json=REAL, headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})
    assert [one["trace_id"] for one in logs] == [TRACE]
    assert not sent(spans, exporter)


def test_a_degraded_request_says_what_was_replaced_and_none_says_who_asked_or_for_what(
    funnel: Funnel, spans: OpenTelemetry, exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise ValueError("of user 987654321")

    monkeypatch.setattr(Rank, "run", fails)
    stranger = {**REAL, "user_id": 987_654_321, "exclude": [100]}
    with Client(create_app(funnel, sight=Sight(spans=spans))) as client:
        answer = client.post("/v1/recommend", json=stranger).json()
        assert "unknown user 987654321" in str(answer["notes"]), "which is why notes are not all sent"
        client.post("/v1/recommend", json={**stranger, "user_id": "987654321"})
        event = {"user_id": 987_654_321, "item_id": 100, "event": "impression"}
        assert client.post("/v1/events", json={"events": [event]}).status_code == 200
    found = sent(spans, exporter)
    assert "POST /v1/events" in found
    assert "rank_by_similarity" in found
    every = [one for one in exporter.get_finished_spans() if one.name == "POST /v1/recommend"]
    degraded, wrong = every
    assert degraded.attributes["prerank.degraded"] is True
    assert degraded.attributes["prerank.notes"] == ("rank: it failed (ValueError); rank_by_similarity took its place",)
    assert (wrong.attributes["http.response.status_code"], wrong.attributes["error.type"]) == (422, "RequestError")
    assert wrong.status.status_code is StatusCode.UNSET, "the caller's mistake, not ours"
    told = "".join(one.to_json() for one in exporter.get_finished_spans())
    assert "987654321" not in told
    assert not {"user", "item_id", "item_ids"} & {word for one in found.values() for word in one.attributes}


def test_an_error_of_ours_is_one_of_the_span(spans: OpenTelemetry, exporter: InMemorySpanExporter) -> None:
    def fails(_: object) -> None:
        raise ValueError("secret")

    with Client(create_app(FakeFunnel(before=fails), sight=Sight(spans=spans))) as client:
        assert client.post("/v1/recommend", json=REAL).status_code == 500
        assert client.post("/v1/none/such", json=REAL).status_code == 404
    found = sent(spans, exporter)
    whole = found["POST /v1/recommend"]
    assert whole.status.status_code is StatusCode.ERROR
    assert whole.attributes["error.type"] == "InternalError"
    assert "secret" not in whole.to_json()
    assert found["POST"].attributes["http.route"] == "", "a path that anybody may make up is no name of a span"


def test_the_ranking_stage_alone_is_a_span_too_over_http_and_grpc(
    funnel: Funnel, spans: OpenTelemetry, exporter: InMemorySpanExporter
) -> None:
    grpc = pytest.importorskip("grpc")
    from tests.serve.test_open_inference_grpc import Stub, typed

    app = create_app(funnel, grpc=("127.0.0.1", 0), sight=Sight(spans=spans))
    with Client(app) as client:
        assert client.post("/v2/models/tiny/infer", json={"inputs": inputs()}, headers=CALLER).status_code == 200
        stub = Stub(app.state.grpc_port)
        channel = grpc.intercept_channel(stub.channel, _Says(grpc, (("traceparent", CALLER["traceparent"]),)))
        stub.channel = channel
        stub.ModelInfer(model_name="tiny", inputs=typed())
        with pytest.raises(grpc.RpcError):
            stub.ModelInfer(model_name="other", inputs=typed())
    spans.close()
    every = exporter.get_finished_spans()
    by_http = next(one for one in every if one.name == "POST /v2/models/{model}/infer")
    by_grpc, wrong = [one for one in every if one.name == "inference.GRPCInferenceService/ModelInfer"]
    for whole in (by_http, by_grpc):
        assert f"{whole.context.trace_id:032x}" == TRACE
        assert f"{whole.parent.span_id:016x}" == PARENT
        assert whole.attributes["prerank.version"] == funnel.version
        below = [one.name for one in every if one.parent and one.parent.span_id == whole.context.span_id]
        assert below == ["read_tensors", "rank", "write_tensors"]
    assert by_grpc.attributes["rpc.method"] == "ModelInfer"
    assert wrong.attributes["error.type"] == "NotFound"


def _Says(grpc, metadata: tuple):  # noqa: N802 - a class that needs the extra
    class Says(grpc.UnaryUnaryClientInterceptor):
        def intercept_unary_unary(self, call, details, request):
            return call(details._replace(metadata=metadata), request)

    return Says()


class Stuck(SpanExporter):
    """A collector that takes nothing until it is told to."""

    def __init__(self) -> None:
        self.may_go = threading.Event()

    def export(self, spans):
        self.may_go.wait(20)
        return SpanExportResult.FAILURE

    def shutdown(self) -> None:
        self.may_go.set()


def test_where_the_collector_is_slow_no_request_waits_and_what_is_too_much_is_dropped_whole_and_counted() -> None:
    stuck = Stuck()
    spans = OpenTelemetry(stuck, most=600)
    with Client(create_app(FakeFunnel(), sight=Sight(spans=spans))) as client:
        start = time.perf_counter()
        for _ in range(500):
            assert client.post("/v1/recommend", json=REAL).status_code == 200
        assert time.perf_counter() - start < 15, "20 s is what one batch takes"
        text = client.get("/metrics").text
        dropped = spans.counts()["dropped"]
        begun = time.perf_counter()
    assert time.perf_counter() - begun < 5, "it ends though the collector is stuck"
    assert 0 < dropped < 1500
    assert dropped % 3 == 0, "a request's spans, of which there are three here, go together"
    assert f'prerank_spans_total{{outcome="dropped"}} {float(dropped)}' in text
    until = time.monotonic() + 5
    while spans.counts()["failed"] < 512 and time.monotonic() < until:
        time.sleep(0.01)
    assert spans.counts()["failed"] >= 512
    assert spans.counts()["sent"] == 0


def test_spans_go_to_a_collector_over_otlp_as_the_standard_variables_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "ranker-of-tests")
    with collector() as (address, came):
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": address}
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
        spans = spans_of(None, environment)
        assert spans is not None
        with Client(create_app(FakeFunnel(), sight=Sight(spans=spans))) as client:
            client.post("/v1/recommend", json=REAL, headers=CALLER)
        spans.close()
    (resource,) = came[0].resource_spans
    assert {one.key: one.value.string_value for one in resource.resource.attributes}[
        "service.name"
    ] == "ranker-of-tests"
    names = {one.name: one for scope in resource.scope_spans for one in scope.spans}
    assert set(names) == {"POST /v1/recommend", "retrieve", "rank"}
    assert {one.trace_id.hex() for one in names.values()} == {TRACE}
    assert names["retrieve"].parent_span_id == names["POST /v1/recommend"].span_id
    assert spans.counts() == {"sent": 3, "failed": 0, "dropped": 0}


@pytest.mark.parametrize("is_there", [True, False])
def test_a_collector_that_takes_nothing_is_counted_and_said_and_holds_up_no_end(
    is_there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with collector(status=400) as (address, _), structlog.testing.capture_logs() as logs:
        address = address if is_there else "http://127.0.0.1:9"
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
        spans = spans_of(True, {"OTEL_EXPORTER_OTLP_ENDPOINT": address})
        assert spans is not None
        with Client(create_app(FakeFunnel(), sight=Sight(spans=spans))) as client:
            assert client.post("/v1/recommend", json=REAL).status_code == 200
            start = time.perf_counter()
        assert time.perf_counter() - start < 6, "the end waits for it no longer"
    assert spans.counts()["failed"] == 3
    assert {one["event"] for one in logs} == {"OpenTelemetry"}


@pytest.mark.parametrize(
    ("wanted", "environment", "is_on"),
    [
        (None, {}, False),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
        (None, {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4318/v1/traces"}, True),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_TRACES_EXPORTER": "none"}, False),
        (True, {}, True),
        (True, {"OTEL_SDK_DISABLED": "true"}, False),
        (False, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, False),
    ],
)
def test_it_is_on_where_it_is_said_or_an_endpoint_is_named(
    wanted: bool | None, environment: dict[str, str], is_on: bool
) -> None:
    spans = spans_of(wanted, environment)
    assert (spans is not None) == is_on
    if spans is not None:
        spans.close()


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "OTEL_EXPORTER_OTLP_PROTOCOL: expected http/protobuf, .* got 'grpc'"),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "c:4318"},
            "OTEL_EXPORTER_OTLP_ENDPOINT: expected a url such as http://l.*'c:4",
        ),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:port"}, "expected a url such as"),
        ({"OTEL_BSP_MAX_QUEUE_SIZE": "many"}, r"OTEL_\*: expected what OpenTelemetry takes: .*'many'"),
        ({"OTEL_BSP_MAX_QUEUE_SIZE": "5"}, r"OTEL_\*: expected what OpenTelemetry takes: max_export_batch_size"),
    ],
)
def test_variables_that_cannot_be_are_refused_at_once(environment: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        spans_of(True, environment)


def test_without_the_extra_it_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prerank.serve.open_telemetry", None)
    with pytest.raises(ConfigError, match=r"pip install 'prerank\[otel\]', or leave it off with --no-otel"):
        spans_of(True, {})
    assert spans_of(None, {}) is None


def test_where_it_is_off_nothing_of_it_is_imported() -> None:
    code = """
import sys
from prerank.serve.http import create_app
from prerank.serve.seeing import spans_of
from tests.serve.client import Client
from tests.serve.fake import FakeFunnel
assert spans_of(None, {}) is None and spans_of(False, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c"}) is None
with Client(create_app(FakeFunnel())) as client:
    assert client.post("/v1/recommend", json={"user_id": 1, "k": 1}).status_code == 200
    assert "prerank_spans" not in client.get("/metrics").text
assert not [name for name in sys.modules if name.startswith("opentelemetry")]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
