"""What changes of an item while a version serves: whether it is on, its pacing, and the values the utility reads."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from prerank.types import Features, ItemChange


class LiveItems(nn.Module):
    """on bool [I], pacing float32 [I] and each of `values` as float32 [I]: columns that are changed where they stand.

    They begin as published, all on and at pacing 1, and are no part of the state_dict: what is live is not a version.
    A reader sees all of a call's changes or none of them.
    """

    on: Tensor
    pacing: Tensor

    def __init__(self, num_items: int, values: Features) -> None:
        super().__init__()
        self.register_buffer("on", torch.ones(num_items, dtype=torch.bool), persistent=False)
        self.register_buffer("pacing", torch.ones(num_items), persistent=False)
        self.names = tuple(values)
        for name, column in values.items():
            assert column.shape == (num_items,)
            self.register_buffer(f"value_{name}", column.float().clone(), persistent=False)
        self.is_changed = False
        self._lock = threading.Lock()

    def change(self, rows: Sequence[int], changes: Sequence[ItemChange]) -> None:
        """Change the items of these rows, one a change, in order; a row below 0 is none of ours and stays out."""
        wanted: dict[str, dict[int, float]] = {}  # by buffer and row: of a row given twice the later one counts
        for row, one in zip(rows, changes, strict=True):
            if row < 0:
                continue
            said = {
                "on": one.on,
                "pacing": one.pacing,
                **{f"value_{name}": value for name, value in one.values.items()},
            }
            for name, value in said.items():
                if value is not None:
                    wanted.setdefault(name, {})[row] = value
        writes = []
        for name, new in wanted.items():
            column = self.get_buffer(name)
            writes.append((column, torch.tensor(list(new)), torch.tensor(list(new.values()), dtype=column.dtype)))
        # readers wait for the lock, so nothing is done under it but the writing
        with self._lock, torch.inference_mode():
            for column, at, numbers in writes:
                column[at] = numbers
            self.is_changed = self.is_changed or bool(writes)

    def value(self, name: str) -> Tensor:
        """float32 [I]."""
        return self.get_buffer(f"value_{name}")

    def gather(self, rows: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Rows int64 [B, N] -> on bool [B, N], pacing float32 [B, N] and each value float32 [B, N], of one moment."""
        if torch.compiler.is_compiling():  # whoever runs the graph keeps it and the changes apart
            return self._gathered(rows)
        with self._lock:
            return self._gathered(rows)

    def _gathered(self, rows: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        return self.on[rows], self.pacing[rows], {name: self.value(name)[rows] for name in self.names}

    def among(self, rows: Tensor | None) -> Tensor | None:
        """Of eligible rows int64 [n] (None: all) those that are on; None where all items are."""
        with self._lock:
            if not self.is_changed or bool(self.on.all()):
                return rows
            return self.on.nonzero().squeeze(1) if rows is None else rows[self.on[rows]]
