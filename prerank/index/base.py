"""What an index promises, and every index a funnel file may name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, Self

from torch import Tensor

from prerank.index.exact import ExactIndex
from prerank.index.hnsw import HNSWIndex
from prerank.index.storage import Storage
from prerank.types import CandidateSet


class Index(Protocol):
    """The k most similar eligible rows.

    `models` is the version of each model the vectors were made with, by name, as read from its file. `threads` is how
    many a search may use, None for torch's number; it changes no answer.
    """

    threads: int | None
    models: Mapping[str, str]

    @property
    def is_exact(self) -> bool:
        """Whether none is ever missed."""
        ...

    def search(self, query: Tensor, k: int, eligible: Tensor | None) -> CandidateSet:
        """query float32 [B, D] -> [B, k], best first; ties are broken by the smaller row.

        `eligible` says which rows may be found: bool [I], or int64 [N] the rows themselves in strictly rising order,
        which few are better given as, or None for all. Where fewer than k rows are eligible and of finite similarity
        the rest is not valid, with row -1. Raises IndexError for rows that do not rise or that there are not.
        """
        ...

    def put(self, rows: Tensor, vectors: Tensor | None) -> None:
        """Give rows int64 [n] the vectors float32 [n, D]; with None nobody finds them, as rows published with NaN.

        Rows that nobody found are found once they are whole, not before; one call at a time.
        """
        ...

    def prepare(self, query: Tensor, k: int, floor: float) -> None:
        """Make ready to find at least `floor` of the `k` best of queries like `query` float32 [Q, D].

        What it builds and measures for that is saved, and loaded again. Until then, and for a larger k, it is exact.
        """
        ...

    def own(self) -> None:
        """Hold what was mapped from a file in memory of this process's own, so that `put` need not copy its pages."""
        ...


class StoredIndex(Index, Protocol):
    """One that is made of vectors, and is a file."""

    def __init__(self, vectors: Tensor, storage: Storage = "float32") -> None:
        """Over item vectors float32 [I, D], one a row, kept as `storage`; similarities are those of what is kept."""

    def save(self, path: Path, models: Mapping[str, str]) -> None:
        """Write one file, `models` beside the vectors."""
        ...

    @classmethod
    def load(cls, path: Path) -> Self:
        """What `save` wrote. Raises BundleError for anything else."""
        ...


INDEXES: dict[str, type[StoredIndex]] = {"exact": ExactIndex, "hnsw": HNSWIndex}
