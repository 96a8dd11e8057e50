"""The nouns every part speaks: a request, its candidates as columns, and the winners.

Shape letters, one legend for the whole package:
B requests, N candidates, K kept, I items, U users, D width, T tasks, L history, M bag length, E experts.

`item_id` and `user_id` are the world's stable int64 names. A `row` is a position in one version's ItemTable and
means nothing in another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import date
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

Scalar: TypeAlias = str | int | float | bool | None
Given: TypeAlias = Scalar | list[Scalar]
"""One value of one feature, as JSON or a stored profile has it; a bag's is a list."""
Array: TypeAlias = np.ndarray  # dtype and shape are stated where it is used

Features: TypeAlias = Mapping[str, Tensor]
"""Encoded features by name, all with the same leading shape [...]:
category int [...], 0 is the unknown bucket; number float32 [...]; bag int [..., M], padded with -1;
history int [..., L], oldest first, right-aligned, padded with -1 on the left; embedding float32 [..., W];
value float32 or int64 [...], as it came."""

Columns: TypeAlias = Mapping[str, Array]
"""The same as `Features`, as numpy arrays."""

Report: TypeAlias = Callable[[str, int, int, str], None]
"""How long work tells its progress: what, how much is done, of how much (0: not known), in which unit."""


def silent(what: str, done: int, total: int, unit: str) -> None:
    """The `Report` of nobody listening."""


def day_number(iso_day: str) -> int:
    """Days since 1970-01-01 of "YYYY-MM-DD"."""
    return (date.fromisoformat(iso_day) - date(1970, 1, 1)).days


@dataclass(frozen=True, slots=True)
class Request:
    """One user's question.

    `time_ms` (UTC, milliseconds) is the moment asked about: histories are cut strictly before it.
    `k` winners are wanted within `deadline_ms` milliseconds (None: no limit), none of them of the item_ids `exclude`:
    what this user has blocked, or has seen as often as a frequency cap lets. `metadata` names the columns that are
    wanted of each winner, of those that come with answers (None: all).
    """

    user_id: int
    k: int
    time_ms: int
    context: Mapping[str, Given] = field(default_factory=dict)
    deadline_ms: float | None = None
    request_id: str = ""
    exclude: tuple[int, ...] = ()
    metadata: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class ItemChange:
    """A change of one item; what is None stays as it is.

    `on` says whether it may win at all, `pacing` (0 or more) what its utility is multiplied by, `values` the new
    numbers of item `value` features that the utility reads, such as bids. `columns` are the whole item anew, whether or
    not there was one, by the names of the items table; `removed` takes it out.
    """

    item_id: int
    on: bool | None = None
    pacing: float | None = None
    values: Mapping[str, float] = field(default_factory=dict)
    columns: Mapping[str, Given] | None = None
    removed: bool = False

    def then(self, later: ItemChange) -> ItemChange:
        """Both as one: what `later` says, and what it leaves as it is."""
        assert later.item_id == self.item_id
        if later.removed:
            return later
        on = self.on if later.on is None else later.on
        pacing = self.pacing if later.pacing is None else later.pacing
        if later.columns is not None:  # the item anew, whatever its values were
            return ItemChange(self.item_id, on, pacing, later.values, later.columns)
        values = {**self.values, **later.values}
        return ItemChange(self.item_id, on, pacing, values, self.columns, self.removed)


@dataclass(frozen=True, slots=True)
class CandidateSet:
    """Candidates of B requests as aligned columns; stages add columns or clear bits of `valid`, never reorder.

    rows int64 [B, N] into one version's ItemTable; similarity float32 [B, N]; valid bool [B, N].
    `slots` int64 [B, N] says where their features are, -1 nowhere; without it the ItemTable does. `found_by` int64
    [B, N] has a bit for each generator that found them; without it the index did.
    `values`, numbers [B, N] by name of an item `value` that the utility reads, count in place of the items' own.
    Where `valid` is False the other columns hold no meaning.
    """

    rows: Tensor
    similarity: Tensor
    valid: Tensor
    slots: Tensor | None = None
    found_by: Tensor | None = None
    values: Features = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.rows.dim() == 2
        assert self.rows.shape == self.similarity.shape == self.valid.shape
        assert self.rows.dtype == torch.int64
        assert self.valid.dtype == torch.bool
        assert self.slots is None or self.slots.shape == self.rows.shape
        assert all(column.shape == self.rows.shape for column in self.values.values())

    @property
    def num_valid(self) -> int:
        """How many candidates are valid over all B requests."""
        return int(np.count_nonzero(self.valid.numpy())) if self.valid.is_cpu else int(self.valid.sum())


@dataclass(frozen=True, slots=True)
class TopK:
    """The winners, best first; ties are broken by the smaller item_id.

    rows, item_ids int64 [B, K]; utility float32 [B, K] in micros per impression; probs float32 [B, K, T];
    valid bool [B, K], False past the last winner.
    """

    rows: Tensor
    item_ids: Tensor
    utility: Tensor
    probs: Tensor
    valid: Tensor
