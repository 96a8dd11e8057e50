"""What a trace tells of stages and kernels: of one that is made up, with a GPU in it, and of the tiny world's."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from prerank.bundle.registry import Registry
from prerank.evaluate import profile as module
from prerank.evaluate.profile import OUTSIDE, Line, lines, profile_requests
from prerank.evaluate.trace import read_trace
from prerank.kernels.ranges import Done, Tally
from prerank.kernels.work import Work, floor_ms
from prerank.serve.asking import GoldenRequests, LoggedRequests
from prerank.serve.funnel import Funnel
from prerank.serve.profiling import REQUEST, Profiled
from tests.serve import world
from tests.serve.conftest import publish_live
from tests.serve.logs import log, read

CPU = {"copy_gb_s": 10.0, "bf16_matmul_gflop_s": 100.0, "fp32_matmul_gflop_s": 50.0}
CUDA = {"copy_gb_s": 1000.0, "bf16_matmul_gflop_s": 10_000.0, "fp32_matmul_gflop_s": 5_000.0}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose one version is live."""
    return publish_live(tmp_path_factory.mktemp("profile") / "tiny", world.config())


def event(cat: str, name: str, ts: float, dur: float, tid: int = 1, **args: object) -> dict[str, object]:
    return {"ph": "X", "cat": cat, "name": name, "pid": 1, "tid": tid, "ts": ts, "dur": dur, "args": args}


SHAPES = {"Input Dims": [[4], [2, 3], [3, 4]], "Input type": ["float", "float", "float"]}
EVENTS = [
    {"ph": "M", "name": "process_name", "pid": 1},
    event("user_annotation", REQUEST, 0, 1000),
    event("user_annotation", "rank", 100, 400),
    event("user_annotation", "graph", 150, 200),  # a kernel whose work is known
    event("cuda_runtime", "cudaGraphLaunch", 160, 20, correlation=7),
    event("cpu_op", "aten::linear", 400, 90),
    event("cpu_op", "aten::addmm", 410, 60, **SHAPES),
    event("cuda_runtime", "cudaLaunchKernel", 420, 10, correlation=8),
    event("user_annotation", "retrieve", 300, 300, tid=2),  # beside it, on another thread
    event("cpu_op", "aten::sum", 350, 100, tid=2),
    event("cpu_op", "aten::ones", 700, 50),
    event("kernel", "stack", 500, 300, tid=7, correlation=7),
    event("kernel", "top_k", 800, 100, tid=7, correlation=7),
    event("kernel", "gemm", 900, 40, tid=7, correlation=8),
    event("gpu_memcpy", "Memcpy HtoD", 950, 5, tid=7, correlation=99),
    event("gpu_user_annotation", "rank", 500, 445, tid=7),
]


def made(done: Done, served: Mapping[str, Sequence[float]]) -> Profiled:
    tally = Tally()
    tally.stages |= {REQUEST, "rank", "retrieve"}
    tally.done |= done
    return Profiled((0.5,), (1.0,), {name: tuple(ms) for name, ms in served.items()}, tally, 0)


def told(tmp_path: Path, events: Sequence[object], done: Done, name: str = "trace.json") -> dict[tuple[str, str], Line]:
    text = json.dumps({"traceEvents": events}).encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    found = made(done, {"rank": [0.25]})
    kernels = {kernel for _, kernel in done}
    said = lines(read_trace(tmp_path / name, found.tally.stages, kernels), found, {"cpu": CPU, "cuda": CUDA})
    return {(one.stage, one.kernel): one for one in said}


GRAPH: Done = {("rank", "graph"): (1, Work(flops=1_000_000_000, num_bytes=100_000_000))}


def test_time_is_told_by_stage_without_what_is_nested_and_outside_of_them(tmp_path: Path) -> None:
    found = told(tmp_path, EVENTS, GRAPH)
    rank = found["rank", ""]
    assert (rank.kind, rank.calls, rank.ms, rank.self_ms) == ("stage", 1.0, 0.4, pytest.approx(0.11))
    assert (rank.share, rank.served_ms) == (pytest.approx(0.4), 0.25)
    assert (found["retrieve", ""].ms, found["retrieve", ""].self_ms) == (0.3, pytest.approx(0.2))
    assert found["retrieve", ""].served_ms is None
    assert found["retrieve", "aten::sum"].self_ms == 0.1
    outside = found[OUTSIDE, ""]
    assert outside.ms == pytest.approx(0.5), "from 0 to 100 and from 600 to 1000: no thread ran a stage"
    assert (found[OUTSIDE, "aten::ones"].kind, found[OUTSIDE, "aten::ones"].self_ms) == ("torch", 0.05)
    assert found["rank", "aten::linear"].self_ms == pytest.approx(0.03)
    assert next(iter(found)) == (OUTSIDE, ""), "the longest first"
    assert [stage for stage, kernel in found if not kernel] == [OUTSIDE, "rank", "retrieve"]


def test_a_devices_kernels_belong_to_the_stage_that_launched_them(tmp_path: Path) -> None:
    found = told(tmp_path, EVENTS, GRAPH)
    assert {name for (stage, name), one in found.items() if one.kind == "device" and stage == "rank"} == {
        *("stack", "top_k", "gemm"),
    }
    assert (found["rank", "stack"].self_ms, found["rank", "stack"].share) == (0.3, pytest.approx(0.3))
    assert found[OUTSIDE, "Memcpy HtoD"].kind == "device", "nobody knows who asked for it"


def test_time_stands_beside_the_floor_of_where_it_ran(tmp_path: Path) -> None:
    """A graph's kernels, 0.4 ms, beside 0.1 ms of products and of bytes on the device; not beside its launch."""
    found = told(tmp_path, EVENTS, GRAPH)
    graph, product = found["rank", "graph"], found["rank", "aten::addmm"]
    assert (graph.kind, graph.ms, graph.self_ms) == ("native", 0.4, pytest.approx(0.18))
    assert (graph.floor_ms, graph.over_floor) == (pytest.approx(0.1), pytest.approx(4.0))
    work = Work(num_bytes=4 * (6 + 12 + 8), float32_flops=2 * 2 * 3 * 4)
    assert (product.ms, product.flops, product.num_bytes) == (0.04, 48, 104)
    assert product.floor_ms == pytest.approx(floor_ms(work, CUDA))
    assert found["rank", ""].floor_ms == pytest.approx(0.1 + floor_ms(work, CUDA))
    assert found["retrieve", ""].floor_ms is None
    without = [one for one in EVENTS if one.get("cat") != "kernel"]
    on_cpu = told(tmp_path, without, GRAPH)["rank", "graph"]
    assert (on_cpu.ms, on_cpu.floor_ms) == (0.2, pytest.approx(10.0)), "it ran on the processor"


def test_products_are_counted_once_by_shape_and_type_and_a_vector_is_a_matrix(tmp_path: Path) -> None:
    half = {"Input Dims": [[2, 3, 4], [2, 4, 5]], "Input type": ["c10::BFloat16", "c10::BFloat16"]}
    vector = {"Input Dims": [[6], [6, 4], [4]], "Input type": ["float"] * 3}
    whole = {"Input Dims": [[2, 3], [3, 4]], "Input type": ["long int", "long int"]}
    events = [
        event("user_annotation", REQUEST, 0, 1000),
        event("cpu_op", "aten::bmm", 1, 10, **half),
        event("cpu_op", "aten::mv", 20, 10, **{k: v[1:] for k, v in vector.items()}),
        event("cpu_op", "aten::addmv_", 22, 5, **vector),
        event("cpu_op", "aten::mm", 40, 10, **whole),
        event("cpu_op", "aten::addmm", 60, 10),
    ]
    found = told(tmp_path, events, {}, "trace.json.gz")
    assert (found[OUTSIDE, "aten::bmm"].flops, found[OUTSIDE, "aten::bmm"].num_bytes) == (240, 2 * (24 + 40 + 30))
    inner = found[OUTSIDE, "aten::addmv_"]
    assert (inner.flops, inner.num_bytes) == (48, 4 * (24 + 4 + 6))
    for name in ("aten::mv", "aten::mm", "aten::addmm"):
        assert (found[OUTSIDE, name].flops, found[OUTSIDE, name].floor_ms) == (0, None)


@pytest.mark.parametrize("workers", [0, 1])
def test_golden_requests_of_a_version_are_told_stage_by_stage(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(module, "ceilings", lambda device: CPU)
    said: list[str] = []
    with Funnel.open(store, workers=workers) as funnel:
        ranks_by = funnel.ranks_by
        asking = GoldenRequests(funnel, Registry(store).path(funnel.version))
        told = profile_requests(asking, 5, tmp_path / "trace.json", lambda what, *_: said.append(what))
    assert (told.num_requests, told.num_different, told.num_degraded) == (5, 2, 0)
    stages = {one.stage: one for one in told.lines if one.kind == "stage"}
    assert set(stages) == {"expand_user", "target", "retrieve", "prepare_user", "rank", "describe", OUTSIDE}
    assert all(one.calls == 1 and one.self_ms <= one.ms for one in stages.values())
    assert all(one.served_ms is not None for name, one in stages.items() if name != OUTSIDE)
    assert stages["rank"].floor_ms is not None
    kernels = {one.kernel for one in told.lines if one.stage == "rank" and one.kind == "native"}
    assert ("native program" in kernels) == (ranks_by != "torch")
    assert told.served_ms["p50"] > 0
    assert sum(one.self_ms for one in told.lines if one.kind != "stage") < told.profiled_ms["p99"] * 5
    names = {one["name"] for one in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert set(stages) - {OUTSIDE} < names
    assert REQUEST in names
    assert said[0] == "requests as served"
    assert said[-1] == "ceilings of this machine"


def test_requests_of_a_log_go_every_way_that_they_were_served(store: Path, tmp_path: Path) -> None:
    with Funnel.open(store) as funnel:
        log(funnel, tmp_path / "log")
        asking = LoggedRequests(funnel, iter(read(tmp_path / "log")), 3)
        told = profile_requests(asking, 4, tmp_path / "trace.json", is_measured=False)
    assert (told.num_requests, told.num_different, told.ceilings) == (4, 3, {})
    assert {one.stage for one in told.lines} >= {"expand_user", "target", "retrieve", "prepare_user", "rank"}
    assert all(one.floor_ms is None for one in told.lines), "nothing was measured"
    assert any(one.flops for one in told.lines)
