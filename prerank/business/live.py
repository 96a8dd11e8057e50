"""What changes of an item while a version serves: whether it is on, its pacing, and the values the utility reads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from prerank.types import Features, ItemChange


class LiveItems(nn.Module):
    """on bool [C], pacing float32 [C] and each of `values` as float32 [C]: columns that are changed where they stand.

    The first `num_items` rows begin as published, on and at pacing 1; rows that nobody has taken are not on. None of it
    is in the state_dict: what is live is not a version. A reader sees all of a call's changes or none of them.
    """

    on: Tensor
    pacing: Tensor

    def __init__(self, num_rows: int, values: Features, num_items: int | None = None) -> None:
        super().__init__()
        self.num_items = num_rows if num_items is None else num_items
        self.register_buffer("on", torch.arange(num_rows) < self.num_items, persistent=False)
        self.register_buffer("pacing", torch.ones(num_rows), persistent=False)
        self.names = tuple(values)
        for name, column in values.items():
            assert column.shape == (num_rows,)
            self.register_buffer(f"value_{name}", column.float().clone(), persistent=False)
        self._num_on = self.num_items
        self._lock = threading.Lock()
        self.changed: Callable[[Tensor, Tensor | None], None] | None = None
        """Told of rows int64 [n] that changed, when they have, on the thread that changed them.

        And of those of them that items newly have, int64 [m], if there are any.
        """

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
                if column is self.on:
                    self._num_on += int(numbers.sum()) - int(column[at].sum())
                column[at] = numbers
        if writes and self.changed is not None:
            self.changed(torch.tensor(sorted({row for new in wanted.values() for row in new})), None)

    def prepare(self, rows: Tensor, values: Features, pacing: Tensor) -> None:
        """What rows int64 [n] that nobody has taken will be worth: values float32 [n] by name, pacing float32 [n]."""
        with torch.inference_mode():
            self.pacing[rows] = pacing
            for name in self.names:
                self.value(name)[rows] = values[name].float()

    def swap(self, taken: Tensor, on: Tensor, left: Tensor) -> None:
        """Rows int64 [n] that items now have, bool [n] whether those are on, and rows int64 [m] that nobody has now."""
        with self._lock, torch.inference_mode():
            self._num_on += int(on.sum()) - int(self.on[left].sum())
            self.num_items += len(taken) - len(left)
            self.on[left] = False
            self.on[taken] = on
        if self.changed is not None:
            self.changed(torch.cat([taken, left]), taken if len(taken) else None)

    @property
    def num_on(self) -> int:
        """How many items are on."""
        return self._num_on

    def value(self, name: str) -> Tensor:
        """float32 [C]."""
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
        """Of eligible rows int64 [n] (None: all) those that are on; where all items are, None for all.

        Of all, bool [C]: where the items are that are on.
        """
        with self._lock:
            if rows is None:
                return None if self._num_on == self.num_items else self.on.clone()
            return rows if self._num_on == len(self.on) else rows[self.on[rows]]
