"""What a device makes of the stage of ranking: alone, under load, in company, while items and versions change."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from benchmarks.device_ceilings import Roofline
from benchmarks.device_graphs import Captured, joined, made
from benchmarks.device_ladder import (
    COMPILED,
    FUSED,
    NAIVE,
    SLOW,
    Answer,
    Ladder,
    captured,
    check_alike,
    first_line,
    given,
    told,
)
from benchmarks.device_load import Came, Engines, as_they_come, asked_once, changing, saturation
from benchmarks.device_world import Asked, Stage, World
from benchmarks.machine import say, times_ms
from benchmarks.result import Row
from prerank.serve.device_streams import Device
from prerank.serve.device_version import DeviceVersion

ENGINE = "engine, one request at a time"
BATCH = 4
_REQUESTS = 4  # different ones, in turn


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured: items, candidates of a small request and a large one, calls, seconds under a load."""

    items: int = 1_000_000
    small: int = 10_000
    large: int = 100_000
    calls: int = 200
    slow_calls: int = 15
    load_s: float = 4.0


@dataclass(frozen=True, slots=True)
class Bench:
    """A world on a device, with the ceilings of both."""

    name: str
    world: World
    device: Device
    sizes: Sizes
    roofline: Roofline
    compiles: bool = True

    def least_ms(self, num: int, requests: int = 1) -> float:
        """The roofline of so many candidates: tables read and winners written, the ranker's arithmetic, a launch."""
        return self.roofline.least_ms(self.num_bytes(num, requests), requests * num * self.world.flops)

    def in_turn_ms(self, num: int) -> float:
        """The same without overlap, and with the candidates' rows on the link."""
        return self.roofline.in_turn_ms(self.num_bytes(num), num * self.world.flops, 9 * num)

    def asked(self, num: int) -> list[Asked]:
        """A few requests."""
        return [self.world.asked(num, seed) for seed in range(_REQUESTS)]

    def called(self, what: str, num: int) -> str:
        """The name of a row."""
        return f"{self.name}, {num:,} candidates: {what}"

    def num_bytes(self, num: int, requests: int = 1) -> int:
        """What is read of tables and written of winners."""
        return requests * (num * self.world.row_bytes(torch.bfloat16) + self.world.winner_bytes())


@dataclass(frozen=True, slots=True)
class _Found:
    """Of requests of one size: milliseconds by rung, and the rows that win each."""

    medians: dict[str, float]
    wanted: list[list[int]]


def stage_rows(bench: Bench) -> Iterator[Row]:
    """The ladder from the straightforward way to what is served, one request at a time."""
    yield Row.of(f"{bench.name}: FLOP a candidate", bench.world.flops, "FLOP")
    sizes = bench.sizes
    found = {num: _Found({}, []) for num in (sizes.small, sizes.large)}
    for num, one in found.items():
        yield Row.of(bench.called("roofline", num), bench.least_ms(num), "ms", num)
        yield Row.of(bench.called("roofline, nothing overlaps, with the link", num), bench.in_turn_ms(num), "ms", num)
        ladder = Ladder(bench.world, bench.device, bench.compiles)
        for name, rung in ladder.rungs(bench.asked(num)[0]):
            yield Row(bench.called(rung.name, num)) if isinstance(rung, Row) else _tried(bench, num, name, rung, one)
    # alone there is nobody to wait for
    with Engines((sizes.small, sizes.large), workers=1, wait_ms=0).begun(bench.device, bench.world) as (_, version):
        for num, one in found.items():
            row = _rung(bench, num, ENGINE, partial(_by_engine, version), one)
            yield row
            yield from _bars(bench, num, row)
            yield from _ratios(bench, num, one.medians)


def _tried(bench: Bench, num: int, name: str, rung: Answer, found: _Found) -> Row:
    """The row of a rung, or the one that says how it failed; the others go on."""
    try:
        return _rung(bench, num, name, rung, found)
    except Exception as error:
        what = bench.called(f"{name} (failed: {type(error).__name__}: {first_line(error)})", num)
        return Row(what, holds=False)


def _rung(bench: Bench, num: int, name: str, rung: Answer, found: _Found) -> Row:
    requests = bench.asked(num)
    mine = [list(rung(one)) for one in requests]
    found.wanted.extend([] if found.wanted else mine)
    for own, theirs in zip(mine, found.wanted, strict=True):
        check_alike(name, own, theirs)
    calls = bench.sizes.slow_calls if name in SLOW else bench.sizes.calls
    spent = _times(rung, requests, calls)
    found.medians[name] = float(np.median(spent))
    return Row.timed(bench.called(name, num), spent, num, NAIVE, found.medians[name] / found.medians[NAIVE])


def _bars(bench: Bench, num: int, row: Row) -> Iterator[Row]:
    """p50 and p90 over the roofline."""
    assert row.p50_ms is not None
    assert row.p90_ms is not None
    is_large, least = num == bench.sizes.large, bench.least_ms(num)
    p50 = Row.of(bench.called(f"{ENGINE}: p50 over the roofline", num), row.p50_ms / least, "times", num)
    yield p50.within(1.5 if is_large else 2.5)
    p90 = Row.of(bench.called(f"{ENGINE}: p90 over the roofline", num), row.p90_ms / least, "times", num)
    yield p90.within(2.0) if is_large else p90


def _ratios(bench: Bench, num: int, medians: Mapping[str, float]) -> Iterator[Row]:
    is_large, ours = num == bench.sizes.large, medians[ENGINE]
    faster = Row.of(bench.called("naive over engine", num), medians[NAIVE] / ours, "times", num)
    yield faster.over(100) if is_large else faster
    if {COMPILED, FUSED} <= medians.keys():
        name = bench.called(f"{COMPILED} over {FUSED}", num)
        yield Row.of(name, medians[COMPILED] / medians[FUSED], "times", num).over(2 if is_large else 3)


def load_rows(bench: Bench) -> Iterator[Row]:
    """As many requests as can be, then as they come, at 70 % of that; with one worker and two, alone and in company."""
    sizes, best = bench.sizes, dict[tuple[int, int], float]()
    for num, most in ((sizes.large, 1), (sizes.small, 1), (sizes.small, BATCH)):
        requests, rates = bench.asked(num), dict[int, float]()
        for workers in (1, 2):
            how = f"{workers} worker{'s' * (workers > 1)}, {most} in a batch"
            with Engines((num,), workers, most=most).begun(bench.device, bench.world) as (_, version):
                at_once = 2 * workers * most
                saturation(version, requests, sizes.load_s / 10, at_once)
                rates[workers] = saturation(version, requests, sizes.load_s / 2, at_once)
                row = Row.of(bench.called(f"pairs a second, {how}", num), rates[workers] * num, "pairs/s", num)
                yield row.over(1e8) if workers == 2 and num == sizes.large else row
                if workers == 1:
                    continue
                came = as_they_come(lambda v=version: v, requests, 0.7 * rates[2], sizes.load_s)  # type: ignore[misc]
                yield from _came_rows(bench, num, f"at 70 % of saturation, {how}", came)
        name = bench.called(f"two workers over one, {most} in a batch", num)
        yield Row.of(name, rates[2] / rates[1], "times", num)
        best[num, most] = rates[2]
    company = best[sizes.small, BATCH] / best[sizes.small, 1]
    yield Row.of(
        bench.called(f"{BATCH} in a batch over each alone, 2 workers", sizes.small), company, "times", sizes.small
    )


def _came_rows(bench: Bench, num: int, how: str, came: Came) -> Iterator[Row]:
    row = Row.timed(bench.called(how, num), came.ms, num)
    yield row
    assert row.p90_ms is not None
    over = Row.of(bench.called(f"{how}: p90 over the roofline", num), row.p90_ms / bench.least_ms(num), "times", num)
    yield over.within(3)
    yield Row.of(bench.called(f"{how}: failed", num), len(came.failed), "requests", num).within(0)


def batch_rows(bench: Bench) -> Iterator[Row]:
    """Four small requests in one launch, and in four."""
    num = bench.sizes.small
    stage = made(bench.device, lambda: Stage(bench.world, bench.device.where, torch.bfloat16))
    requests = [given(stage, one) for one in bench.asked(num)]
    fused, batch = made(bench.device, stage.fused), joined(requests[:BATCH])
    one, four = (captured(bench.device, stage, fused, like) for like in (requests[0], batch))
    _check_batch(one, four, requests[:BATCH], batch)

    def in_four() -> None:
        for each in requests[:BATCH]:
            one(each)

    alone = times_ms(partial(one, requests[0]), bench.sizes.calls)
    apart = times_ms(in_four, bench.sizes.calls)
    together = times_ms(partial(four, batch), bench.sizes.calls)
    yield Row.timed(bench.called("a request alone", num), alone, num)
    yield Row.timed(bench.called("four requests in four launches", num), apart, num)
    yield Row.timed(bench.called("four requests in one launch", num), together, num)
    won = float(np.median(apart) / np.median(together))
    yield Row.of(bench.called("throughput of one launch over four", num), won, "times", num).over(1.6)
    later = float(np.median(together) / np.median(alone))
    yield Row.of(bench.called("four in one launch over a request alone", num), later, "times", num).within(2)


def _check_batch(one: Captured, four: Captured, parts: Sequence[Mapping[str, torch.Tensor]], batch: object) -> None:
    apart = [told(found["rows"], found["valid"]) for found in map(_kept, map(one, parts))]
    assert isinstance(batch, Mapping)
    together = _kept(four(batch))
    for number, wanted in enumerate(apart):
        own = slice(number, number + 1)
        check_alike("four in one launch", told(together["rows"][own], together["valid"][own]), wanted)


def _kept(found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: one.clone() for name, one in found.items()}


def change_rows(bench: Bench) -> Iterator[Row]:
    """Small requests at half of what the engine can, while nothing changes, while items do, while versions do."""
    num, sizes, requests = bench.sizes.small, bench.sizes, bench.asked(bench.sizes.small)
    engines = Engines((num,), workers=2, most=BATCH)
    with engines.begun(bench.device, bench.world) as (engine, first):
        serving = [first]
        rate = saturation(first, requests, sizes.load_s / 2, 4 * BATCH) / 2

        def load() -> Came:
            return as_they_come(lambda: serving[-1], requests, rate, 2 * sizes.load_s)

        quiet = load()
        with changing(bench.world, lambda: serving[-1]) as counts:
            upserts = load()
        say(f"{bench.name}: {counts[0] / sizes.load_s / 2:.0f} items a second changed")
        swapped = _while(load, lambda: _swap(engines.load(engine, bench.world), serving))
        calm = load()
    base = float(np.percentile([*quiet.ms, *calm.ms], 99))
    yield Row.timed(bench.called("at half of saturation, nothing changes", num), [*quiet.ms, *calm.ms], num)
    done = float(counts[0] / sizes.load_s / 2)
    yield Row.of(bench.called("items that changed", num), done, "items/s", num)
    for what, came in (("1,000 items a second change", upserts), ("versions are swapped", swapped)):
        row = Row.timed(bench.called(f"at half of saturation, {what}", num), came.ms, num)
        yield row
        assert row.p99_ms is not None
        over = Row.of(bench.called(f"{what}: p99 over that where nothing changes", num), row.p99_ms / base, "times")
        yield over.within(1.1)
        yield Row.of(bench.called(f"{what}: failed", num), len(came.failed), "requests", num).within(0)


def _while(load: Callable[[], Came], change: Callable[[], None]) -> Came:
    """The load, and a change in its middle by another thread, which has ended when this has."""
    failed = list[BaseException]()

    def run() -> None:
        try:
            with torch.inference_mode():  # of this thread
                change()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    came = load()
    thread.join()
    if failed:
        raise failed[0]
    return came


def _swap(new: DeviceVersion, serving: list[DeviceVersion]) -> None:
    """Requests go to the new version from here on, and the old one leaves when its last has ended."""
    old = serving[-1]
    serving.append(new)
    old.close()


def _by_engine(version: DeviceVersion, asked: Asked) -> list[int]:
    found = asked_once(version, asked)
    return told(found.rows, found.valid)


def _times(rung: Answer, requests: Sequence[Asked], calls: int) -> list[float]:
    """Of requests in turn, each asked as often."""
    rounds, spent = max(1, calls // len(requests)), list[float]()
    for _ in range(rounds):
        for one in requests:
            spent += times_ms(partial(rung, one), 1, warm_up=0)
    return spent
