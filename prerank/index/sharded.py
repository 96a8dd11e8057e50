"""Several indexes as one: each is over some of the rows, a search asks all of them and keeps the best."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prerank.errors import BundleError
from prerank.index.base import Index
from prerank.kernels.scan import check_rows
from prerank.kernels.top_k import order_keys, value_and_row
from prerank.types import CandidateSet


class ShardedIndex:
    """`parts`, of which number `shard_of[row]` (a whole number, [I]) has the row; its own rows are in their order here.

    What is found, and whether all of it, is what the parts find. Raises BundleError for parts that were built with
    different models.
    """

    def __init__(self, parts: Sequence[Index], shard_of: Tensor) -> None:
        first = parts[0].models
        for part in parts:
            if part.models != first:
                raise BundleError(f"expected shards built with {dict(first)}, found one with {dict(part.models)}")
        self.parts, self.models = tuple(parts), first
        self.shard_of = shard_of
        self._rows = [rows_of(shard_of, number) for number in range(len(parts))]
        self._place = torch.empty(len(shard_of), dtype=torch.int64)
        for rows in self._rows:
            self._place[rows] = torch.arange(len(rows))

    @property
    def is_exact(self) -> bool:
        """Whether no part ever misses one."""
        return all(part.is_exact for part in self.parts)

    @property
    def threads(self) -> int | None:
        """Of a search of each part, one after the other; see `Index`."""
        return self.parts[0].threads

    @threads.setter
    def threads(self, threads: int | None) -> None:
        for part in self.parts:
            part.threads = threads

    def search(self, query: Tensor, k: int, eligible: Tensor | None) -> CandidateSet:
        """The k most similar of all parts, ties by the smaller row; see `Index.search`."""
        of_part: Tensor | None = None
        if eligible is not None and eligible.dtype == torch.int64:
            check_rows(eligible, len(self._place))
            of_part = self.shard_of[eligible]
        keys = []
        for number, (part, rows) in enumerate(zip(self.parts, self._rows, strict=True)):
            own = None
            if eligible is not None:
                own = eligible[rows] if of_part is None else self._place[eligible[of_part == number]]
            found = part.search(query, min(k, len(rows)), own)
            assert found.similarity is not None
            keys.append(order_keys(found.similarity, rows[found.rows.clamp_min(0)], found.valid))
        every = torch.cat(keys, dim=1)
        similarity, best = value_and_row(every.topk(min(k, every.shape[1])).values)
        missing = (0, k - best.shape[1])
        best = torch.nn.functional.pad(best, missing, value=-1)
        similarity = torch.nn.functional.pad(similarity, missing, value=-torch.inf)
        return CandidateSet(rows=best, similarity=similarity, valid=best >= 0)

    def prepare(self, query: Tensor, k: int, floor: float) -> None:
        """Each part by itself, to find at least `floor` of its own k best, which those of all are among."""
        for part, rows in zip(self.parts, self._rows, strict=True):
            part.prepare(query, min(k, len(rows)), floor)

    def put(self, rows: Tensor, vectors: Tensor | None) -> None:
        """Give rows int64 [n] these vectors, each in its part; see `Index.put`."""
        of_part = self.shard_of[rows]
        for number, part in enumerate(self.parts):
            own = of_part == number
            if bool(own.any()):
                part.put(self._place[rows[own]], None if vectors is None else vectors[own])

    def own(self) -> None:
        """See `Index.own`."""
        for part in self.parts:
            part.own()


def rows_of(shard_of: Tensor, number: int) -> Tensor:
    """Those of shard `number`, int64, rising."""
    return (shard_of == number).nonzero().squeeze(1)
