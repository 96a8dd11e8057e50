"""Where items are that are no longer in the row they were published in, or that came since."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prerank.types import Array


@dataclass(frozen=True, slots=True)
class Moved:
    """item_ids int64 [M], ascending, and the row int64 [M] of each, -1 of one that left. At least one."""

    item_ids: Tensor
    rows: Tensor

    @classmethod
    def of(cls, item_ids: Tensor, rows: Tensor) -> Moved:
        """Items int64 [n] in any order, each once, and their rows int64 [n]."""
        item_ids, order = item_ids.sort()
        return cls(item_ids, rows[order])

    def over(self, item_ids: Array, rows: Array) -> Array:
        """`rows` int64 [...] of `item_ids` int64 [...] as published -> where they are."""
        ids, where = self.item_ids.numpy(), self.rows.numpy()
        at = np.minimum(np.searchsorted(ids, item_ids), len(ids) - 1)
        return np.where(ids[at] == item_ids, where[at], rows)

    def then(self, later: Moved) -> Moved:
        """All of both, as `later` says it. Those that moved before are copied, not looked up or sorted again."""
        at = torch.searchsorted(self.item_ids, later.item_ids)
        is_known = self.item_ids[at.clamp_max(len(self.item_ids) - 1)] == later.item_ids
        rows = self.rows.index_put((at[is_known],), later.rows[is_known])
        is_new = ~is_known
        if not bool(is_new.any()):
            return Moved(self.item_ids, rows)
        to = at[is_new] + torch.arange(int(is_new.sum()))
        is_old = torch.ones(len(rows) + len(to), dtype=torch.bool)
        is_old[to] = False
        merged = []
        for before, more in ((self.item_ids, later.item_ids[is_new]), (rows, later.rows[is_new])):
            column = torch.empty(len(is_old), dtype=torch.int64)
            column[is_old], column[to] = before, more
            merged.append(column)
        return Moved(*merged)
