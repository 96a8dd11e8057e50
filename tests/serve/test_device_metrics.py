"""What a device engine counts is at /metrics, as counters and gauges, and by the device's name."""

import re
import threading
from dataclasses import fields

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from prerank.serve.device import DeviceEngine
from prerank.serve.device_buckets import Buckets
from prerank.serve.device_bundle import OnDevice
from prerank.serve.device_counts import Snapshot
from prerank.serve.device_metrics import DeviceMetrics
from prerank.serve.device_streams import CpuDevice
from prerank.serve.funnel import Funnel
from prerank.serve.http import create_app
from tests.serve.client import Client
from tests.serve.late_device import LateDevice

BODY = {"user_id": 1, "k": 3, "context": {"hour": 1, "surface": "feed"}, "deadline_ms": 60_000}


def told(client) -> dict[str, dict[tuple[str, ...], float]]:
    """By family, each value by its labels in the order of their names; counters as prometheus names their samples."""
    found = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            if sample.name.startswith("prerank_device_"):
                assert (family.type == "counter") == sample.name.endswith("_total")
                found.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
    return found


def test_the_metrics_are_what_the_engine_counts(published):
    with DeviceEngine(CpuDevice("one"), 1, wait_ms=0) as engine:
        place = OnDevice(engine, None, Buckets((4, 16), 64, 4))
        with (
            Funnel.open(published, workers=0, device=place) as funnel,
            Client(create_app(funnel, device=place)) as client,
        ):
            before = told(client)["prerank_device_requests_total"]["one",]
            for _ in range(3):
                assert client.post("/v1/recommend", json=BODY).status_code == 200
            found, counts = told(client), engine.snapshot()
    assert found["prerank_device_requests_total"] == {("one",): before + 3} == {("one",): counts.requests}
    for name, field in [
        ("batches_total", "batches"),
        ("candidates_total", "candidates"),
        ("padding_total", "padding"),
        ("cut_requests_total", "cut"),
        ("refused_total", "refused"),
        ("fallbacks_total", "fallbacks"),
        ("eager_launches_total", "eager"),
        ("restarts_total", "restarts"),
        ("waiting", "waiting"),
    ]:
        assert found[f"prerank_device_{name}"] == {("one",): getattr(counts, field)}
    assert found["prerank_device_bytes"] == {
        ("one", "graphs"): 0,
        ("one", "tables"): counts.table_bytes,
        ("one", "buffers"): counts.buffer_bytes,
    }
    assert counts.table_bytes > 0
    assert counts.padding > 0


def test_what_fails_is_counted_where_it_fails(published):
    device = LateDevice(threading.RLock())
    device.capture_error = RuntimeError("operation not permitted when stream is capturing")
    with DeviceEngine(device, 1, wait_ms=0) as engine:
        place = OnDevice(engine, torch.float32, Buckets((16,), 16, 1))
        with (
            Funnel.open(published, workers=0, device=place) as funnel,
            Client(create_app(funnel, device=place)) as client,
        ):
            assert client.post("/v1/recommend", json=BODY).status_code == 200
            found, counts = told(client), engine.snapshot()
    assert found["prerank_device_graph_failures_total"] == {("capture", "late"): 2, ("replay", "late"): 0}
    assert found["prerank_device_eager_launches_total"] == {("late",): counts.eager}
    assert counts.eager > 0


def test_without_a_device_there_is_nothing_of_one(published):
    with Funnel.open(published, workers=0) as funnel, Client(create_app(funnel)) as client:
        assert told(client) == {}


def test_every_count_of_an_engine_is_a_metric(monkeypatch):
    with DeviceEngine(CpuDevice(), 1) as engine:
        numbers = [one.name for one in fields(Snapshot) if one.name != "sizes"]
        # each with a value of its own, so that none stands for another
        counts = Snapshot(**{name: number + 1 for number, name in enumerate(numbers)})
        monkeypatch.setattr(engine, "snapshots", lambda: {"cpu": counts})
        values = [sample.value for family in DeviceMetrics(engine).collect() for sample in family.samples]
    assert sorted(values) == [number + 1 for number in range(len(numbers))]


@pytest.mark.parametrize("page", ["device.md"])
def test_every_metric_of_a_device_is_in_the_docs(page, request):
    text = (request.config.rootpath / "docs" / page).read_text()
    with DeviceEngine(CpuDevice(), 1) as engine:
        names = {family.name + "_total" * (family.type == "counter") for family in DeviceMetrics(engine).collect()}
    assert names == set(re.findall(r"prerank_device_[a-z_]+", text))
