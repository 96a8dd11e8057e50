"""What does ranking 1K, 10K and 100K candidates of a million items cost on this processor?

A cross-feature ranker of about 1.9 MFLOP a candidate, target attention over 50 events and matches included, weights as
drawn. The native program beside what others make of the same weights: torch in float32 and bfloat16, torch.compile,
AOTInductor, ONNX Runtime; all called in turn. Then all of a request, and what resident items take. The ceiling is the
arithmetic over the rate of a bfloat16 product as large as a layer of the ranker's, measured before and after.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from time import perf_counter, sleep

import numpy as np
import torch

from benchmarks.machine import best_s, say, times_ms
from benchmarks.result import Row
from benchmarks.run import Measured, Options, run
from benchmarks.scorer_agreement import agreement_rows
from benchmarks.scorer_memory import memory_rows
from benchmarks.scorer_peers import Peers, best_rows
from benchmarks.scorer_whole import whole_rows
from benchmarks.scorer_world import SEED, Drawn, drawn_world
from prerank.bundle.executor import NativeRanker
from prerank.kernels.engine import Engine
from prerank.kernels.native import LEVELS, level
from prerank.types import Features

CANDIDATES = (1_000, 10_000, 100_000)
SLOW = 20_000  # of as many candidates or more, all but the native are called less often
BARS = {"eager float32": 1 / 7, "eager bfloat16": 1 / 2.5}
SETTLE_S = 0.02  # for which others' threads, and ours, look for more work before they sleep


@dataclass(frozen=True, slots=True)
class Sizes:
    """Items of the tables, and how often each version is called: slow ones, of many candidates, less often."""

    items: int = 1_000_000
    calls: int = 41
    slow_calls: int = 3


def measure(options: Options, ceilings: Mapping[str, float]) -> Measured:
    sizes = Sizes(items=50_000, calls=5, slow_calls=1) if options.quick else Sizes()
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(SEED)
        before = layer_rates(cores)
        say(f"scorer_cpu: {sizes.items:,} items")
        world = drawn_world(sizes.items)
        rows, config = _ranker_rows(world, sizes, cores, before, options.quick)
        rows += whole_rows(world, before[f"bf16_layer_gflop_s_{cores}_threads"], ceilings["copy_gb_s"], sizes.calls)
        after = layer_rates(cores)
    rows += memory_rows(sizes.items)
    if not options.quick:  # which trains a ranker
        rows += agreement_rows(options.data)
    ends = {
        f"{name}_{when}": rate for when, rates in (("start", before), ("end", after)) for name, rate in rates.items()
    }
    return Measured(rows, config, ends)


def layer_rates(cores: int) -> dict[str, float]:
    """GFLOP/s of bfloat16 products of the ranker's widest layer: on one thread and on all, the best of many."""
    width, found = 256, {}
    left, right = torch.randn(10_240, width).bfloat16(), torch.randn(width, width).bfloat16()
    for threads in dict.fromkeys((1, cores)):
        torch.set_num_threads(threads)
        seconds = best_s(partial(torch.matmul, left, right))
        found[f"bf16_layer_gflop_s_{threads}_threads"] = round(2 * left.numel() * width / seconds / 1e9, 1)
    return found


def _ranker_rows(
    world: Drawn, sizes: Sizes, cores: int, rates: Mapping[str, float], is_quick: bool
) -> tuple[list[Row], dict[str, object]]:
    ranker, item_side, user_side = world.ranker, world.item_side, world.ranker.user_side(world.user)
    program = ranker.program()
    rate = rates[f"bf16_layer_gflop_s_{cores}_threads"]
    rows: list[Row] = [Row.of("ranker: FLOP a candidate", program.flops, "FLOP")]
    engines = {threads: Engine(threads) for threads in dict.fromkeys((1, cores))}
    natives = {threads: NativeRanker(ranker, item_side, engine) for threads, engine in engines.items()}
    peers = Peers(ranker, user_side, item_side)
    medians: dict[tuple[str, int], float] = {}
    for num in CANDIDATES:
        chosen = torch.randint(sizes.items, (1, num))
        works: dict[str, Callable[[], object]] = {}
        for name, native in (("native", natives[cores]), ("native, one worker", natives[1])):
            works[name] = partial(native, user_side, chosen)
        say(f"scorer_cpu: compiling the peers for {num:,} candidates")
        for name, peer in peers.of(num, is_quick):
            if isinstance(peer, Row):
                rows.append(peer)
            else:
                works[name] = partial(peer, chosen)
        calls = {name: sizes.calls if num < SLOW or name.startswith("native") else sizes.slow_calls for name in works}
        times = _in_turn(works, calls)
        for name, spent in times.items():
            medians[name, num] = float(np.median(spent))
            rows.append(Row.timed(f"{name}, {num:,} candidates", spent, num))
        rows += [*_comparisons(times, num, program.flops, rate), *best_rows(medians, num)]
        say(f"scorer_cpu: {num:,} candidates done")
    rows.append(
        _bounded("native: 100,000 candidates over 10,000", medians["native", 100_000] / medians["native", 10_000], 10.5)
    )
    rows.append(_throughput(natives, user_side, sizes, cores))
    for other in LEVELS[: LEVELS.index(level())]:
        engine = Engine(cores, other)
        slower = NativeRanker(ranker, item_side, engine)
        chosen = torch.randint(sizes.items, (1, 1_000))
        rows.append(
            Row.timed(
                f"native at level {other}, 1,000 candidates", times_ms(partial(slower, user_side, chosen), 5), 1_000
            )
        )
        engine.close()
    for engine in engines.values():
        engine.close()
    return rows, {"items": sizes.items, "calls": sizes.calls, "level": level(), "workers": cores, "seed": SEED}


def _in_turn(works: Mapping[str, Callable[[], object]], calls: Mapping[str, int]) -> dict[str, list[float]]:
    """Milliseconds of each call; all that have calls left take turns, so that all see the same machine."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    for number in range(max(calls.values())):
        for name, work in works.items():
            if number < calls[name]:
                sleep(SETTLE_S)
                times[name] += times_ms(work, 1, warm_up=0)
    return times


def _comparisons(times: Mapping[str, Sequence[float]], num: int, flops: int, rate: float) -> Iterator[Row]:
    """The native program against the arithmetic's least and against each version of torch's."""
    spent = times["native"]
    median, least = float(np.median(spent)), num * flops / rate / 1e6
    p50 = Row.of(f"native, {num:,} candidates: over its arithmetic at the layer's rate", median / least, "times", num)
    p99 = Row.of(f"native, {num:,} candidates: p99 over p50", float(np.percentile(spent, 99)) / median, "times", num)
    yield _with_bar(p50, 1.15) if num == 10_000 else p50
    yield _with_bar(p99, 1.3) if num == 10_000 else p99
    for name, others in times.items():
        if name.startswith("native"):
            continue
        row = Row.of(f"native over {name}, {num:,} candidates", median / float(np.median(others)), "times", num, name)
        bar = BARS.get(name) if num == 10_000 else 1 / 15 if (name, num) == ("eager float32", 100_000) else None
        yield row if bar is None else _with_bar(row, bar)


def _with_bar(row: Row, at_most: float) -> Row:
    return _bounded(row.name, row.value or 0.0, at_most, row.n)


def _bounded(name: str, value: float, at_most: float, n: int | None = None) -> Row:
    row = Row.of(name, value, "times", n)
    return Row(row.name, row.n, value=row.value, unit=row.unit, bar=round(at_most, 4), holds=bool(value <= at_most))


def _throughput(natives: Mapping[int, NativeRanker], user_side: Features, sizes: Sizes, cores: int) -> Row:
    """Requests a second of 10,000 candidates, four asked at once, on all workers over on one."""
    asked = [torch.randint(sizes.items, (1, 10_000)) for _ in range(4)]
    rates: dict[int, float] = {}
    with ThreadPoolExecutor(len(asked)) as pool:
        for threads in (1, cores) * 3:
            started = perf_counter()
            for _ in range(max(1, sizes.calls // 10)):
                list(pool.map(partial(natives[threads], user_side), asked))
            rates[threads] = max(rates.get(threads, 0.0), 1 / (perf_counter() - started))
    ratio = rates[cores] / rates[1]
    row = Row.of(f"native: requests a second, {cores} workers over one", ratio, "times", 10_000)
    return Row(row.name, row.n, value=row.value, unit=row.unit, bar=1.85, holds=bool(ratio >= 1.85))


if __name__ == "__main__":
    run("scorer_cpu", __doc__, measure)
