"""What do a thousand items a second that come anew, and items that are not in memory, cost a request?

A version of a million items with a large ranker, its weights as drawn, published, loaded and asked in this process:
a request is all of `Funnel.recommend`. Changes come from a thread beside, as a server's do, their disk included.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread

import numpy as np
import torch

from benchmarks.machine import say, times_ms
from benchmarks.result import Row
from benchmarks.run import Measured, Options, run
from benchmarks.scorer_world import ADVERTISERS, SEED, TOPICS
from benchmarks.served_world import KEEP, T0_MS, K, published, served_items
from prerank.serve.funnel import Funnel
from prerank.serve.graph import StageReport
from prerank.types import Given, ItemChange, Request

NUM_ITEMS, QUICK_ITEMS = 1_000_000, 20_000
CALLS, QUICK_CALLS = 100, 10
A_SECOND, A_CALL = 1_000, (50, 100, 200)
MADE_UP = 4_000
TAIL_SHARE = 0.1


def measure(options: Options, ceilings: Mapping[str, float]) -> Measured:
    num, calls = (QUICK_ITEMS, QUICK_CALLS) if options.quick else (NUM_ITEMS, CALLS)
    items = served_items(num)
    rows: list[Row] = []
    threads = torch.get_num_threads()
    with TemporaryDirectory() as folder:
        say("inventory: publishing with every item resident")
        store = published(Path(folder) / "whole", items, {"slack": num // 4})
        torch.set_num_threads(1)  # as `prerank serve` does
        with Funnel.open(store) as funnel:
            gc.collect()
            gc.freeze()
            rows += _changing(funnel, num, calls)
        say("inventory: publishing with a tail")
        torch.set_num_threads(threads)
        resident = {"top": num - int(TAIL_SHARE * num), "by": "revenue"}
        options_of_tail = {"slack": 100, "resident": resident, "cached": max(KEEP, num // 20), "fetch_ms": 1000.0}
        store = published(Path(folder) / "tail", items, options_of_tail)
        torch.set_num_threads(1)
        with Funnel.open(store) as funnel:
            rows += _fetching(funnel, num, calls)
    return Measured(
        rows, {"items": num, "keep": KEEP, "k": K, "items a second": A_SECOND, "items a call": list(A_CALL)}
    )


def _changing(funnel: Funnel, num: int, calls: int) -> Iterator[Row]:
    made = np.random.default_rng(SEED)
    for at_once in (1, 100, 1_000):
        some = [_change(made, num, n) for n in range(at_once)]
        spent = times_ms(lambda some=some: funnel.change(some), max(3, calls // 5))  # type: ignore[misc]
        yield Row.timed(f"change of {at_once:,} items that come anew, on the disk", spent, at_once)
    still: list[float] = []
    moving: dict[int, list[float]] = {at_once: [] for at_once in A_CALL}
    came: dict[int, list[float]] = {at_once: [] for at_once in A_CALL}  # a second, in each turn
    for _ in range(4):  # by turns, for the machine's own changes
        still += times_ms(lambda: _ask(funnel), calls // 4)
        for at_once in A_CALL:
            with _coming(funnel, made, num, at_once, came[at_once]):
                moving[at_once] += times_ms(lambda: _ask(funnel), calls // 4)
    yield Row.timed("request", still, KEEP)
    for at_once in A_CALL:
        name = f"while items come, {at_once} a call"
        yield Row.timed(f"request, {name}", moving[at_once], KEEP)
        yield Row.of(f"items that came a second, {at_once} a call", float(np.mean(came[at_once])), "items", KEEP)
        ratio = float(np.median(moving[at_once]) / np.median(still))
        row = Row.of(f"request: p50 {name}, over p50 without", ratio, "times", KEEP)
        yield row if num < NUM_ITEMS else replace(row, bar=1.05, holds=ratio <= 1.05)


@contextmanager
def _coming(funnel: Funnel, made: np.random.Generator, num: int, at_once: int, came: list[float]) -> Iterator[None]:
    """Beside this, A_SECOND items a second that are written anew; how many it was goes to the end of `came`.

    What they are is made up before, as it is by who sends them.
    """
    done, count = Event(), 0
    calls = cycle([[_change(made, num, n) for n in range(at_once)] for _ in range(MADE_UP // at_once)])

    def send() -> None:
        nonlocal count
        start = time.perf_counter()
        while not done.is_set():
            funnel.change(next(calls))
            count += at_once
            time.sleep(max(0.0, start + count / A_SECOND - time.perf_counter()))

    thread, start = Thread(target=send), time.perf_counter()
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        came.append(count / (time.perf_counter() - start))


def _fetching(funnel: Funnel, num: int, calls: int) -> Iterator[Row]:
    cold: list[float] = []
    for user in range(calls):
        stages = {one.name: one.ms for one in _ask(funnel, user)}
        cold.append(stages["fetch_tail"])
    counts = dict(funnel.tail_counts)
    again = [next(one.ms for one in _ask(funnel, 0) if one.name == "fetch_tail") for _ in range(calls)]
    whole = times_ms(lambda: _ask(funnel), calls)
    yield Row.timed("fetch of a request's tail, users in turn", cold, KEEP)
    yield Row.timed("fetch of a request's tail, the same again", again, KEEP)
    yield Row.timed("request with a tail, the same again", whole, KEEP)
    total = sum(counts.values())
    for outcome in ("slot", "host", "store", "late"):
        yield Row.of(
            f"candidates of the tail, users in turn: {outcome}", counts[outcome] / max(total, 1), "share", KEEP
        )
    yield Row.of("candidates of the tail a request", total / calls, "candidates", KEEP)


def _ask(funnel: Funnel, user: int = 0) -> Sequence[StageReport]:
    return funnel.recommend(Request(user, K, T0_MS, {"surface": "a"})).stages


def _change(made: np.random.Generator, num: int, n: int) -> ItemChange:
    columns: dict[str, Given] = {
        "advertiser": int(made.integers(ADVERTISERS)),
        "topics": made.integers(TOPICS, size=3).tolist(),
        "price": float(made.random()),
        "bid_micros": int(made.integers(1_000, 1_000_000)),
    }
    return ItemChange(int(made.integers(num)), columns=columns)


def main() -> None:
    run("inventory", __doc__ or "", measure)


if __name__ == "__main__":
    main()
