"""The index of a process whose published items are searched elsewhere: what came since is found in it, nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from prerank.index.exact import ExactIndex
from prerank.index.storage import Storage
from prerank.types import CandidateSet


class SlackIndex(ExactIndex):
    """Rows from `first` on, of which there are `num`, by the rows they have in the version; empty until `put`.

    Vectors are `width` wide and kept as `storage`, as those are that index hosts search.
    """

    def __init__(self, first: int, num: int, width: int, storage: Storage) -> None:
        super().__init__(torch.full((num, width), torch.nan), storage)
        self._first = first

    def search(self, query: Tensor, k: int, eligible: Tensor | None) -> CandidateSet:
        """See `Index.search`; rows before `first` are found by nobody."""
        if eligible is not None:
            is_mask = eligible.dtype == torch.bool
            eligible = eligible[self._first :] if is_mask else eligible[eligible >= self._first] - self._first
        found = super().search(query, k, eligible)
        return CandidateSet(torch.where(found.valid, found.rows + self._first, -1), found.similarity, found.valid)

    def put(self, rows: Tensor, vectors: Tensor | None) -> None:
        """See `Index.put`; rows before `first`, which their hosts go on finding, are let be."""
        ours = rows >= self._first
        super().put(rows[ours] - self._first, None if vectors is None else vectors[ours])
