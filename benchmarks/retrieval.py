"""What does a graph find of the best of a million items, in which part of the time, and what when few are eligible?

HNSWIndex as `publish` makes it, ExactIndex, and a product and topk, called in turn with one user each; then the graph
alone at several widths beside those of hnswlib and usearch with as many links, over the same vectors. Vectors are drawn
to be like trained ones (`retrieval_world`). Eligible rows are at random, and, what is harder for a graph, those most
like one item. Recall is the share of the k best by float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from benchmarks.machine import say
from benchmarks.result import Row
from benchmarks.retrieval_peers import EF_CONSTRUCTION, Search, peers
from benchmarks.retrieval_world import DIM, SEED, tower_vectors
from benchmarks.run import Measured, Options, run
from prerank.index.exact import ExactIndex
from prerank.index.graph import LINKS, Graph, build_links
from prerank.index.hnsw import HNSWIndex
from prerank.index.plan import MOST_QUERIES
from prerank.index.storage import Storage
from prerank.kernels.scan import scan_top_k
from prerank.types import Array

K, FLOOR = 100, 0.98
STORED: tuple[Storage, ...] = ("float32", "int8")
SHARES = (1.0, 0.5, 0.2, 0.05, 0.005, 0.0)
WIDTHS = (100, 200, 400, 800, 1_600)
LEAST_RECALL, LEAST_FILTERED_RECALL, MOST_OF_EXACT, MOST_OF_ALL = 0.98, 0.97, 0.2, 1.0
PLAIN = "matmul + torch.topk"


@dataclass(frozen=True, slots=True)
class Sizes:
    """Rows of the index, and how many users each way is asked by, beside those that the plan is measured with."""

    items: int = 1_000_000
    users: int = 200


QUICK = Sizes(items=50_000, users=30)


@dataclass(frozen=True, slots=True)
class World:
    """Items [I, D], users [Q, D] whom the plan has not seen, and what looks at every item."""

    items: Tensor
    users: Tensor
    exact: ExactIndex

    def best(self, mask: Tensor | None) -> list[set[int]]:
        """The k best of each user, by float32."""
        found = self.exact.search(self.users, K, mask)
        return [set(rows[valid].tolist()) for rows, valid in zip(found.rows, found.valid, strict=True)]


def measure(options: Options, ceilings: Mapping[str, float]) -> Measured:
    return indexes(QUICK if options.quick else Sizes())


def indexes(sizes: Sizes) -> Measured:
    """Every row; bars where it is the whole question."""
    items, users = tower_vectors(sizes.items, sizes.users + MOST_QUERIES)
    world = World(items, users[MOST_QUERIES:], ExactIndex(items))
    rows: list[Row] = []
    plans = {}
    with torch.inference_mode():
        for storage in STORED:
            say(f"retrieval: building and measuring HNSWIndex, {storage}")
            index = HNSWIndex(items, storage)
            start = perf_counter()
            index.prepare(users[:MOST_QUERIES], K, FLOOR)
            rows.append(Row.of(f"HNSWIndex, {storage}: build and measure", perf_counter() - start, "s", sizes.items))
            plans[storage] = index.plan.to_plain()
            rows += _whole(world, index, storage)
            if storage == "float32":
                rows += _filtered(world, index)
                graph = index.graph or _graph(items)
        rows += _curves(world, graph)
    if sizes != Sizes():
        rows = [replace(row, bar=None, holds=None) for row in rows]
    settings = {"k": K, "floor": FLOOR, "dim": DIM, "seed": SEED, "links": LINKS, "ef_construction": EF_CONSTRUCTION}
    return Measured(rows, {**settings, "threads": torch.get_num_threads(), "plans": plans, **asdict(sizes)})


def _graph(items: Tensor) -> Graph:
    """Of items so few that their index needs none."""
    links = build_links(items.numpy(), torch.get_num_threads())
    assert links is not None
    return Graph(links)


def _whole(world: World, index: HNSWIndex, storage: str) -> Iterator[Row]:
    """All are eligible: beside ExactIndex of the same storage, and of float32, and the plain product."""
    name, exact = f"HNSWIndex, {storage}", ExactIndex(world.items, index.storage)

    def plain(user: Tensor, k: int, mask: Tensor | None) -> object:
        return (user @ world.items.T).topk(k)

    ways = {name: index.search, f"ExactIndex, {storage}": exact.search, PLAIN: plain}
    times = _in_turn({way: partial(_call, ask, None) for way, ask in ways.items()}, world.users)
    found = _recall(world, partial(_rows, index, None), world.best(None))
    for way in ways if storage == "float32" else list(ways)[:2]:
        yield Row.timed(f"{way}, all eligible, k = {K}", times[way], len(world.items))
    yield _at_least(f"{name}: recall@{K}", found, LEAST_RECALL, len(world.users))
    ours, theirs = (float(np.median(times[way])) for way in (name, f"ExactIndex, {storage}"))
    yield _at_most(f"{name}: time over ExactIndex, {storage}", ours / theirs, MOST_OF_EXACT, len(world.items))


def _filtered(world: World, index: HNSWIndex) -> Iterator[Row]:
    """At each share, by the plan, beside looking at every row whether it is eligible or not."""
    for share in SHARES:
        for kind, mask in _masks(world, share):
            at = f"{share:.1%} eligible, {kind}"
            say(f"retrieval: {at}")
            asked = partial(_call, index.search, mask)
            over_all = partial(_call, world.exact.search, None)
            among = partial(_call, world.exact.search, mask)
            times = _in_turn({"plan": asked, "all": over_all, "among": among}, world.users)
            found = _recall(world, partial(_rows, index, mask), world.best(mask))
            of_all = float(np.median(times["all"]))
            for way, name in (("plan", "HNSWIndex"), ("among", "ExactIndex")):
                ratio = float(np.median(times[way])) / of_all
                yield Row.timed(f"{name}, {at}", times[way], len(world.items), "ExactIndex over all", ratio)
            yield _at_least(f"HNSWIndex, {at}: recall@{K}", found, LEAST_FILTERED_RECALL, len(world.users))
            over = float(np.median(times["plan"])) / of_all
            yield _at_most(f"HNSWIndex, {at}: time over ExactIndex over all", over, MOST_OF_ALL, len(world.items))


def _masks(world: World, share: float) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(SEED)
    num = len(world.items)
    yield "at random", torch.rand(num, generator=generator) < share
    if 0 < share < 1:
        middle = world.items.mean(0)
        alike = (world.items - middle) @ (world.items[num // 3] - middle)
        yield "like one item", alike >= alike.kthvalue(round((1 - share) * num)).values


def _curves(world: World, graph: Graph) -> Iterator[Row]:
    """Recall and time by width, of our graph and of others; none of them filtered, each with one thread a search."""
    best = world.best(None)
    built: dict[str, Search] = {"graph of HNSWIndex": partial(_ours, graph, world.exact)}
    for name, build in peers(world.items, torch.get_num_threads()):
        say(f"retrieval: building {name}")
        start = perf_counter()
        try:
            built[name] = build()
        except ImportError as error:
            yield Row.skipped(name, str(error))
            continue
        yield Row.of(f"{name}: build", perf_counter() - start, "s", len(world.items))
    for width in WIDTHS:
        say(f"retrieval: curves at {width}")
        ways = {name: partial(_of_width, search, width) for name, search in built.items()}
        times = _in_turn(ways, world.users)
        for name, ask in ways.items():
            row = Row.timed(f"{name}, width {width}", times[name], len(world.items))
            yield replace(row, value=round(_recall(world, ask, best), 4), unit=f"recall@{K}, more is better")


def _ours(graph: Graph, exact: ExactIndex, user: Array, k: int, width: int) -> Array:
    """What the graph names, put in order by what is stored, as HNSWIndex does."""
    one = torch.from_numpy(user)
    named = np.sort(graph.find(one, width, None, 1)[0])
    rows: Array = scan_top_k(exact.vectors, None, one, k, torch.from_numpy(named[named >= 0]), 1)[1][0].numpy()
    return rows


def _of_width(search: Search, width: int, user: Tensor) -> Array:
    return search(user.numpy(), K, width)


def _rows(index: HNSWIndex, mask: Tensor | None, user: Tensor) -> Tensor:
    return index.search(user, K, mask).rows


def _call(ask: Callable[[Tensor, int, Tensor | None], object], mask: Tensor | None, user: Tensor) -> object:
    return ask(user, K, mask)


def _in_turn(ways: Mapping[str, Callable[[Tensor], object]], users: Tensor) -> dict[str, list[float]]:
    """Milliseconds of each way for each user, called in turn so that all see the same machine, after one round."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for n in range(-3, len(users)):
        user = users[max(n, 0) : max(n, 0) + 1]
        for name, ask in ways.items():
            start = perf_counter()
            ask(user)
            if n >= 0:
                times[name].append(1e3 * (perf_counter() - start))
    return times


def _recall(world: World, search: Callable[[Tensor], object], best: Sequence[set[int]]) -> float:
    shares = []
    for n, wanted in enumerate(best):
        rows = set(np.asarray(search(world.users[n : n + 1])).ravel().tolist())
        shares.append(len(wanted & rows) / len(wanted) if wanted else 1.0)
    return float(np.mean(shares))


def _at_least(name: str, value: float, bar: float, n: int) -> Row:
    return replace(Row.of(name, value, "share, more is better", n), bar=bar, holds=value >= bar)


def _at_most(name: str, value: float, bar: float, n: int) -> Row:
    return replace(Row.of(name, value, "x, less is better", n), bar=bar, holds=value <= bar)


if __name__ == "__main__":
    run("retrieval", __doc__, measure)
