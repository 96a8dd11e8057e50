"""A walk over a graph of rows to those most like a query, by their codes: in numpy, the reference, and natively.

Codes and weights are whole numbers, so that every version finds the very same rows. A walk is limited by how long
memory takes to answer, not by how much it gives: there is no Triton version, and on a GPU looking at every row serves.
"""

from __future__ import annotations

import ctypes
import heapq
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from prerank.kernels import layout, native, ranges
from prerank.kernels.pages import in_large_pages
from prerank.kernels.stop import current
from prerank.kernels.work import Work
from prerank.types import Array

MOST_LINKS = 256
_LANES = 32  # codes that are read together
_SUM = (1 << 31) - 1
_STEPS_A_LOOK = 64


class _Walk(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "weights", "lowest", "upper", "first_of", "may", "found")),
        *(
            (name, ctypes.c_int64)
            for name in (
                *("rows", "stride", "lowest_links", "upper_links", "entry", "levels"),
                *("num_queries", "width", "threads", "level"),
            )
        ),
        ("stop", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class Graph:
    """I rows, each linked to others, on one level or more: a walk starts from `entry`, on the highest of `levels`.

    `codes` uint8 [I, S], S a multiple of 32, stand for the rows' numbers. `lowest` int32 [I, M] and `upper` int32
    [U, M'] are links, -1 past the last; a row's on levels 1, 2, ... start at its own of `first_of` int64 [I].
    Links must be to rows there are, and that are on that level: nothing is checked.
    """

    codes: Array
    lowest: Array
    upper: Array
    first_of: Array
    entry: int
    levels: int

    def __post_init__(self) -> None:
        assert self.codes.dtype == np.uint8
        assert self.codes.shape[1] % _LANES == 0
        assert 0 < len(self.codes) < 1 << 32, "a row is the lower half of a key"
        assert self.lowest.dtype == self.upper.dtype == np.int32
        assert len(self.lowest) == len(self.first_of) == len(self.codes)
        assert max(self.lowest.shape[1], self.upper.shape[1]) <= MOST_LINKS
        assert 0 <= self.entry < len(self.codes)
        assert all(array.flags.c_contiguous for array in (self.codes, self.lowest, self.upper, self.first_of))

    def settle(self) -> None:
        """Put what a walk jumps about in into large pages, where the system has them."""
        for array in (self.codes, self.lowest):
            in_large_pages(array.ctypes.data, array.nbytes)

    @cached_property
    def most_weight(self) -> int:
        """The largest weight of which no sum is too large for 32 bits."""
        return min((1 << 15) - 1, _SUM // (255 * int(self.codes.shape[1])))


def padded(codes: Array) -> Array:
    """uint8 [I, D] -> [I, S], zeros behind, in memory of its own."""
    dim = codes.shape[1]
    return np.pad(codes, ((0, 0), (0, layout.padded(dim, _LANES) - dim)))


def weights_of(graph: Graph, query: Array) -> Array:
    """Float [B, D], what a code of each column counts -> int16 [B, S], in proportion; what is not finite counts 0."""
    query = np.nan_to_num(query, nan=0.0, posinf=0.0, neginf=0.0)
    most = np.abs(query).max(1, keepdims=True, initial=0.0)
    weights = np.zeros((len(query), graph.codes.shape[1]), np.int16)
    weights[:, : query.shape[1]] = np.rint(query * (graph.most_weight / np.where(most > 0, most, 1)))
    return weights


def walk(graph: Graph, weights: Array, width: int, may: Array | None, threads: int) -> Array:
    """Weights int16 [B, S] -> rows int64 [B, width] in no order, -1 past the last.

    A walk keeps the `width` rows most similar to a query of those it met, and ends when it has followed the links of
    all of them; a row's similarity is the sum of its codes times the weights, and of equal ones the smaller row's is
    larger. It gives what it kept; where `may` uint8 has a bit a row, the lowest first, the `width` most similar of all
    it met whose bit is set.

    Raises Cancelled where `stop.current` is set before it ends.
    """
    assert weights.dtype == np.int16
    assert weights.shape[1] == graph.codes.shape[1]
    assert width > 0
    assert may is None or (may.dtype == np.uint8 and len(may) == -(-len(graph.codes) // 8))
    if native.library() is None:
        return walk_by_numpy(graph, weights, width, may)
    return walk_natively(graph, weights, width, may, threads, native.level())


def walk_natively(graph: Graph, weights: Array, width: int, may: Array | None, threads: int, level: str) -> Array:
    """The same with the instructions of `level`, one of `native.LEVELS` that this processor has.

    Raises MemoryError where there is not the memory for what is kept of a query on each thread.
    """
    library = native.library()
    assert library is not None
    found = np.full((len(weights), width), -1, np.int64)
    weights = np.ascontiguousarray(weights)
    may = None if may is None else np.ascontiguousarray(may)
    stop = current()
    arrays = (graph.codes, weights, graph.lowest, graph.upper, graph.first_of, may, found)
    asked = _Walk(
        *(None if array is None else array.ctypes.data for array in arrays),
        *(*graph.codes.shape, graph.lowest.shape[1], graph.upper.shape[1], graph.entry, graph.levels),
        *(len(weights), width, threads, native.LEVELS.index(level)),
        stop.address,
    )
    with ranges.kernel("native walk", lambda: _work(graph, len(weights), width)):
        is_out_of_memory = library.prerank_walk(ctypes.byref(asked))
    if is_out_of_memory:
        raise MemoryError(f"no memory to keep the {width} best of a walk on {threads} threads")
    stop.check()
    return found


def _work(graph: Graph, num_queries: int, width: int) -> Work:
    """Of the rows it keeps, the least a walk meets: their links and codes, each read once."""
    row_bytes = graph.codes.shape[1] + graph.lowest.strides[0]
    return Work(num_bytes=num_queries * width * (row_bytes + 8))


def walk_by_numpy(graph: Graph, weights: Array, width: int, may: Array | None) -> Array:
    """The reference; one query after the other."""
    found = np.full((len(weights), width), -1, np.int64)
    is_found = None if may is None else np.unpackbits(may, bitorder="little")[: len(graph.codes)].astype(bool)
    for query, rows in zip(weights.astype(np.int64), found, strict=True):
        best = _walked(graph, query, width, is_found)
        rows[: len(best)] = best
    return found


def _walked(graph: Graph, query: Array, width: int, is_found: Array | None) -> list[int]:
    def keys(rows: Array) -> list[int]:
        similarity = graph.codes[rows] @ query
        return [(int(s) << 32) | (0xFFFFFFFF - int(row)) for s, row in zip(similarity, rows, strict=True)]

    start = _descended(graph, keys)
    met = np.zeros(len(graph.codes), bool)
    met[_row(start)] = True
    beam, still_open, passed = [start], [-start], [start]
    stop = current()
    for step in range(len(graph.codes)):
        if step % _STEPS_A_LOOK == 0:
            stop.check()
        if not still_open or (len(beam) == width and -still_open[0] < beam[0]):
            break
        links = graph.lowest[_row(-heapq.heappop(still_open))]
        fresh = np.unique(links[links >= 0])
        fresh = fresh[~met[fresh]]
        met[fresh] = True
        for key in keys(fresh):
            passed.append(key)
            if len(beam) == width and key < beam[0]:
                continue
            heapq.heappush(still_open, -key)
            heapq.heappush(beam, key)
            if len(beam) > width:
                heapq.heappop(beam)
    if is_found is None:
        return [_row(key) for key in beam]
    return [_row(key) for key in heapq.nlargest(width, (key for key in passed if is_found[_row(key)]))]


def _descended(graph: Graph, keys: Callable[[Array], list[int]]) -> int:
    """The key of the best row on the way down to the lowest level."""
    (best,) = keys(np.array([graph.entry]))
    for level in range(graph.levels - 1, 0, -1):
        before = None
        while best != before:
            before = best
            links = graph.upper[graph.first_of[_row(best)] + level - 1]
            best = max([best, *keys(links[links >= 0])])
    return best


def _row(key: int) -> int:
    return 0xFFFFFFFF - (key & 0xFFFFFFFF)
