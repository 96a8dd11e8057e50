"""What does each part of a request cost on its own?

One core: the exact index beside a plain product and topk, the scorer and its steps, the stores, the graph, the user's
features. The server is a process of its own around a funnel that answers at once, asked over one kept connection; the
client's own time, Python's http.client, is part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from benchmarks.machine import ceilings as machine_ceilings
from benchmarks.machine import say, times_ms
from benchmarks.result import Row
from benchmarks.run import Measured, Options, run
from benchmarks.serving_world import (
    BODY,
    CONTEXT,
    DAY_MS,
    DIM,
    EVENTS,
    HTTP_WINNERS,
    LONG_HISTORY,
    SEED,
    T0,
    Step,
    World,
    ask,
    described_items,
    ready_server,
)
from prerank.bundle.scorer import Scorer
from prerank.business.diversity import groups_of
from prerank.business.utility import Utility
from prerank.index.exact import ExactIndex
from prerank.kernels.greedy import greedy_top_k
from prerank.kernels.lookup import Lookup
from prerank.models.layers import VECTORS
from prerank.models.rankers import build_ranker
from prerank.serve.expand import ExpandUser
from prerank.serve.graph import RequestGraph
from prerank.serve.passage import run_graph
from prerank.stores.metadata import MetadataTable, write_metadata
from prerank.stores.users import UserStore
from prerank.types import CandidateSet, Request

BATCHES, KS = (1, 16), (1_000, 10_000)
CANDIDATES, WINNERS = (10_000, 100_000), 1_000
LOOKED_UP = (50, *CANDIDATES)
BATCH_ROWS = 8_192


@dataclass(frozen=True, slots=True)
class Sizes:
    """Rows of everything, and calls that are timed, of searches and of all else (a tenth where they take long)."""

    items: int = 1_000_000
    users: int = 20_000
    described_items: int = 200_000
    searches: int = 21
    calls: int = 2_000


QUICK = Sizes(items=200_000, users=2_000, described_items=50_000, searches=5, calls=500)


def measure(options: Options, ceilings: Mapping[str, float]) -> Measured:
    return parts(QUICK if options.quick else Sizes())


def parts(sizes: Sizes) -> Measured:
    """Every row, with one core's ceilings and the least a search's product could take."""
    with _one_core(), TemporaryDirectory() as name:
        ceilings = {f"one_core_{name}": value for name, value in machine_ceilings().items()}
        say("serving_parts: the index")
        copy_gb_s, gflop_s = (ceilings[f"one_core_{name}"] for name in ("copy_gb_s", "fp32_matmul_gflop_s"))
        rows, least = _index_rows(sizes, copy_gb_s, gflop_s)
        say("serving_parts: the scorer, the stores, the graph, the user's features")
        world = World.build(sizes.users, sizes.items)
        rows += [*_scorer_rows(world, sizes), *_lookup_rows(sizes)]
        rows += _metadata_rows(Path(name) / "metadata.arrow", sizes)
        rows += [*_user_rows(world, Path(name) / "users.lmdb", sizes), _graph_row(sizes)]
    say("serving_parts: HTTP")
    rows += _http_rows(sizes)
    config = {"threads": 1, "dim": DIM, "events_a_user": EVENTS, "winners": WINNERS, "seed": SEED, **asdict(sizes)}
    return Measured(rows, config, {**ceilings, **least})


@contextmanager
def _one_core() -> Iterator[None]:
    """Torch computes on one thread, as in `prerank serve`, and draws from the seed; then all is as before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(), torch.inference_mode():
            torch.manual_seed(SEED)
            yield
    finally:
        torch.set_num_threads(threads)


def _in_turn(calls: int, *works: Callable[[], object]) -> list[list[float]]:
    """Milliseconds of each of the works, called in turn so that all see the same machine; first calls do not count."""
    rounds = [[times_ms(work, 1, warm_up=int(call == 0))[0] for work in works] for call in range(calls)]
    return [list(times) for times in zip(*rounds, strict=True)]


def _over(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return float(np.median(ours) / np.median(theirs))


# the index


def _index_rows(sizes: Sizes, copy_gb_s: float, gflop_s: float) -> tuple[list[Row], dict[str, float]]:
    """The products beside the least they could take: reading every vector once, or the arithmetic, if that is more.

    Reading is half of a copy, whose bandwidth counts bytes read and written; or their sum, where that was faster.
    """
    vectors, half = torch.randn(sizes.items, DIM), torch.rand(sizes.items) < 0.5
    read_ms = min(*times_ms(vectors.sum, 2 * sizes.searches), vectors.nbytes / copy_gb_s / 1e6)
    rows, ceilings = [], {"vectors_read_ms": round(read_ms, 3)}
    for batch in BATCHES:
        query = torch.randn(batch, DIM)
        least = max(read_ms, 2 * batch * vectors.numel() / gflop_s / 1e6)
        ceilings[f"product_{batch}_ms"] = round(least, 3)
        times = times_ms(partial(torch.matmul, query, vectors.T), sizes.searches)
        rows.append(Row.timed(f"matmul, B = {batch}", times, sizes.items, "the least", _over(times, [least])))
        for k in KS:
            rows += _search_rows(ExactIndex(vectors), query, k, half, sizes.searches)
    return rows, ceilings


def _search_rows(index: ExactIndex, query: Tensor, k: int, half: Tensor, calls: int) -> Iterator[Row]:
    def plain() -> object:
        return (query @ index.vectors.T).topk(k)

    def plain_half() -> object:
        return (query @ index.vectors.T).masked_fill_(~half, -torch.inf).topk(k)

    exact, exact_half = (partial(index.search, query, k, eligible) for eligible in (None, half))
    of_plain, of_exact, of_plain_half, of_exact_half = _in_turn(calls, plain, exact, plain_half, exact_half)
    n, at, against = len(half), f"B = {len(query)}, k = {k:,}", "matmul + torch.topk"
    yield Row.timed(f"{against}, {at}", of_plain, n)
    yield Row.timed(f"ExactIndex, {at}", of_exact, n, against, _over(of_exact, of_plain))
    yield Row.timed(f"{against}, {at}, half eligible", of_plain_half, n)
    yield Row.timed(f"ExactIndex, {at}, half eligible", of_exact_half, n, against, _over(of_exact_half, of_plain_half))


# the scorer


def _scorer_rows(world: World, sizes: Sizes) -> Iterator[Row]:
    """Weights and item side as drawn: what they are does not change what they cost."""
    ranker = build_ranker(world.config, world.transforms.sizes())
    utility = Utility(ranker.tasks, {"click": "bid_micros"})
    scorer = Scorer(world.items, ranker, utility, {VECTORS: torch.randn(sizes.items, DIM + 1)}).eval()
    for num in CANDIDATES:
        yield from _scorer_steps(scorer, world, torch.randperm(sizes.items)[None, :num], sizes.calls // 10)


def _scorer_steps(scorer: Scorer, world: World, rows: Tensor, calls: int) -> Iterator[Row]:
    user, worth, num = world.features(), torch.rand(rows.shape), rows.shape[1]
    candidates = CandidateSet(rows, torch.zeros(rows.shape), torch.ones(rows.shape, dtype=torch.bool))
    user_side, taken = scorer.ranker.user_side(user), scorer.item_side.gather(rows)
    whole, gather, rank, exact, plain = _in_turn(
        calls,
        partial(scorer, user, candidates, WINNERS),
        partial(scorer.item_side.gather, rows),
        partial(scorer.ranker, user_side, taken),
        partial(greedy_top_k, worth, rows, candidates.valid, *groups_of(None, rows), WINNERS),
        partial(worth.topk, WINNERS),
    )
    what = f"Scorer, {num:,} candidates"
    yield Row.timed(what, whole, num)
    yield Row.timed(f"{what}: gather the item side", gather, num)
    yield Row.timed(f"{what}: two-tower ranker", rank, num)
    yield Row.timed(f"{what}: exact top-k", exact, num, "torch.topk", _over(exact, plain))
    yield Row.timed(f"{what}: torch.topk", plain, num)


def _lookup_rows(sizes: Sizes) -> Iterator[Row]:
    """The row of an item_id among all: by a hash, and by bisection."""
    made = np.random.default_rng(SEED)
    ids = np.sort(made.choice(10 * sizes.items, sizes.items, replace=False))
    places = Lookup(ids)
    for num in LOOKED_UP:
        wanted = made.choice(ids, num)
        theirs, asked = torch.from_numpy(ids), torch.from_numpy(wanted)
        ours, plain = _in_turn(
            sizes.calls // 10, partial(places.find, wanted), partial(torch.searchsorted, theirs, asked)
        )
        what, against = f"rows of {num:,} item_ids", "torch.searchsorted"
        yield Row.timed(what, ours, sizes.items, against, _over(ours, plain))
        yield Row.timed(f"{what}, {against}", plain, sizes.items)


# the stores, and the user's features


def _metadata_rows(path: Path, sizes: Sizes) -> Iterator[Row]:
    table, what = described_items(sizes.described_items), f"MetadataTable.take of {WINNERS:,} rows"
    rows = np.random.default_rng(SEED).permutation(table.num_rows)[:WINNERS]
    four = table.column_names[:4]
    for name, columns, batch in (
        (f"{what}, 4 columns", four, None),
        (f"{what}, 6 columns, one a list", table.column_names, None),
        (f"{what}, 4 columns, in batches of {BATCH_ROWS:,}", four, BATCH_ROWS),
    ):
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=batch)
        take = partial(MetadataTable.open(path).take, rows, columns)
        yield Row.timed(name, times_ms(take, sizes.calls // 10, warm_up=5), table.num_rows)
    write_metadata(path, table, four)
    described = MetadataTable.open(path)
    ready, made = _in_turn(
        sizes.calls // 10,
        lambda: msgspec.json.encode(described.take_json(rows, four)),
        lambda: msgspec.json.encode(described.take(rows, four)),
    )
    what, against = f"JSON of {WINNERS:,} rows, 4 columns", "made of the columns"
    yield Row.timed(f"{what}, ready", ready, table.num_rows, against, _over(ready, made))
    yield Row.timed(f"{what}, {against}", made, table.num_rows)


def _user_rows(world: World, path: Path, sizes: Sizes) -> Iterator[Row]:
    events = list(world.events())
    [written] = times_ms(lambda: UserStore.write(path, world.users, events, labels=["is_click"]), 1, warm_up=0)
    yield Row.of("UserStore.write", written / 1000, "s", sizes.users)
    yield Row.of("UserStore.write: on disk", path.stat().st_size / 1e6, "MB", sizes.users)
    with UserStore.open(path) as store:
        asked = iter(np.random.default_rng(SEED).integers(sizes.users, size=2 * sizes.calls).tolist())
        times = times_ms(lambda: store.get(next(asked)), sizes.calls, warm_up=sizes.calls)
        yield Row.timed(f"UserStore.get, {len(store.columns)} columns, {EVENTS} events", times, sizes.users)
        request = Request(sizes.users - 1, WINNERS, T0 + DAY_MS, CONTEXT)
        expand = partial(ExpandUser(store, world.transforms, world.items).run, {"request": request})
        times = times_ms(expand, sizes.calls, warm_up=20)
        yield Row.timed(f"ExpandUser, {LONG_HISTORY} events, two histories", times, LONG_HISTORY)


# the graph and the server


def _graph_row(sizes: Sizes) -> Row:
    steps = [Step(f"step {k}", frozenset({f"value {k}"}), frozenset({f"value {k + 1}"})) for k in range(4)]
    first, last = "value 0", "value 4"
    graph = RequestGraph(steps, inputs=frozenset({first}), outputs=frozenset({last}), answer=last, fallbacks={})
    times = times_ms(lambda: run_graph(graph, {first: 1}), sizes.calls, warm_up=20)
    return Row.timed("RequestGraph, four stages without work", times, 1)


def _http_rows(sizes: Sizes) -> Iterator[Row]:
    with ready_server() as connection:
        times, empty = _in_turn(
            sizes.calls,
            partial(ask, connection, "POST", "/v1/recommend", BODY),
            partial(ask, connection, "GET", "/healthz"),
        )
    warm, against = sizes.calls // 10, "GET /healthz"
    times, empty = times[warm:], empty[warm:]
    yield Row.timed(f"HTTP, {HTTP_WINNERS} winners, no work", times, HTTP_WINNERS, against, _over(times, empty))
    yield Row.timed(f"HTTP, {against}", empty, 1)


if __name__ == "__main__":
    run("serving_parts", __doc__, measure)
