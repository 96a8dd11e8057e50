"""A graph over item vectors that leads a query to its most similar rows: HNSW, built by faiss, known to this file only.

Inner products make a poor graph by themselves: pruning leaves each row few links, all to long vectors, and many rows
are reached from nowhere. Between vectors made equally long by one more number (Bachrach et al. 2014, "Speeding up the
Xbox recommender", Theorem 1) nearness is the inner product with a query, but its links join items that are alike, and
users are not items. So both graphs are built, of vectors around their mean, and each row keeps the links of both: on
vectors as towers give them a narrower search then finds as many (`benchmarks.retrieval`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor

from prerank.errors import BundleError, ConfigError
from prerank.kernels import walk
from prerank.types import Array

LINKS = 16
"""Links of a row on each level above the lowest, which has twice as many."""
_EF_CONSTRUCTION = 100
_MOST_LEVELS = 32
_ROWS_AT_ONCE = 1 << 16


@dataclass(frozen=True, slots=True)
class Links:
    """HNSW over I rows: `levels` uint8 [I], how many each row is on; `neighbors` int32, level by level of row by row.

    A row has 2 LINKS places on its lowest level, LINKS on each above, -1 past the last. `entry` is where a search
    starts. A row that nobody should find has one level and no links. `codes` uint8 [I, D] are what is compared on the
    way, each number between the least and the most of its column, `ranges` float32 [2, D]: the least, and the most over
    it.
    """

    levels: Tensor
    neighbors: Tensor
    codes: Tensor
    ranges: Tensor
    entry: int

    def to_tensors(self) -> dict[str, Tensor]:
        """By name, for a file; `entry` is not among them."""
        names = ("levels", "neighbors", "codes", "ranges")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], entry: object, num_rows: int, dim: int) -> Self:
        """What `to_tensors` gave, for vectors [num_rows, dim].

        Raises BundleError for what would lead a search out of its memory.
        """
        said = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
        levels, neighbors = tensors.get("levels"), tensors.get("neighbors")
        wanted = {
            "levels": (torch.uint8, (num_rows,)),
            "neighbors": (torch.int32, (0 if neighbors is None else neighbors.numel(),)),
            "codes": (torch.uint8, (num_rows, dim)),
            "ranges": (torch.float32, (2, dim)),
        }
        if said != wanted or levels is None or neighbors is None or type(entry) is not int:
            raise BundleError(
                f"a graph over [{num_rows}, {dim}]: expected {wanted} and a row to enter by, found {said}"
            )
        links = cls(levels, neighbors, tensors["codes"], tensors["ranges"], entry)
        fault = links._fault()
        if fault:
            raise BundleError(f"a graph over [{num_rows}, {dim}]: {fault}; publish again")
        return links

    def _fault(self) -> str | None:
        levels, neighbors = self.levels.numpy(), self.neighbors.numpy()
        if not len(levels) or levels.min() < 1 or levels.max() > _MOST_LEVELS:
            return f"expected each row on 1 to {_MOST_LEVELS} levels"
        if not 0 <= self.entry < len(levels) or levels[self.entry] != levels.max():
            return f"expected a search to start from a row of the highest level, found {self.entry}"
        if _starts(levels)[-1] != len(neighbors):
            return f"expected {_starts(levels)[-1]} places for links, found {len(neighbors)}"
        if not bool(self.ranges.isfinite().all()):
            return "expected finite ranges of the codes"
        if len(neighbors) and (neighbors.min() < -1 or neighbors.max() >= len(levels)):
            return f"expected links to rows up to {len(levels) - 1}, found {neighbors.min()} to {neighbors.max()}"
        # a link on a higher level is followed on that level, where its row must have places too
        starts = _starts(levels)
        for level in range(1, int(levels.max())):
            rows = np.flatnonzero(levels > level)
            linked = neighbors[starts[rows, None] + LINKS * (level + 1) + np.arange(LINKS)]
            wrong = ((linked >= 0) & (levels[linked] <= level)).any(1)
            if wrong.any():
                return f"a link of row {rows[wrong][0]} on level {level} leads to a row that is not on it"
        return None


def build_links(vectors: Array, threads: int) -> Links | None:
    """The graph over float32 [I, D], of the rows that are finite; None where there is none.

    Raises ConfigError where faiss is not installed.
    """
    faiss = _faiss()
    found = np.flatnonzero(np.isfinite(vectors).all(1))
    if not len(found):
        return None
    some = np.ascontiguousarray(vectors[found])
    around = some - some.mean(0)
    squares = np.einsum("nd,nd->n", around, around)
    as_long = np.concatenate([around, np.sqrt(squares.max() - squares)[:, None]], axis=1)
    faiss.omp_set_num_threads(threads)
    near = faiss.IndexHNSWFlat(as_long.shape[1], LINKS, faiss.METRIC_L2)
    suiting = faiss.IndexHNSWFlat(around.shape[1], LINKS, faiss.METRIC_INNER_PRODUCT)
    for index, numbers in ((near, as_long), (suiting, around)):
        index.hnsw.efConstruction = _EF_CONSTRUCTION
        index.add(numbers)
    levels = faiss.vector_to_array(near.hnsw.levels).astype(np.uint8)
    assert (levels == faiss.vector_to_array(suiting.hnsw.levels)).all(), "one seed gives the same levels"
    neighbors = _array(faiss, near.hnsw.neighbors).copy()
    others = _array(faiss, suiting.hnsw.neighbors)
    starts = _starts(levels)[:-1]
    for first in range(0, len(starts), _ROWS_AT_ONCE):
        # a row's lowest level comes first
        lowest = starts[first : first + _ROWS_AT_ONCE, None] + np.arange(2 * LINKS)
        neighbors[lowest] = _both(neighbors[lowest], others[lowest])
    entry = int(found[near.hnsw.entry_point])
    all_levels, all_neighbors = _among_all(levels, neighbors, found, len(vectors))
    codes, ranges = _encode(some)
    all_codes = np.zeros((len(vectors), codes.shape[1]), np.uint8)
    all_codes[found] = codes
    levels_I, neighbors_N = torch.from_numpy(all_levels), torch.from_numpy(all_neighbors)
    return Links(levels_I, neighbors_N, torch.from_numpy(all_codes), torch.from_numpy(ranges), entry)


class Graph:
    """`links` as a walk wants them, in memory of their own, ready to be searched by several threads at once."""

    def __init__(self, links: Links) -> None:
        self.links = links
        levels, neighbors = links.levels.numpy(), links.neighbors.numpy()
        starts = _starts(levels)[:-1]
        lowest = np.empty((len(levels), 2 * LINKS), np.int32)
        for first in range(0, len(levels), _ROWS_AT_ONCE):
            some = slice(first, first + _ROWS_AT_ONCE)
            lowest[some] = neighbors[starts[some, None] + np.arange(2 * LINKS)]
        above = levels.astype(np.int64) - 1
        first_of = np.cumsum(above) - above
        high = np.repeat(np.arange(len(levels)), above)
        places = starts[high] + LINKS * (2 + np.arange(len(high)) - first_of[high])
        upper = neighbors[places[:, None] + np.arange(LINKS)]
        self._walked = walk.Graph(
            walk.padded(links.codes.numpy()), lowest, upper, first_of, links.entry, int(levels.max())
        )
        self._walked.settle()

    @property
    def num_rows(self) -> int:
        """How many rows there are, found or not."""
        return len(self.links.levels)

    def find(self, query: Tensor, width: int, bits: Array | None, threads: int) -> Array:
        """Query float32 [B, D] -> rows int64 [B, width] in no order, -1 past the last.

        They are of the `width` best that a search finds which keeps so many; of rows r whose bit r of `bits` uint8, the
        lowest first, is set, if it is not None. See `walk.walk`.
        """
        # the least of a column adds the same to every row
        weights = walk.weights_of(self._walked, query.detach().numpy() * self.links.ranges[1].numpy())
        return walk.walk(self._walked, weights, width, bits, threads)


def _both(first: Array, second: Array) -> Array:
    """Links int32 [n, m] twice -> [n, m], the first's, then those of the second that are not among them."""
    m = first.shape[1]
    second = second.copy()
    for place in range(m):
        second[second == first[:, place : place + 1]] = -1
    both = np.concatenate([first, second], axis=1)
    order = np.argsort(both < 0, axis=1, kind="stable")[:, :m]
    return np.take_along_axis(both, order, axis=1)


def _among_all(levels: Array, neighbors: Array, found: Array, num_rows: int) -> tuple[Array, Array]:
    """The graph over the rows `found` as one over all `num_rows`, of which the others have no links."""
    all_levels = np.ones(num_rows, np.uint8)
    all_levels[found] = levels
    starts, all_starts = _starts(levels), _starts(all_levels)
    moved = np.repeat(all_starts[found] - starts[:-1], np.diff(starts)) + np.arange(len(neighbors))
    all_neighbors = np.full(all_starts[-1], -1, np.int32)
    all_neighbors[moved] = np.where(neighbors < 0, -1, found[neighbors])
    return all_levels, all_neighbors


def _starts(levels: Array) -> Array:
    """Where each row's places begin, and behind the last: int64 [I + 1]."""
    places = LINKS * (levels.astype(np.int64) + 1)
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(places)])


def _encode(vectors: Array) -> tuple[Array, Array]:
    """float32 [n, D] as faiss's QT_8bit does: uint8 codes, and their ranges float32 [2, D]."""
    least = vectors.min(0)
    over = vectors.max(0) - least
    codes = (vectors - least) / np.where(over > 0, over, 1) * 255
    return codes.astype(np.uint8), np.stack([least, over]).astype(np.float32)


class _Memory(Protocol):
    """A vector of C++."""

    def data(self) -> object: ...

    def size(self) -> int: ...


def _array(faiss: ModuleType, memory: _Memory) -> Array:
    """Its numbers where they lie."""
    numbers: Array = faiss.rev_swig_ptr(memory.data(), memory.size())
    return numbers


def _faiss() -> ModuleType:
    """The library, looked for when a graph is needed: an index that is exact does without."""
    try:
        import faiss
    except ImportError as error:
        raise ConfigError(f"an index of kind 'hnsw' needs an extra, {error}; pip install 'prerank[hnsw]'") from None
    library: ModuleType = faiss
    return library
