"""The server as a user starts it: a process, a signal, and what it says when it cannot load."""

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from prerank.bundle.executor import NativeRanker
from prerank.bundle.registry import Registry
from prerank.bundle.shard import Place
from prerank.errors import BundleError, RegistryError
from prerank.kernels.native import level
from prerank.serve.funnel import Funnel
from prerank.serve.http import _why_not_ready, create_app, serve
from prerank.serve.index_flight import FlightServer
from prerank.serve.index_host import IndexHost
from prerank.serve.watch import VersionWatch
from prerank.stores.events import EventStore, LiveEvent
from prerank.stores.live import LiveUsers
from tests.serve import world
from tests.serve.client import Client
from tests.serve.conftest import publish_live
from tests.serve.world import UNTIL

BODY = {"user_id": 1, "k": 3, "context": {"hour": 1, "surface": "feed"}}


def test_a_funnel_over_http_answers_as_it_does_in_process(published: Path) -> None:
    with Funnel.open(published) as funnel, Client(create_app(funnel)) as client:
        answer = client.post("/v1/recommend", json=BODY).json()
        assert [stage["name"] for stage in answer["stages"]][-2:] == ["rank", "describe"]
        assert len(answer["winners"]) == 3
        assert answer["version"] == client.get("/readyz").json()["version"] == Registry(published).live()
        example = client.get("/openapi.json").json()["paths"]["/v1/recommend"]["post"]["requestBody"]
        body = example["content"]["application/json"]["example"]
        assert client.post("/v1/recommend", json={**body, "k": 5}).status_code == 200
        missing = client.post("/v1/recommend", json={**BODY, "context": {"hour": 1}})
        assert missing.status_code == 422
        assert missing.json()["error"]["message"].startswith("context.surface: missing")
        assert client.post("/v1/recommend", json={**BODY, "k": 1_000_000}).status_code == 422
        stranger = client.post("/v1/recommend", json={**BODY, "user_id": 404}).json()
        assert stranger["notes"] == ["unknown user 404: served as a new user"]


def test_a_damaged_version_is_said_in_one_line_and_not_ready(store: Path) -> None:
    scorer = Registry(store).path(str(Registry(store).live())) / "scorer.safetensors"
    scorer.write_bytes(scorer.read_bytes()[:-7])
    watch = VersionWatch.open(store)
    assert isinstance(watch.live.error, BundleError)
    said = _why_not_ready(watch.live.error)
    assert said.startswith("prerank serve: not ready: BundleError: ")
    assert "scorer.safetensors" in said
    assert "\n" not in said
    with contextlib.closing(watch), Client(create_app(watch.live)) as client:
        ready = client.get("/readyz")
        assert ready.status_code == 503
        assert "scorer.safetensors" in ready.json()["error"]["message"]
        assert client.post("/v1/recommend", json=BODY).status_code == 503


def test_where_nothing_is_live_the_server_does_not_start(store: Path) -> None:
    (store / "live").unlink()
    with pytest.raises(RegistryError, match="no version is live"):
        serve(store)


@contextmanager
def started(
    store: Path, before: str = "", more: str = "", after: str = ""
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A ready server of its own process, and its address; `before` makes what it is given `more`, `after` ends it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = "from pathlib import Path; from prerank.serve.http import serve; "
    program += f"{before or 'pass'}; serve(Path({str(store)!r}), port={port}, {more}); {after or 'pass'}"
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(600):
            try:
                if httpx.get(f"{address}/readyz").status_code == 200:
                    break
            except httpx.TransportError:
                assert process.poll() is None
                time.sleep(0.1)
        yield process, address
    finally:
        process.kill()
        process.communicate()


def test_the_server_starts_answers_and_ends_on_a_signal(published: Path) -> None:
    with started(published) as (process, address):
        assert len(httpx.post(f"{address}/v1/recommend", json=BODY).json()["winners"]) == 3
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=30)
    assert process.returncode in (0, -signal.SIGTERM)
    assert "Traceback" not in said
    assert address in said


def test_the_server_ranks_on_a_device_and_its_engine_ends_after_it(published: Path) -> None:
    before = "from prerank.serve.device import DeviceEngine; from prerank.serve.device_streams import CpuDevice; "
    before += "from prerank.serve.device_bundle import OnDevice; engine = DeviceEngine(CpuDevice(), 1)"
    with (
        started(published) as (_, without),
        started(published, before, "device=OnDevice(engine, None)", "engine.close()") as (
            process,
            address,
        ),
    ):
        body = BODY | {"deadline_ms": 60_000}
        expected, got = (httpx.post(f"{one}/v1/recommend", json=body).json() for one in (without, address))
        assert [one["item_id"] for one in got["winners"]] == [one["item_id"] for one in expected["winners"]]
        assert not got["degraded"]
        text = httpx.get(f"{address}/metrics").text
        assert 'prerank_ranks_by{level="cpu"} 1.0' in text
        assert 'prerank_device_restarts_total{device="cpu"} 0.0' in text
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert process.returncode in (0, -signal.SIGINT)
    assert "Traceback" not in said


def test_the_server_asks_index_hosts_and_ends_on_a_signal(tmp_path: Path) -> None:
    patient = publish_live(tmp_path / "tiny", world.config(serve={"hosts_ms": 20_000.0}))
    host = IndexHost(patient, Place(0, 1))
    host.follow()
    flight = FlightServer(host)
    try:
        with (
            started(patient) as (_, without),
            started(patient, more=f"index_hosts='0=127.0.0.1:{flight.port}'") as (process, address),
        ):
            body = BODY | {"deadline_ms": 60_000}
            expected, got = (httpx.post(f"{one}/v1/recommend", json=body).json() for one in (without, address))
            assert got["winners"] == expected["winners"]
            assert not got["degraded"]
            text = httpx.get(f"{address}/metrics").text
            assert 'prerank_index_shards_total{outcome="answered",shard="0"}' in text
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=30)
        assert process.returncode in (0, -signal.SIGTERM)
        assert "Traceback" not in said
    finally:
        flight.shutdown()


def test_a_server_that_runs_follows_a_promote_and_a_rollback(store: Path) -> None:
    first = str(Registry(store).live())
    second = str(Registry(publish_live(store, world.config(), seed=7)).live())
    Registry(store).rollback(first, "a test", "the first serves first")
    with started(store) as (process, address), httpx.Client(base_url=address) as http:
        assert http.get("/readyz").json()["version"] == first
        for move in (
            lambda: Registry(store).promote(second, "a test", ""),
            lambda: Registry(store).rollback(None, "a test", ""),
        ):
            move()
            wanted = Registry(store).live()
            until = time.monotonic() + 30
            while http.post("/v1/recommend", json=BODY).json()["version"] != wanted:
                assert time.monotonic() < until
                time.sleep(0.05)
            assert http.get("/readyz").json()["version"] == wanted
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=30)
    assert "Traceback" not in said
    assert said.count('"event": "another version serves"') == 2
    assert said.count('"event": "a version was let go"') == 2


def test_every_event_that_was_answered_outlives_a_server_that_is_killed(store: Path) -> None:
    with started(store) as (process, address):
        for n in range(30):
            event = {"user_id": 1, "item_id": 100, "event": "is_click", "time_ms": UNTIL + 1 + n}
            assert httpx.post(f"{address}/v1/events", json={"events": [event]}).status_code == 200
        process.kill()
        process.wait(timeout=30)
    with LiveUsers.open(store / "users.lmdb", store / "events.lmdb") as users:
        record = users.get(1)
    assert record is not None
    assert record.time_ms[-30:].tolist() == [UNTIL + 1 + n for n in range(30)]


def test_a_server_sweeps_what_its_log_has_when_it_starts(store: Path) -> None:
    (store / "events.lmdb").unlink(missing_ok=True)  # another test's, which may have been swept until then
    events = EventStore.open(store / "events.lmdb", ["impression"])
    events.append([LiveEvent(1, 100, "impression", UNTIL), LiveEvent(1, 101, "impression", UNTIL + 1)])
    with started(store):
        assert events.get(1)["item_id"].tolist() == [101]
    events.close()


def test_what_ranks_is_a_metric_and_no_workers_mean_torch(published: Path) -> None:
    for workers, expected in ((1, level()), (0, "torch")):
        with Funnel.open(published, workers=workers) as funnel, Client(create_app(funnel)) as client:
            assert funnel.ranks_by == expected
            assert f'prerank_ranks_by{{level="{expected}"}} 1.0' in client.get("/metrics").text
            assert client.post("/v1/recommend", json=BODY).status_code == 200


@pytest.mark.skipif(level() == "torch", reason="no native kernels")
def test_native_kernels_that_are_far_off_do_not_serve(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = NativeRanker.__call__
    monkeypatch.setattr(NativeRanker, "__call__", lambda self, user, rows: right(self, user, rows) + 1)
    with pytest.raises(BundleError, match=r"the native kernels .* are far off: golden request 0: expected item"):
        Funnel.open(published, workers=1)
    with Funnel.open(published, workers=0) as funnel:
        assert funnel.ranks_by == "torch"
