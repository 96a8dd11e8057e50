"""`prerank serve` as a user starts it: what its options for seeing inside do, and what it says to wrong ones."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.cli.test_cli import run, run_alone
from tests.processes import Command
from tests.serve import world
from tests.serve.conftest import publish_live

BODY = {"user_id": 1, "k": 3, "context": {"hour": 1, "surface": "feed"}, "deadline_ms": 30_000}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one funnel, whose version is live."""
    return publish_live(tmp_path_factory.mktemp("serve") / "tiny", world.config()).parent


@contextmanager
def serving(store: Path, *options: object, **environment: str) -> Iterator[tuple[httpx.Client, list[Mapping]]]:
    """A client of a server of its own process; when this ends, what the server wrote on stderr as JSON."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = Command("serve", "--store", store, "--port", port, "--workers", 0, *options, env=environment)
    lines: list[Mapping] = []
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            until = time.monotonic() + 90
            while True:
                assert process.poll() is None, process.communicate(60)[1]
                assert time.monotonic() < until
                try:
                    if http.get("/readyz").status_code == 200:
                        break
                except httpx.TransportError:
                    time.sleep(0.05)
            yield http, lines
    finally:
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=60)
    assert "Traceback" not in told
    lines += [json.loads(line) for line in told.splitlines() if line.startswith("{")]


def test_so_many_requests_are_kept_and_such_a_share_has_a_line(store: Path) -> None:
    with serving(store, "--traces", 2, "--lines", 1) as (http, lines):
        for request_id in ("a", "b", "c"):
            assert http.post("/v1/recommend", json=BODY, headers={"x-request-id": request_id}).status_code == 200
        listed = http.get("/v1/traces").json()
    assert listed["kept"] == 2
    assert [one["request_id"] for one in listed["traces"]] == ["c", "b"]
    told = [line for line in lines if line["event"] == "request"]
    assert [(line["request_id"], line["status"], line["level"]) for line in told] == [
        (request_id, 200, "info") for request_id in ("a", "b", "c")
    ]
    assert all("trace_id" not in line for line in told), "OpenTelemetry is off"


def test_nothing_is_kept_or_written_where_that_is_said_and_names_are_those_that_are_allowed(store: Path) -> None:
    with serving(store, "--traces", 0, "--allow-host", "ranker.example", "--allow-host", "other") as (http, lines):
        for host, status in (("ranker.example", 200), ("other", 200), ("evil.example", 403)):
            assert http.get("/v1/traces", headers={"host": host}).status_code == status
        http.post("/v1/recommend", json=BODY, headers={"x-request-id": "a"})
        assert http.get("/v1/traces").json() == {"kept": 0, "traces": []}
        assert "none are kept: --traces is 0" in http.get("/v1/trace/a").text
    assert not [line for line in lines if line["event"] == "request"]


def test_spans_go_where_the_environment_says_and_what_waits_is_sent_at_the_end(store: Path) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs the extra")
    from tests.serve.collector import collector

    with (
        collector() as (address, came),
        serving(store, "--lines", 1, OTEL_EXPORTER_OTLP_ENDPOINT=address) as (http, lines),
    ):
        answer = http.post("/v1/recommend", json=BODY).json()
    spans = [
        span for call in came for part in call.resource_spans for scope in part.scope_spans for span in scope.spans
    ]
    assert {span.name for span in spans} == {"POST /v1/recommend", *(stage["name"] for stage in answer["stages"])}
    (line,) = [line for line in lines if line["event"] != "another version serves"]
    assert {span.trace_id.hex() for span in spans} == {line["trace_id"]}


def test_options_that_cannot_be_are_one_line(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Invalid value for '--lines'" in run("serve", "--store", store, "--lines", 2, code=2)
    assert "Invalid value for '--traces'" in run("serve", "--store", store, "--traces", -1, code=2)
    assert "error: --allow-host 'a:1': expected a name" in run("serve", "--store", store, "--allow-host", "a:1", code=1)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    said = run_alone("serve", "--store", store, "--otel", code=1)
    assert said.startswith("error: OTEL_EXPORTER_OTLP_PROTOCOL: expected http/protobuf")
    assert len(said.strip().splitlines()) == 1


def test_a_device_that_is_not_there_is_one_line(store: Path, tmp_path: Path) -> None:
    for name, said in (
        ("cuda", "error: device cuda: "),
        ("cuda:3", "error: device cuda"),
        ("gpu", "error: --device 'gpu': expected cuda, or cuda:N with the number of the device"),
        ("cuda:x", "error: --device 'cuda:x': expected cuda"),
        ("cuda:", "error: --device 'cuda:': expected cuda"),
    ):
        told = run("serve", "--store", store, "--device", name, code=1, env={"CUDA_VISIBLE_DEVICES": ""})
        assert told.startswith(said)
        assert len(told.strip().splitlines()) == 1
    for command in (("recommend", "--user", 1), ("profile", "--out", tmp_path / "trace.json")):
        told = run(*command, "--store", store, "--device", "cuda", code=1, env={"CUDA_VISIBLE_DEVICES": ""})
        assert told.startswith("error: device cuda: ")
    assert "Invalid value for '--device-dtype'" in run(
        "serve", "--store", store, "--device", "cuda", "--device-dtype", "int8", code=2
    )
    assert "Invalid value for '--device-workers'" in run("serve", "--store", store, "--device-workers", 0, code=2)
