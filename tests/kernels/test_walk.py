"""One contract for every implementation of the walk: numpy, and the native one at every level of this processor."""

import functools
import heapq
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prerank.errors import Cancelled
from prerank.kernels import native, walk
from prerank.kernels.stop import Stop

HERE = native.LEVELS[: native.LEVELS.index(native.level()) + 1]
WAYS = {"numpy": lambda *asked: walk.walk_by_numpy(*asked)} | {
    f"{level}, {threads} threads": functools.partial(
        lambda *asked, threads, level: walk.walk_natively(*asked, threads, level), threads=threads, level=level
    )
    for level in HERE
    for threads in (1, 3)
}


def graph_of(num: int, dim: int, links: int, levels: int, seed: int, largest: int = 256) -> walk.Graph:
    """Rows linked at random, fewer on each level above, some of them to nothing."""
    rng = np.random.default_rng(seed)

    def linked(rows: np.ndarray, among: np.ndarray) -> np.ndarray:
        out = rng.choice(among, (len(rows), links)).astype(np.int32)
        out[np.arange(links) >= rng.integers(0, links + 1, (len(rows), 1))] = -1
        return out

    highest = np.minimum(rng.geometric(0.6, num), levels)
    highest[rng.integers(num)] = levels
    above = highest - 1
    first_of = np.cumsum(above) - above
    upper = np.full((above.sum(), links), -1, np.int32)
    for level in range(1, levels):
        on = np.flatnonzero(highest > level)
        upper[first_of[on] + level - 1] = linked(on, on)
    codes = walk.padded(rng.integers(0, largest, (num, dim)).astype(np.uint8))
    every = np.arange(num)
    return walk.Graph(codes, linked(every, every), upper, first_of, int(highest.argmax()), levels)


def asked(graph: walk.Graph, num_queries: int, dim: int, seed: int) -> np.ndarray:
    return walk.weights_of(graph, np.random.default_rng(seed).standard_normal((num_queries, dim)))


def bits(num: int, share: float | None, seed: int) -> np.ndarray | None:
    may = None if share is None else np.random.default_rng(seed).random(num) < share
    return None if may is None else np.packbits(may, bitorder="little")


def keys(graph: walk.Graph, query: np.ndarray) -> list[tuple[int, int]]:
    """Larger for a larger similarity or, of equal ones, a smaller row."""
    return [(s, -row) for row, s in enumerate((graph.codes.astype(np.int64) @ query.astype(np.int64)).tolist())]


def expected(graph: walk.Graph, query: np.ndarray, width: int, may: np.ndarray | None) -> set[int]:
    """The paper's search, by sets and sorting."""
    key = keys(graph, query)
    row = graph.entry
    for level in reversed(range(1, graph.levels)):
        while True:
            near = [int(n) for n in graph.upper[graph.first_of[row] + level - 1] if n >= 0]
            best = max([row, *near], key=key.__getitem__)
            if best == row:
                break
            row = best
    met, followed = {row}, set()
    while True:
        kept = heapq.nlargest(width, met, key=key.__getitem__)
        left = [n for n in kept if n not in followed]
        if not left:
            break
        followed.add(left[0])
        met |= {int(n) for n in graph.lowest[left[0]] if n >= 0}
    if may is None:
        return set(kept)
    allowed = np.unpackbits(may, bitorder="little").astype(bool)
    return set(heapq.nlargest(width, (n for n in met if allowed[n]), key=key.__getitem__))


def is_as_expected(way, graph, weights, width, may):
    found = way(graph, weights, width, may)
    assert found.shape == (len(weights), width)
    assert found.dtype == np.int64
    for query, rows in zip(weights, found, strict=True):
        there = rows[rows >= 0]
        assert (rows[len(there) :] == -1).all(), "what is not there comes last"
        assert len(set(there.tolist())) == len(there)
        assert set(there.tolist()) == expected(graph, query, width, may)


@pytest.fixture(params=WAYS)
def way(request):
    return WAYS[request.param]


@pytest.mark.parametrize("dim", [1, 16, 31, 64, 65, 200])
@pytest.mark.parametrize("share", [None, 1.0, 0.5, 0.02, 0.0])
def test_a_walk_finds_what_the_papers_search_does(way, dim, share):
    graph = graph_of(400, dim, links=6, levels=4, seed=dim)
    for num_queries, width in ((1, 1), (1, 30), (5, 30), (2, 1000)):
        is_as_expected(way, graph, asked(graph, num_queries, dim, seed=3), width, bits(400, share, seed=4))


@pytest.mark.parametrize("name", WAYS)
@settings(max_examples=60)
@given(data=st.data())
def test_no_graph_makes_it_find_anything_else(name, data):
    num = data.draw(st.integers(1, 60))
    graph = graph_of(
        num,
        dim=data.draw(st.sampled_from([1, 3])),
        links=data.draw(st.integers(1, 8)),
        levels=data.draw(st.integers(1, 5)),
        seed=data.draw(st.integers(0, 1 << 30)),
        largest=data.draw(st.sampled_from([1, 3, 256])),  # few different codes: many are equally similar
    )
    share = data.draw(st.none() | st.floats(0, 1))
    weights = asked(graph, data.draw(st.integers(0, 3)), 1, seed=5)
    is_as_expected(WAYS[name], graph, weights, data.draw(st.integers(1, 70)), bits(num, share, seed=6))


@pytest.mark.parametrize("dim", [64, 2048])
def test_the_largest_codes_and_weights_do_not_overflow(way, dim):
    graph = graph_of(50, dim, links=6, levels=1, seed=1)
    graph.codes[:, :dim] = 255
    graph.codes[7, 0] = 254
    for sign in (1, -1):
        weights = walk.weights_of(graph, np.full((1, dim), 1e30 * sign))
        assert np.abs(weights).max() == graph.most_weight
        is_as_expected(way, graph, weights, 10, None)


def test_weights_are_in_proportion_and_what_is_not_finite_counts_nothing():
    graph = graph_of(3, 5, links=2, levels=1, seed=1)
    weights = walk.weights_of(graph, np.array([[4.0, -2.0, np.nan, np.inf, 1.0], [0.0] * 5]))
    most = graph.most_weight
    assert weights[0, :5].tolist() == [most, round(-most / 2), 0, 0, round(most / 4)]
    assert not weights[0, 5:].any()
    assert not weights[1].any()


def test_more_that_may_be_found_than_are_kept_at_once(way):
    """Every row is linked to the next: all are met, and far more of them pass than a walk has room for."""
    num = 5000
    codes = walk.padded((np.arange(num) * 7919 % 251).astype(np.uint8)[:, None])
    links = np.stack([(np.arange(num) + step) % num for step in (1, 2, 3)], axis=1).astype(np.int32)
    graph = walk.Graph(codes, links, np.zeros((0, 3), np.int32), np.zeros(num, np.int64), 0, 1)
    weights = walk.weights_of(graph, np.ones((1, 1)))
    is_as_expected(way, graph, weights, 300, bits(num, 0.5, seed=1))


@pytest.mark.parametrize("name", WAYS)
def test_a_walk_that_nobody_waits_for_ends(name):
    graph = graph_of(20_000, 64, links=32, levels=1, seed=1)
    weights = asked(graph, 4000, 64, seed=2)
    stop = Stop()
    threading.Timer(0.05, stop.set).start()
    start = time.monotonic()
    with pytest.raises(Cancelled), stop.here():
        WAYS[name](graph, weights, 10_000, None)
    assert time.monotonic() - start < 5
    with pytest.raises(Cancelled), Stop().here(0.05):
        WAYS[name](graph, weights, 10_000, None)
    assert time.monotonic() - start < 10


def test_without_the_library_numpy_walks(monkeypatch):
    graph = graph_of(200, 8, links=4, levels=2, seed=1)
    weights = asked(graph, 2, 8, seed=2)
    natively = walk.walk(graph, weights, 20, None, 1)
    monkeypatch.setattr(native, "library", lambda: None)
    by_numpy = walk.walk(graph, weights, 20, None, 1)
    assert [set(rows) for rows in natively] == [set(rows) for rows in by_numpy]
