"""The features of items as buffers of the model: no fetch, no copy, a row number away.

A row is an item's place among all items of a version. Features of resident items are kept in slots: where every item
is resident its slot is its row, and where some are not, `slots` says which it is, or that there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from prerank.bundle.moved import Moved
from prerank.errors import BundleError, DataError
from prerank.kernels.lookup import Lookup
from prerank.schema import Bag, Category, Embedding, FeatureSchema
from prerank.types import Array, Columns, Features

_PREFIX, _KNOWN = "feature_", "known_"  # a feature may be called like an attribute of a module
_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)
_AT_ONCE = 1 << 16

Empty: TypeAlias = Callable[[Sequence[int], torch.dtype], Tensor]
"""Gives a tensor of a shape and type to write into."""


def _in_memory(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype)


@dataclass(frozen=True, slots=True)
class Room:
    """What a table has room for beside the items it is built of.

    `slack` rows for items that come later and, where bool [I] `resident` leaves items out, `cached` slots for those
    that are fetched. Of all items, resident or not, the features in `known` are kept. `most` is the largest code that
    a category or bag may have, of an item that comes later too; without it, that of the items there are.
    """

    slack: int = 0
    cached: int = 0
    resident: Array | None = None
    known: frozenset[str] = frozenset()
    most: Mapping[str, int] = field(default_factory=dict)


class ItemTable(nn.Module):
    """item_ids int64 [C] and each feature [S, ...]; the first `num_published` rows ascend with their item_id.

    The other rows are slack: free until an item comes while serving. `slots` int32 [C] is the slot of each row, -1 for
    an item that is not resident; without it row and slot are one, S = C. Where there are slots, `known` are features
    [C, ...] of every row, resident or not. `popularity` float32 [C, P] is what the item tower reads beside features.
    Integers are held in a small type that keeps them all; floats are float32, as they came.
    Raises BundleError where the columns cannot be one table.
    """

    item_ids: Tensor
    published: Tensor
    slots: Tensor | None
    popularity: Tensor | None

    def __init__(
        self,
        item_ids: Tensor,
        features: Features,
        num_published: int | None = None,
        slots: Tensor | None = None,
        known: Features | None = None,
        popularity: Tensor | None = None,
    ) -> None:
        super().__init__()
        num_published = len(item_ids) if num_published is None else num_published
        ascend = item_ids[:num_published]
        if item_ids.dtype != torch.int64 or item_ids.dim() != 1 or not bool((ascend[1:] > ascend[:-1]).all()):
            raise BundleError("items: expected int64 item_ids, strictly ascending; the table is damaged")
        if not 0 < num_published <= len(item_ids):
            raise BundleError(f"items: {num_published} of {len(item_ids)} rows published; the table is damaged")
        self.num_published = num_published
        self.register_buffer("item_ids", item_ids)
        self.register_buffer("published", torch.tensor(num_published))
        self.names = tuple(features)
        self.known = tuple(known or {})
        num_slots = len(item_ids) if slots is None else _num_slots(features)
        if slots is not None and (slots.dtype, len(slots)) != (torch.int32, len(item_ids)):
            raise BundleError(f"items: expected slots int32 [{len(item_ids)}], found {_dtype(slots)} [{len(slots)}]")
        if slots is not None and bool(((slots < -1) | (slots >= num_slots)).any()):
            raise BundleError(f"items: expected slots from -1 to {num_slots - 1}; the table is damaged")
        if popularity is not None and (popularity.dim() != 2 or len(popularity) != len(item_ids)):
            raise BundleError(f"items: popularity is {list(popularity.shape)} for {len(item_ids)} rows")
        self.register_buffer("slots", slots)
        self.register_buffer("popularity", popularity)
        for prefix, columns, num in ((_PREFIX, features, num_slots), (_KNOWN, known or {}, len(item_ids))):
            for name, column in columns.items():
                if column.dim() == 0 or column.shape[0] != num:
                    raise BundleError(f"items: {name!r} is {list(column.shape)} for {num} items")
                if column.dtype not in (*_INTEGERS, torch.float32):
                    raise BundleError(f"items: {name!r} is {_dtype(column)}; expected whole numbers or float32")
                self.register_buffer(prefix + name, column)
        # of the items published, in the first slots; others may have one for a while
        self.num_resident = num_published if slots is None else int((slots[:num_published] >= 0).sum())
        self._moved: Moved | None = None
        self._places: Lookup | None = None
        self.num_items = num_published

    @classmethod
    def build(
        cls,
        item_ids: Array,
        columns: Columns,
        room: Room | None = None,
        popularity: Array | None = None,
        empty: Empty = _in_memory,
    ) -> Self:
        """From item_ids int64 [I] in any order and encoded features aligned with them; `room` is for what comes later.

        The table is written piece by piece into what `empty` gives. Raises DataError for no items, an item_id given
        twice, a column of another length or of a type the table cannot keep as it is.
        """
        room = room or Room()
        if not len(item_ids):
            raise DataError("items: expected at least one item, got none")
        ids = np.asarray(item_ids, dtype=np.int64)
        order = np.argsort(ids, kind="stable") if (ids[1:] <= ids[:-1]).any() else None
        ids = ids if order is None else ids[order]
        twice = np.flatnonzero(ids[1:] == ids[:-1])
        if len(twice):
            raise DataError(f"items: expected each item_id once, got {ids[twice[0]]} twice")
        resident = None
        if room.resident is not None:
            resident = np.flatnonzero(room.resident if order is None else room.resident[order])
        features, known = {}, {}
        for name, column in columns.items():
            if len(column) != len(ids):
                raise DataError(f"items: {name!r} has {len(column)} rows for {len(ids)} item_ids")
            kept = _smallest(name, column, room.most.get(name))
            places = order
            if resident is not None:
                places = resident if order is None else order[resident]
            cached = 0 if resident is None else room.cached
            features[name] = _laid_out(column, places, room.slack + cached, kept, empty)
            if resident is not None and name in room.known:
                known[name] = _laid_out(column, order, room.slack, kept, empty)
        slots = None
        if resident is not None:
            slots = np.full(len(ids) + room.slack, -1, np.int32)
            slots[resident] = np.arange(len(resident))
            slots[len(ids) :] = len(resident) + np.arange(room.slack)
        if popularity is not None:
            popularity = _padded(
                np.asarray(popularity, np.float32)[slice(None) if order is None else order], room.slack
            )
        return cls(
            torch.from_numpy(_padded(np.array(ids), room.slack)),
            features,
            len(ids),
            None if slots is None else torch.from_numpy(slots),
            known,
            None if popularity is None else torch.from_numpy(popularity),
        )

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor]) -> Self:
        """From this module's own state_dict, without a copy. Raises BundleError as the constructor."""
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith((_PREFIX, _KNOWN))}
        if not {"item_ids", "published"} <= set(own) <= {"item_ids", "published", "slots", "popularity"}:
            raise BundleError(f"items: expected item_ids, published and features, found {sorted(own) or 'no item_ids'}")
        features, known = (
            {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            for prefix in (_PREFIX, _KNOWN)
        )
        published = own["published"]
        if published.dtype != torch.int64 or published.dim():
            raise BundleError(f"items: expected published int64 [], found {_dtype(published)} {list(published.shape)}")
        slots, popularity = own.get("slots"), own.get("popularity")
        return cls(own["item_ids"], features, int(published), slots, known, popularity)

    @property
    def num_rows(self) -> int:
        """C: the items published, and the slack."""
        return len(self.item_ids)

    @property
    def num_slots(self) -> int:
        """S: how many items' features there is room for."""
        return self.num_rows if self.slots is None or not self.names else len(self._column(self.names[0]))

    @property
    def is_in_order(self) -> bool:
        """Whether rows still ascend with item_id: none has moved."""
        return self._moved is None

    def rows_of(self, item_ids: Tensor) -> Tensor:
        """item_ids int64 [...] -> rows int64 [...]; -1 for an item that is not here."""
        return torch.from_numpy(self.rows_among(item_ids.numpy()))

    def rows_among(self, item_ids: Array) -> Array:
        """`rows_of` of an array."""
        if self._places is None:  # a version that only searches never asks
            self._places = Lookup(self.item_ids.numpy()[: self.num_published])
        rows = self._places.find(item_ids)
        return rows if self._moved is None else self._moved.over(item_ids, rows)

    def slots_of(self, rows: Tensor) -> Tensor:
        """Rows int64 [...] -> slots int64 [...], -1 for an item that is not resident."""
        return rows if self.slots is None else self.slots[rows].long()

    def put(self, rows: Tensor, item_ids: Tensor, features: Features) -> None:
        """Write what rows of slack int64 [n] that nobody reads hold: item_ids int64 [n] and features [n, ...]."""
        with torch.inference_mode():
            self.item_ids[rows] = item_ids
            slots = self.slots_of(rows)
            for name in self.names:
                self._column(name)[slots] = features[name].to(self._column(name).dtype)
            for name in self.known:
                column = self.of_every_row(name)
                column[rows] = features[name].to(column.dtype)

    def move(self, item_ids: Tensor, rows: Tensor) -> None:
        """Say where items int64 [n], each once, are from now on: rows int64 [n], -1 for one that left.

        A reader sees all of a call or none of it.
        """
        if not len(item_ids):
            return
        self.num_items += int((rows >= 0).sum()) - int((self.rows_of(item_ids) >= 0).sum())
        moved = Moved.of(item_ids, rows)
        self._moved = moved if self._moved is None else self._moved.then(moved)

    def codes(self, name: str, rows: Array) -> Array:
        """A feature of rows int64 [...] -> [..., ...], in the type it is held in; of `known` where there are slots.

        Raises IndexError for a row the table does not have, -1 too.
        """
        if rows.size and int(rows.min()) < 0:
            raise IndexError(f"items: expected rows of the table, got {int(rows.min())}")
        found: Array = self.of_every_row(name).numpy()[rows]
        return found

    def features(self) -> dict[str, Tensor]:
        """Every feature of every slot [S, ...], as held."""
        return {name: self._column(name) for name in self.names}

    def of_every_row(self, name: str) -> Tensor:
        """A feature [C, ...] of all rows, as held; one of `known` where not every item is resident."""
        return self._column(name) if self.slots is None else self._held(_KNOWN + name)

    def first_fault(self, schema: FeatureSchema, sizes: Mapping[str, int]) -> str | None:
        """A sentence naming the first item feature that `schema` with the fitted `sizes` cannot read, or None."""
        missing, extra = (
            [n for n in schema.item if n not in self.names],
            [n for n in self.names if n not in schema.item],
        )
        if missing or extra:
            return f"item features: missing {missing}, not in the schema {extra}"
        unknown = [name for name in self.known if name not in schema.item]
        if unknown:
            return f"known item features: not in the schema {unknown}"
        columns = [(name, self._column(name), self.num_slots) for name in schema.item]
        columns += [(name, self.of_every_row(name), self.num_rows) for name in self.known]
        for name, column, num in columns:
            kind, is_whole = schema.item[name], column.dtype in _INTEGERS
            widths = {Bag: getattr(kind, "length", 0), Embedding: getattr(kind, "width", 0)}
            shape = [num, widths[type(kind)]] if type(kind) in widths else [num]
            if list(column.shape) != shape:
                return f"item feature {name!r}: expected {shape}, found {list(column.shape)}"
            if isinstance(kind, Category | Bag):
                lowest, rows = (-1 if isinstance(kind, Bag) else 0), sizes[f"item.{name}"]
                low, high = (int(x) for x in column.aminmax()) if is_whole else (lowest - 1, 0)
                if not (lowest <= low and high < rows):
                    return f"item feature {name!r}: expected whole numbers from {lowest} to {rows - 1}"
        return None

    def _column(self, name: str) -> Tensor:
        return self._held(_PREFIX + name)

    def _held(self, name: str) -> Tensor:
        column = self._buffers[name]  # get_buffer would read the name as a path, each time
        assert column is not None
        return column


def _num_slots(features: Features) -> int:
    return max((len(column) for column in features.values() if column.dim()), default=0)


def _laid_out(column: Array, places: Array | None, more: int, kept: np.dtype[np.generic], empty: Empty) -> Tensor:
    """The rows of `column` at `places` int64 [n], or all of them, and `more` rows of zeros."""
    num = len(column) if places is None else len(places)
    out = empty((num + more, *column.shape[1:]), torch.from_numpy(np.empty(0, kept)).dtype)
    written = out.numpy()
    for start in range(0, num, _AT_ONCE):
        some = slice(start, min(start + _AT_ONCE, num))
        written[some] = column[some if places is None else places[some]]
    written[num:] = 0
    return out


def _padded(column: Array, num: int) -> Array:
    """With `num` rows of zeros after it."""
    return np.concatenate([column, np.zeros((num, *column.shape[1:]), column.dtype)]) if num else column


def _smallest(name: str, column: Array, most: int | None) -> np.dtype[np.generic]:
    if np.issubdtype(column.dtype, np.integer):
        low, high = (int(column.min()), int(column.max())) if column.size else (0, 0)
        high = high if most is None else max(high, most)
        for kind in (np.int8, np.int16, np.int32, np.int64):
            if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
                return np.dtype(kind)
    if column.dtype == np.float32:
        return np.dtype(np.float32)
    raise DataError(f"items: {name!r} is {column.dtype}; expected whole numbers of 64 bits, or float32")


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
