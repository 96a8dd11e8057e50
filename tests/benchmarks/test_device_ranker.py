"""The question about a GPU, asked of a CPU: it runs on a bare machine, and tells nothing where there is no GPU."""

import json
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from benchmarks import device_ranker, device_rows
from benchmarks.device_agreement import CAPTURED, OVERLAP, agreement
from benchmarks.device_ceilings import Roofline
from benchmarks.device_graphs import Captured
from benchmarks.device_ladder import Ladder, check_alike
from benchmarks.device_load import as_they_come, saturation
from benchmarks.device_ranker import SECTIONS, Section
from benchmarks.device_rows import Bench, Sizes
from benchmarks.device_world import Stage, World
from benchmarks.result import Hardware, Result, Row
from prerank.errors import DeviceFailed
from prerank.serve.device_streams import CpuDevice
from tests.conftest import ROOT
from tests.serve.late_device import LateDevice

OTHERS = [
    *("lmdb", "cachetools", "tensorboardX", "msgspec", "typer", "rich", "starlette", "uvicorn", "jinja2", "matplotlib"),
    *("prometheus_client", "structlog", "redis", "faiss", "grpc", "google", "opentelemetry", "scipy", "sklearn"),
    *("psutil", "hypothesis", "httpx", "onnxruntime", "pyroaring"),
]
"""What a machine lacks that has torch, numpy, pyarrow and safetensors alone."""
EVERYTHING = f"""
import json, sys
sys.modules.update(dict.fromkeys({OTHERS}))
from dataclasses import asdict
import torch
from benchmarks.device_ranker import measured
from benchmarks.device_rows import Sizes
from prerank.serve.device_streams import CpuDevice
torch.set_num_threads(1)
sizes = Sizes(items=1_500, small=1_050, large=1_200, calls=4, slow_calls=4, load_s=0.2)
found = measured(CpuDevice(), sizes, compiles=False)
print(json.dumps([[asdict(row) for row in found.rows], dict(found.config), dict(found.ceilings)]))
"""
AGREES = "target attention, 1,200 candidates: fused program"
BARS = {
    "target attention, 1,200 candidates: engine, one request at a time: p50 over the roofline": 1.5,
    "target attention, 1,200 candidates: engine, one request at a time: p90 over the roofline": 2,
    "target attention, 1,050 candidates: engine, one request at a time: p50 over the roofline": 2.5,
    "cross features, 1,200 candidates: naive over engine": 100,
    "target attention, 1,200 candidates: at 70 % of saturation, 2 workers, 1 in a batch: p90 over the roofline": 3,
    "target attention, 1,200 candidates: pairs a second, 2 workers, 1 in a batch": 1e8,
    "target attention, 1,050 candidates: throughput of one launch over four": 1.6,
    "target attention, 1,050 candidates: four in one launch over a request alone": 2,
    "retrieval, bfloat16, targeting, top 1,050, scan: the graph alone over the least": 2,
    "retrieval, int8, targeting, top 1,050, scan: the graph alone over the least": 2,
    "target attention, 1,050 candidates: targeting, retrieval, ranking and rules in one graph": 2,
    "target attention, 1,050 candidates: 1,000 items a second change: p99 over that where nothing changes": 1.1,
    "target attention, 1,050 candidates: versions are swapped: p99 over that where nothing changes": 1.1,
    "target attention, 1,050 candidates: versions are swapped: failed": 0,
    f"{AGREES}: overlap of float64's 1,000 winners, mean over requests": 0.99,
    f"{AGREES}: utility captured of float64's 1,000 winners, mean over requests": 0.999,
}
ROOFLINE = Roofline(copy_gb_s=4000.0, bf16_gflop_s=700_000.0, link_gb_s=50.0, launch_ms=0.01)


@pytest.fixture(scope="module")
def everything():
    """All sections on a CPU, in a process without other packages: rows, configuration, ceilings."""
    done = subprocess.run([sys.executable, "-c", EVERYTHING], cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    rows, config, ceilings = json.loads(done.stdout.splitlines()[-1])
    return [Row(**row) for row in rows], config, ceilings


def test_every_section_runs_where_there_are_few_packages_and_none_fails(everything):
    rows, config, ceilings = everything
    assert not [row for row in rows if "failed: " in row.name or "skipped" in row.name or "cannot" in row.name]
    took = [row.name for row in rows if row.name.endswith(": took")]
    assert took == ["cross features: stage: took", *(f"target attention: {name}: took" for name in SECTIONS)]
    result = Result(
        "device_ranker", "2026-01-05T10:00:00Z", "0", Hardware("Some", 2, 1.0), {}, config, ceilings, tuple(rows)
    )
    assert Result.from_json(result.to_json()) == result
    assert {name.removesuffix("_end") + "_start" for name in ceilings if name.endswith("_end")} < set(ceilings)


def test_every_bar_is_held_to_a_row(everything):
    found = {row.name: row for row in everything[0]}
    assert {name: found[name].bar for name in BARS} == BARS
    assert all(found[name].holds is not None for name in BARS)


def test_where_there_is_no_gpu_nothing_is_measured_and_nothing_written(tmp_path):
    command = [sys.executable, "-m", "benchmarks.device_ranker", "--results", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"CUDA_VISIBLE_DEVICES": ""})
    assert not done.returncode, done.stderr
    assert "no GPU here" in done.stderr
    result = Result.from_json(done.stdout.splitlines()[-1])
    assert [(row.name, row.value, row.holds) for row in result.rows] == [
        ("device_ranker (skipped: no GPU here)", None, None)
    ]
    assert (result.hardware.accelerator, dict(result.ceilings)) == ("", {})
    assert not list(tmp_path.iterdir())


def test_a_section_that_fails_is_a_row_and_what_does_not_fit_into_the_time_is_left_out_by_name():
    def fails(bench):
        yield Row.of("first", 1.0, "ms")
        raise RuntimeError("\nof memory\nnone is left")

    bench = SimpleNamespace()
    first, failed, took = device_ranker._section("a", Section(fails, 10), bench, 10.0)
    assert (first.name, first.value) == ("first", 1.0)
    assert (failed.name, failed.holds) == ("a (failed: RuntimeError: of memory)", False)
    assert took.name == "a: took"
    [left_out] = device_ranker._section("a", Section(fails, 10), bench, 9.0)
    assert left_out.name == "a (skipped: 9 s were left of 540, ask for it alone by --only)"


def test_all_sections_fit_into_the_time():
    kinds = [one.takes_s * (1 if one.once else 2) for one in SECTIONS.values()]
    assert sum(kinds) <= device_ranker.BUDGET_S < 600


def test_the_least_is_that_of_what_takes_longer_and_a_launch_and_in_turn_the_sum():
    assert ROOFLINE.least_ms(4e9, 1e9) == pytest.approx(1.01)
    assert ROOFLINE.least_ms(1e6, 7e11) == pytest.approx(1.01)
    assert ROOFLINE.in_turn_ms(4e9, 7e11, 5e7) == pytest.approx(1 + 1 + 1 + 0.01)


@pytest.fixture(scope="module")
def bench():
    with torch.inference_mode():
        return Bench("a", World.of(300, 0), CpuDevice(), Sizes(items=300), ROOFLINE)


def test_what_a_candidate_reads_is_every_table_of_the_ranker_and_of_the_rules(bench):
    # 256 numbers, an advertiser, three topics; row, item_id, on, pacing, bid, three codes
    assert bench.world.row_bytes(torch.bfloat16) == 2 * 256 + 4 + 3 * 2 + 8 + 8 + 1 + 4 + 4 + 3 * 4
    assert bench.world.row_bytes(torch.float32) == bench.world.row_bytes(torch.bfloat16) + 2 * 256
    assert bench.world.winner_bytes(10) == 10 * (8 + 8 + 4 + 4 * 2 + 1)
    flops = 100_000 * bench.world.flops
    assert bench.least_ms(100_000) == pytest.approx(flops / 700_000 / 1e6 + 0.01)


def test_requests_differ_in_user_and_candidates_and_are_the_same_again(bench):
    with torch.inference_mode():
        one, other, again = bench.world.asked(50, 1), bench.world.asked(50, 2), bench.world.asked(50, 1)
    assert torch.equal(one.rows, again.rows)
    assert not torch.equal(one.rows, other.rows)
    assert not torch.equal(one.user_side["x"], other.user_side["x"])
    assert len(set(one.rows[0].tolist())) == 50


def test_a_captured_graph_reads_what_it_is_given_and_waits_once():
    device = LateDevice(threading.RLock())
    graph = Captured(device, lambda given: {"twice": 2 * given["n"]}, {"n": torch.zeros(1, 3)})
    device.waits = 0
    for number in (1.0, 5.0):
        assert graph({"n": torch.full((1, 3), number)})["twice"].tolist() == [[2 * number] * 3]
    assert device.waits == 2


def test_a_rung_that_finds_others_is_another_computation():
    check_alike("a", list(range(95)), list(range(100)))
    with pytest.raises(RuntimeError, match="a: 50 % of its winners"):
        check_alike("a", list(range(50)), list(range(100)))


def test_agreement_is_what_share_of_the_best_is_found_and_what_they_are_worth():
    true = torch.arange(2_000).double()
    assert (agreement(true, true, OVERLAP), agreement(true, true, CAPTURED)) == (1.0, 1.0)
    mine = true.clone()
    mine[0] = 5_000.0  # found in place of the thousandth
    best = float(true[1_000:].sum())
    assert agreement(mine, true, OVERLAP) == pytest.approx(0.999)
    assert agreement(mine, true, CAPTURED) == pytest.approx((best - 1_000) / best)


class Version:
    """Answers after a while, or takes nothing new."""

    def __init__(self, takes_s=0.0, has_left=False):
        self.takes_s, self.has_left, self.asked = takes_s, has_left, 0

    def submit(self, user_side, candidates, k):
        if self.has_left:
            raise DeviceFailed("left")
        self.asked += 1
        time.sleep(self.takes_s)
        return Answered()


class Answered:
    def add_done_callback(self, call):
        call(self)

    def exception(self):
        return None


ONE = SimpleNamespace(user_side={}, candidates=None)


def test_a_request_that_could_not_be_sent_in_time_is_as_late_as_it_is():
    slow = Version(takes_s=0.02)
    came = as_they_come(lambda: slow, [ONE], 100.0, 0.3)
    assert not came.failed
    assert came.ms[-1] > 100  # twice as many come as are taken
    assert len(as_they_come(lambda: slow, [ONE], 100.0, 1e-9).ms) == 1, "so that there is a time to tell"


def test_of_a_version_that_left_in_between_the_next_one_is_asked_and_else_it_has_failed():
    gone, serving = Version(has_left=True), Version()
    order = iter([gone, serving, serving] + [serving] * 1000)
    came = as_they_come(partial(next, order), [ONE], 200.0, 0.1)
    assert (came.failed, serving.asked) == ([], len(came.ms))
    came = as_they_come(lambda: gone, [ONE], 200.0, 0.1)
    assert came.failed
    assert not came.ms


def test_a_bar_is_what_a_field_is_at_most_or_the_value_at_least():
    row = Row.timed("a", [1.0, 3.0])
    assert (row.within(2.0).holds, row.within(2.0, "p99_ms").holds, row.over(2.0).holds) == (True, False, True)
    assert replace(row, value=1.9).over(2.0).holds is False


def test_a_request_that_fails_ends_the_search_for_what_an_engine_can():
    failed: Future = Future()
    failed.set_exception(DeviceFailed("gone"))
    with pytest.raises(DeviceFailed, match="gone"):
        saturation(SimpleNamespace(submit=lambda *asked: failed), [ONE], 0.1, 2)


def test_a_rung_that_fails_is_a_row_and_the_others_go_on(bench):
    def fails(asked):
        raise RuntimeError("no matrix units")

    with torch.inference_mode():
        row = device_rows._tried(bench, 50, "a", fails, device_rows._Found({}, []))
    assert (row.name, row.holds) == ("a, 50 candidates: a (failed: RuntimeError: no matrix units)", False)


def test_what_cannot_be_captured_is_a_row_that_says_why(bench):
    def cannot():
        raise NotImplementedError("\n\n  a shape that depends on a value\nmore")

    device = bench.device
    with torch.inference_mode():
        stage = Stage(bench.world, device.where, torch.bfloat16)
        row = Ladder(bench.world, device)._captured("a graph", stage, cannot, bench.world.asked(9))
    assert row == Row("a graph (cannot run: NotImplementedError: a shape that depends on a value)")
