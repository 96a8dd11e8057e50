"""Ranges are seen by who profiles, on every thread, and are nothing where nobody does."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile

from prerank.kernels import native, ranges
from prerank.kernels.engine import Engine, NativeProgram
from prerank.kernels.greedy import greedy_top_k
from prerank.kernels.ranges import counting, kernel, stage
from prerank.kernels.scan import scan_top_k
from prerank.kernels.work import Work, floor_ms, program_work
from tests.kernels.programs import made_items, made_program, made_user

CEILINGS = {"copy_gb_s": 10.0, "bf16_matmul_gflop_s": 100.0, "fp32_matmul_gflop_s": 50.0}


def profiler() -> profile:
    threads = _ExperimentalConfig(profile_all_threads=True)
    return profile(activities=[ProfilerActivity.CPU], experimental_config=threads)


@pytest.fixture
def nvtx(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A machine with a GPU, and what its NVTX is told."""
    told: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", told.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: told.append("<"))
    for name in (ranges.NVTX, *ranges._TOOLS):
        monkeypatch.delenv(name, raising=False)
    ranges._has_nvtx.cache_clear()
    yield told
    ranges._has_nvtx.cache_clear()


def never() -> Work:
    raise AssertionError("nobody counts")


def test_where_nobody_profiles_a_range_is_nothing_and_work_is_not_asked() -> None:
    assert stage("rank") is stage("retrieve") is kernel("scan", never)
    with counting() as tally, stage("rank"), kernel("scan", never):
        pass
    assert (tally.stages, tally.done) == (set(), {})


def test_a_profiler_sees_the_ranges_of_every_thread_by_their_names() -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()  # the thread is there before the profiler

        def work(name: str) -> None:
            with stage(name), kernel(f"kernel of {name}", Work):
                torch.ones(2).sum()

        with profiler() as seen:
            work("here")
            pool.submit(work, "there").result()
    names = {one.name for one in seen.events()}
    assert {"here", "there", "kernel of here", "kernel of there", "aten::sum"} <= names


def test_what_kernels_did_is_counted_by_stage() -> None:
    with profiler(), counting() as tally:
        with stage("rank"):
            for num in (1, 2):
                with kernel("scan", lambda num=num: Work(num_bytes=num)):
                    pass
            with stage("inner"), kernel("scan", lambda: Work(flops=5)):
                pass
            with pytest.raises(ValueError, match="broken"), kernel("scan", never):
                raise ValueError("broken")
        with kernel("scan", lambda: Work(float32_flops=7)):
            pass
    assert tally.stages == {"rank", "inner"}
    assert tally.done == {
        ("rank", "scan"): (2, Work(num_bytes=3)),
        ("inner", "scan"): (1, Work(flops=5)),
        ("", "scan"): (1, Work(float32_flops=7)),
    }


@pytest.mark.parametrize("tool", [*ranges._TOOLS, ranges.NVTX])
def test_a_tool_of_nvidias_gets_the_ranges_where_there_is_a_gpu(
    nvtx: list[str], monkeypatch: pytest.MonkeyPatch, tool: str
) -> None:
    monkeypatch.setenv(tool, "1")
    with stage("rank"), kernel("scan", never):
        pass
    assert nvtx == ["rank", "scan", "<", "<"]


def test_without_a_tool_or_a_gpu_nvtx_is_told_nothing(nvtx: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with stage("rank"):
        pass
    monkeypatch.setenv(ranges._TOOLS[0], "/a/tool.so")
    monkeypatch.setenv(ranges.NVTX, "0")
    ranges._has_nvtx.cache_clear()
    with stage("rank"):
        pass
    monkeypatch.delenv(ranges.NVTX)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ranges._has_nvtx.cache_clear()
    with stage("rank"):
        pass
    assert nvtx == []


def test_the_floor_is_the_longer_of_bytes_and_products() -> None:
    assert floor_ms(Work(num_bytes=20_000_000), CEILINGS) == pytest.approx(2.0)
    assert floor_ms(Work(flops=400_000_000, float32_flops=50_000_000), CEILINGS) == pytest.approx(5.0)
    assert floor_ms(Work(400_000_000, 20_000_000, 50_000_000), CEILINGS) == pytest.approx(5.0)
    slow = {**CEILINGS, "bf16_matmul_gflop_s": 25.0}
    assert floor_ms(Work(flops=100_000_000), slow) == pytest.approx(2.0), "multiplied as float32"


def test_a_program_does_the_products_of_its_candidates_and_reads_each_row_and_weight_once() -> None:
    width, hidden, experts, dim, tasks, length = 8, 4, 2, 3, 2, 5
    program = made_program(width, hidden, experts, dim, tasks)
    met = width + 2 * dim + 2 + 2
    weights = width * met + experts * (width * width + 2 * 3 * width) + hidden * width + experts * hidden
    weights += tasks * (hidden * width + hidden)
    of_user = 2 * 2 * length * dim + tasks * width  # attention's keys and values, and dots
    work = program_work(program, row_bytes=100, num=7)
    assert work == Work(7 * 2 * (weights + of_user), 7 * (100 + 8 + 4 * tasks) + 2 * weights)


@pytest.mark.skipif(native.library() is None, reason="needs the native kernels")
def test_native_kernels_say_what_they_did() -> None:
    program, items, user = made_program(8, 4, 2, 3), made_items(50, 8, 3), made_user(8, 3)
    engine = Engine(1)
    ran = NativeProgram(program, items, engine)
    vectors, query = torch.ones(20, 4, dtype=torch.bfloat16), torch.ones(1, 4)
    none = torch.zeros(1, 0, 9, dtype=torch.int32), torch.zeros(0, dtype=torch.int64)
    with profiler(), counting() as tally:
        ran(user, torch.arange(30))
        scan_top_k(vectors, None, query, 3, torch.arange(5))
        scan_top_k(vectors, None, query, 3, torch.arange(20) < 6)
        greedy_top_k(torch.ones(1, 9), torch.arange(9)[None], torch.ones(1, 9, dtype=torch.bool), *none, 2)
    engine.close()
    # x is kept as float32 too, for steps that need it in full; q as bfloat16; a code of a byte, a bag of three shorts
    x_bytes = 4 if any(table.bytes == 4 for table in ran._tables) else 2
    assert tally.done == {
        ("", "native program"): (1, program_work(program, 8 * x_bytes + 6 * 2 + 1 + 3 * 2, 30)),
        ("", "native scan"): (
            2,
            Work(num_bytes=5 * 8 + 5 * 8 + 3 * 12, float32_flops=2 * 5 * 4)
            + Work(num_bytes=6 * 8 + 20 + 3 * 12, float32_flops=2 * 6 * 4),
        ),
        ("", "native greedy"): (1, Work(num_bytes=9 * 13 + 2 * 8)),
    }
