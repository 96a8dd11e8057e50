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
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread

import numpy as np
import pyarrow as pa
import torch

from benchmarks.machine import say, times_ms
from benchmarks.result import Row
from benchmarks.run import Measured, Options, run
from benchmarks.scorer_world import ADVERTISERS, FUNNEL, LENGTH, SEED, TOPICS
from prerank.bundle.publish import Parts, publish
from prerank.bundle.registry import Gate, Registry
from prerank.config import Config, parse_config
from prerank.features.transforms import Transforms
from prerank.models.rankers import build_ranker
from prerank.models.towers import build_towers
from prerank.serve.funnel import Funnel
from prerank.serve.graph import StageReport
from prerank.stores.records import EXPOSED
from prerank.stores.tail import TAIL, LmdbTail
from prerank.stores.users import UserStore
from prerank.types import Array, Given, ItemChange, Request

NUM_ITEMS, QUICK_ITEMS = 1_000_000, 20_000
CALLS, QUICK_CALLS = 100, 10
KEEP, K = 10_000, 1_000
A_SECOND, A_CALL = 1_000, 50
TAIL_SHARE = 0.1
_COLUMNS = ("advertiser", "topics", "price", "bid_micros")
_T0 = 1_767_225_600_000


def measure(options: Options, ceilings: Mapping[str, float]) -> Measured:
    num, calls = (QUICK_ITEMS, QUICK_CALLS) if options.quick else (NUM_ITEMS, CALLS)
    items = _items(num)
    rows: list[Row] = []
    threads = torch.get_num_threads()
    with TemporaryDirectory() as folder:
        say("inventory: publishing with every item resident")
        store = _published(Path(folder) / "whole", items, {"slack": num // 4})
        torch.set_num_threads(1)  # as `prerank serve` does
        with Funnel.open(store) as funnel:
            gc.collect()
            gc.freeze()
            rows += _changing(funnel, num, calls)
        say("inventory: publishing with a tail")
        torch.set_num_threads(threads)
        resident = {"top": num - int(TAIL_SHARE * num), "by": "revenue"}
        options_of_tail = {"slack": 100, "resident": resident, "cached": max(KEEP, num // 20), "fetch_ms": 1000.0}
        store = _published(Path(folder) / "tail", items, options_of_tail)
        torch.set_num_threads(1)
        with Funnel.open(store) as funnel:
            rows += _fetching(funnel, num, calls)
    return Measured(rows, {"items": num, "keep": KEEP, "k": K, "items a second": A_SECOND, "items a call": A_CALL})


def _changing(funnel: Funnel, num: int, calls: int) -> Iterator[Row]:
    made = np.random.default_rng(SEED)
    for at_once in (1, 100, 1_000):
        some = [_change(made, num, n) for n in range(at_once)]
        spent = times_ms(lambda some=some: funnel.change(some), max(3, calls // 5))  # type: ignore[misc]
        yield Row.timed(f"change of {at_once:,} items that come anew, on the disk", spent, at_once)
    still: list[float] = []
    moving: list[float] = []
    for _ in range(4):  # by turns, for the machine's own changes
        still += times_ms(lambda: _ask(funnel), calls // 4)
        with _coming(funnel, made, num) as told:
            moving += times_ms(lambda: _ask(funnel), calls // 4)
    yield Row.timed("request", still, KEEP)
    yield Row.timed("request, while items come", moving, KEEP)
    yield Row.of("items that came a second", float(np.mean(told)), "items", KEEP)
    ratio = float(np.median(moving) / np.median(still))
    row = Row.of("request: p50 while items come over p50 without", ratio, "times", KEEP)
    yield row if num < NUM_ITEMS else replace(row, bar=1.05, holds=ratio <= 1.05)


_told: list[float] = []


@contextmanager
def _coming(funnel: Funnel, made: np.random.Generator, num: int) -> Iterator[list[float]]:
    """Beside this, A_SECOND items a second that are written anew; how many came a second, of every turn."""
    done, count = Event(), 0

    def send() -> None:
        nonlocal count
        start = time.perf_counter()
        while not done.is_set():
            funnel.change([_change(made, num, n) for n in range(A_CALL)])
            count += A_CALL
            time.sleep(max(0.0, start + count / A_SECOND - time.perf_counter()))

    thread, start = Thread(target=send), time.perf_counter()
    thread.start()
    try:
        yield _told
    finally:
        done.set()
        thread.join()
        _told.append(count / (time.perf_counter() - start))


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
    return funnel.recommend(Request(user, K, _T0, {"surface": "a"})).stages


def _change(made: np.random.Generator, num: int, n: int) -> ItemChange:
    columns: dict[str, Given] = {
        "advertiser": int(made.integers(ADVERTISERS)),
        "topics": made.integers(TOPICS, size=3).tolist(),
        "price": float(made.random()),
        "bid_micros": int(made.integers(1_000, 1_000_000)),
    }
    return ItemChange(int(made.integers(num)), columns=columns)


def _items(num: int) -> pa.Table:
    made = np.random.default_rng(SEED)
    topics = pa.FixedSizeListArray.from_arrays(pa.array(made.integers(0, TOPICS, 3 * num)), 3)
    return pa.table(
        {
            "item_id": np.arange(num),
            "advertiser": made.integers(0, ADVERTISERS, num),
            "topics": topics.cast(pa.list_(pa.int64())),
            "price": made.random(num, dtype=np.float32),
            "bid_micros": made.integers(1_000, 1_000_000, num),
            "revenue": made.random(num),
        }
    )


def _config(inventory: Mapping[str, object]) -> Config:
    popularity = {"half_life_days": [1.0]}
    retrieval = {**FUNNEL["retrieval"], "keep": KEEP, "popularity": popularity, "index": {"storage": "bfloat16"}}
    ranker = {**FUNNEL["ranker"], "keep": K}
    metadata = {"columns": list(_COLUMNS)}
    plain = {**FUNNEL, "retrieval": retrieval, "ranker": ranker, "inventory": inventory, "metadata": metadata}
    return parse_config(plain, "benchmarks/inventory.py")


def _published(store: Path, items: pa.Table, inventory: Mapping[str, object]) -> Path:
    """A version that is live, with users that have seen something and the items of the tail."""
    torch.manual_seed(SEED)
    config, num = _config(inventory), items.num_rows
    users = pa.table({"user_id": np.arange(1_000), "country": [f"c{n % 50}" for n in range(1_000)]})
    transforms = Transforms.fit(
        config.features,
        users=(users, np.ones(len(users), np.int64)),
        items=(items, np.ones(num, np.int64)),
        context=[pa.table({"surface": ["a", "b", "c"]})],
    )
    golden: dict[str, Array] = {
        **transforms.encode("user", users.slice(0, 1)),
        **transforms.encode("context", pa.table({"surface": ["a"]})),
        **{name: np.full((1, LENGTH), -1, np.int32) for name in ("clicks", "topics_1d", "advertiser_1h")},
    }
    parts = Parts(
        config=config,
        transforms=transforms,
        towers=build_towers(config, transforms.sizes()),
        ranker=build_ranker(config, transforms.sizes()),
        item_ids=items["item_id"].to_numpy(),
        item_columns=transforms.encode("item", items),
        item_table=items.select([*_COLUMNS, "revenue"]),
        popularity=np.zeros((num, 1), np.float32),
        golden_user=golden,
        parents={},
        metrics={},
    )
    store.mkdir(parents=True)
    version = publish(store, parts)
    Registry(store).write_validation(version, [Gate("golden", "", 1.0, True)])
    Registry(store).promote(version, "a benchmark", "")
    made = np.random.default_rng(SEED)
    seen = (
        (
            user,
            made.integers(num, size=LENGTH),
            _T0 - 3_600_000 + np.arange(LENGTH),
            _T0 - 3_500_000 + np.arange(LENGTH),
        )
        for user in range(1_000)
    )
    events = ((user, ids, at, known, np.full(LENGTH, EXPOSED | 1, np.uint32)) for user, ids, at, known in seen)
    UserStore.write(store / "users.lmdb", users, events, labels=["is_click", "is_purchase"])
    if config.inventory.resident is not None:
        LmdbTail.write(store / TAIL, items, "item_id", _COLUMNS)
    return store


def main() -> None:
    run("inventory", __doc__ or "", measure)


if __name__ == "__main__":
    main()
