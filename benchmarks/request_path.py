"""What is a whole request's path worth: candidates as columns, metadata last, overlap, against the straightforward way?

The same models over the same million items, users and stores. The naive path expands one thing after the other, makes
an object with all metadata of every candidate, fetches and transforms every candidate's features, ranks eagerly in
float32 and does the rules in Python; by turns with `Funnel.recommend`. Then what each part of it is worth, and our
server around an empty model beside others around the same.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import torch

from benchmarks.machine import say, times_ms
from benchmarks.naive_path import AT_MOST, Naive
from benchmarks.request_servers import server_rows
from benchmarks.result import Row
from benchmarks.run import Measured, Options, run
from benchmarks.scorer_world import SEED
from benchmarks.served_world import COUNTRIES, NUM_USERS, T0_MS, K, published, served_items
from prerank.bundle.load import load
from prerank.bundle.registry import Registry
from prerank.serve.funnel import Funnel
from prerank.serve.graph import RequestGraph, Values
from prerank.serve.index_columns import batch_of, columns_of, options_of
from prerank.serve.passage import run_graph
from prerank.serve.stages import Target
from prerank.serve.wire import encode_answer
from prerank.types import Request

NUM_ITEMS, QUICK_ITEMS = 1_000_000, 30_000
SIZES, QUICK_SIZES = (10_000, 100_000), (1_000,)
CALLS, QUICK_CALLS = 40, 4
NAIVE_CALLS = {1_000: 4, 10_000: 12, 100_000: 5}
_COLUMNS = {True: "columns", False: "columns that are not compressed"}
SCORER = ("target", "retrieve", "prepare_user", "rank")
LATENCIES_MS = {"expand_user": 9.0, "expand_targeting": 3.0, "target": 2.0}
"""Of a store that is asked over a network, and of reading bitmaps."""


def measure(options: Options, ceilings: Mapping[str, float]) -> Measured:
    num = QUICK_ITEMS if options.quick else NUM_ITEMS
    sizes, calls = (QUICK_SIZES, QUICK_CALLS) if options.quick else (SIZES, CALLS)
    rows: list[Row] = []
    items = _items(num)
    targeting = {"country": {"item": "country", "user": "country"}}
    diversity = {"advertiser": {"at_most": AT_MOST}}
    metadata = {"columns": ["advertiser", "bid_micros", "title", "landing_url", "description", "country"]}
    for keep in sizes:
        with TemporaryDirectory() as folder:
            say(f"request_path: publishing {num:,} items, {keep:,} candidates")
            torch.set_num_threads(2)
            more = {"targeting": targeting, "diversity": diversity, "metadata": metadata}
            store = published(Path(folder) / "store", items, {}, keep, **more)
            naive = Naive.open(store, load(Registry(store).path(str(Registry(store).live()))), items)
            with Funnel.open(store) as funnel, torch.inference_mode():
                gc.collect()
                gc.freeze()
                rows += _paths(funnel, naive, keep, calls)
                gc.unfreeze()
    rows += _overlap(calls)
    rows += server_rows(options.quick)
    return Measured(rows, {"items": num, "k": K, "latencies": LATENCIES_MS})


def _paths(funnel: Funnel, naive: Naive, keep: int, calls: int) -> Iterator[Row]:
    name = f"{keep:,} candidates"
    ours, theirs, dots, stages = [], [], [], []
    _ours(funnel, 0)
    naive.ask(0, keep, K)
    slow = NAIVE_CALLS[keep]
    for number in range(max(calls, slow)):
        torch.set_num_threads(1)  # as `prerank serve` does
        user = number % NUM_USERS
        spent = times_ms(lambda user=user: stages.append(_ours(funnel, user)), 1, warm_up=0)  # type: ignore[misc]
        ours += spent
        torch.set_num_threads(2)
        if number < slow:
            theirs += times_ms(partial(naive.ask, user, keep, K), 1, warm_up=0)
            dots += times_ms(partial(naive.ask, user, keep, K, is_dot=True), 1, warm_up=0)
    yield Row.timed(f"naive path, {name}", theirs, keep)
    yield Row.timed(f"naive path with two towers alone, {name}", dots, keep)
    yield Row.timed(f"request, {name}", ours, keep)
    yield _bar(f"request over naive, p90, {name}", _share(ours, theirs, 90), 1 / 5, keep)
    yield _bar(f"request over naive with two towers alone, p50, {name}", _share(ours, dots, 50), 1.0, keep)
    for stage in ("target", "expand_user", "retrieve", "prepare_user", "rank", "describe"):
        yield Row.timed(f"stage {stage}, {name}", [one[stage] for one in stages], keep)
    torch.set_num_threads(1)
    for k in (K, 100):
        rest = [_overhead(funnel, user % NUM_USERS, k) for user in range(calls)]
        row = Row.timed(f"request and its JSON while no part of the scorer runs, {k:,} winners, {name}", rest, keep)
        yield row if k == K else replace(row, bar=1.5, holds=float(np.median(rest)) <= 1.5)
    yield from _retrieval(funnel, naive, keep, max(3, slow))


def _retrieval(funnel: Funnel, naive: Naive, keep: int, calls: int) -> Iterator[Row]:
    """What goes to the next process: objects in JSON, or ids and bids as index hosts send them: compressed, or not."""
    name = f"{keep:,} candidates"
    stages = {one.name: one for one in funnel._graph.order}
    target = stages["target"]
    assert isinstance(target, Target)
    assert target.live is not None
    live = target.live
    request = Request(0, K, T0_MS, {"surface": "a"})
    features = stages["expand_user"].run({"request": request})["features"]
    profile = naive.users.profile(0) or {}
    sent: dict[str, int] = {}

    def by_rows() -> None:
        sent["rows"] = len(json.dumps(naive.retrieve(features, str(profile.get("country")), keep)))

    def by_columns(is_compressed: bool) -> None:
        targeted = target.run({"request": request, "profile": profile})
        candidates = stages["retrieve"].run({"features": features, **targeted})["candidates"]
        ids = funnel._items.item_ids[candidates.rows[0]]
        bids = live.value("bid_micros")[candidates.rows[0]]
        sink = pa.BufferOutputStream()
        batch = batch_of(columns_of(ids, {"bid": bids}))
        with pa.ipc.new_stream(sink, batch.schema, options=options_of(is_compressed)) as writer:
            writer.write_batch(batch)
        content = sink.getvalue()
        pa.ipc.open_stream(pa.BufferReader(content)).read_all()  # whoever gets them has to
        sent[_COLUMNS[is_compressed]] = len(content)

    torch.set_num_threads(2)
    rows: list[float] = []
    columns: dict[str, list[float]] = {how: [] for how in _COLUMNS.values()}
    for _ in range(calls):
        rows += times_ms(by_rows, 1, warm_up=0)
        for is_compressed, how in _COLUMNS.items():
            columns[how] += times_ms(partial(by_columns, is_compressed), 1, warm_up=0)
    yield Row.timed(f"retrieval as objects with metadata, {name}", rows, keep)
    yield Row.of(f"bytes of candidates as objects, {name}", sent["rows"], "bytes", keep)
    for is_compressed, how in _COLUMNS.items():
        yield Row.timed(f"retrieval as {how}, {name}", columns[how], keep)
        yield Row.of(f"bytes of candidates as {how}, {name}", sent[how], "bytes", keep)
        time_share, byte_share = _share(columns[how], rows, 50), sent[how] / sent["rows"]
        least = (1 / 10, 1 / 50) if is_compressed else (None, None)  # of what is sent unless told otherwise
        yield _bar(f"retrieval as {how} over objects, p50, {name}", time_share, least[0], keep)
        yield _bar(f"bytes of {how} over objects, {name}", byte_share, least[1], keep)


@dataclass(frozen=True, slots=True)
class Waiting:
    """A stage that waits as its store would."""

    name: str
    reads: frozenset[str]
    writes: frozenset[str]

    def run(self, values: Values) -> Values:
        """Nothing, after a while."""
        time.sleep(LATENCIES_MS[self.name] / 1000)
        return dict.fromkeys(self.writes, 1)

    def count(self, values: Values, written: Values) -> tuple[int, int]:
        """One in, one out."""
        return 1, 1


def _overlap(calls: int) -> Iterator[Row]:
    """The two expansions with a store's latencies, beside each other and one after the other."""
    stages = [
        Waiting("expand_user", frozenset({"request"}), frozenset({"features"})),
        Waiting("expand_targeting", frozenset({"request"}), frozenset({"profile"})),
        Waiting("target", frozenset({"profile"}), frozenset({"eligible"})),
    ]
    outputs, times = frozenset({"features", "eligible"}), {}
    with ThreadPoolExecutor(4) as pool:
        for name, own in (("beside each other", pool), ("one after the other", None)):
            graph = RequestGraph(
                stages, inputs=frozenset({"request"}), outputs=outputs, answer="features", fallbacks={}, pool=own
            )
            times[name] = times_ms(lambda graph=graph: run_graph(graph, {"request": 1}), 3 * calls, warm_up=3)  # type: ignore[misc]
            yield Row.timed(f"expansions, {name}", times[name])
    saved = float(np.median(times["one after the other"]) - np.median(times["beside each other"]))
    short = LATENCIES_MS["expand_targeting"] + LATENCIES_MS["target"]
    row = Row.of("expansions: saved of the shorter path", saved / short, "share")
    yield Row.of("expansions: milliseconds saved", saved, "ms")
    yield replace(row, bar=0.95, holds=saved / short >= 0.95)


def _ours(funnel: Funnel, user: int) -> dict[str, float]:
    answer = funnel.recommend(Request(user, K, T0_MS, {"surface": "a"}))
    return {one.name: one.ms for one in answer.stages}


def _overhead(funnel: Funnel, user: int, k: int) -> float:
    """Milliseconds until the JSON is there in which neither eligibility, nor retrieval, nor the ranker was at work."""
    start = time.perf_counter()
    answer = funnel.recommend(Request(user, k, T0_MS, {"surface": "a"}))
    encode_answer(answer)
    whole, covered, until = 1000 * (time.perf_counter() - start), 0.0, 0.0
    for one in answer.stages:  # as they began
        if one.name in SCORER:
            end = one.start_ms + one.ms
            covered += max(0.0, end - max(until, one.start_ms))
            until = max(until, end)
    return whole - covered


def _share(ours: list[float], theirs: list[float], percentile: int) -> float:
    return float(np.percentile(ours, percentile) / np.percentile(theirs, percentile))


def _bar(name: str, ratio: float, bar: float | None, n: int) -> Row:
    row = Row.of(name, ratio, "times", n)
    return row if bar is None else replace(row, bar=bar, holds=ratio <= bar)


def _items(num: int) -> pa.Table:
    """With what an answer carries: texts of a few hundred bytes."""
    made, items = np.random.default_rng(SEED), served_items(num)
    words = np.array([f"word{n}" for n in range(1_000)])
    texts = [" ".join(words[made.integers(0, 1_000, 20)]) for _ in range(5_000)]
    chosen = pa.array(made.integers(0, len(texts), num))
    shop = pa.array([f"https://shop.example.com/{n}?utm=prerank" for n in range(5_000)])
    names = pa.array([f"c{n}" for n in range(COUNTRIES)])
    more = {
        "title": pa.array([one[:40] for one in texts]).take(chosen),
        "landing_url": shop.take(chosen),
        "description": pa.array(texts).take(chosen),
        "country": names.take(pa.array(made.integers(0, COUNTRIES, num))),
    }
    for name, column in more.items():
        items = items.append_column(name, column)
    return items


def main() -> None:
    run("request_path", __doc__ or "", measure)


if __name__ == "__main__":
    main()
