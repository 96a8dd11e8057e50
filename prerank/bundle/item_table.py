"""The features of every item as buffers of the model: no fetch, no copy, a row number away."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from prerank.errors import BundleError, DataError
from prerank.schema import Bag, Category, Embedding, FeatureSchema
from prerank.types import Array, Columns, Features

_PREFIX = "feature_"  # a feature may be called like an attribute of a module
_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)


class ItemTable(nn.Module):
    """item_ids int64 [I], strictly ascending, and each feature [I, ...]; row order is item_id order.

    Integers are held in the smallest type that keeps them all; floats are float32, as they came.
    Raises BundleError where the columns cannot be one table.
    """

    item_ids: Tensor

    def __init__(self, item_ids: Tensor, features: Features) -> None:
        super().__init__()
        if item_ids.dtype != torch.int64 or item_ids.dim() != 1 or not bool((item_ids[1:] > item_ids[:-1]).all()):
            raise BundleError("items: expected int64 item_ids, strictly ascending; the table is damaged")
        self.register_buffer("item_ids", item_ids)
        self.names = tuple(features)
        for name, column in features.items():
            if column.dim() == 0 or column.shape[0] != len(item_ids):
                raise BundleError(f"items: {name!r} is {list(column.shape)} for {len(item_ids)} items")
            if column.dtype not in (*_INTEGERS, torch.float32):
                raise BundleError(f"items: {name!r} is {_dtype(column)}; expected whole numbers or float32")
            self.register_buffer(_PREFIX + name, column)

    @classmethod
    def build(cls, item_ids: Array, columns: Columns) -> Self:
        """From item_ids int64 [I] in any order and encoded features aligned with them.

        Raises DataError for no items, an item_id given twice, a column of another length or of a type the table
        cannot keep as it is.
        """
        if not len(item_ids):
            raise DataError("items: expected at least one item, got none")
        ids = np.asarray(item_ids, dtype=np.int64)
        order = np.argsort(ids, kind="stable") if (ids[1:] <= ids[:-1]).any() else None
        ids = ids if order is None else ids[order]
        twice = np.flatnonzero(ids[1:] == ids[:-1])
        if len(twice):
            raise DataError(f"items: expected each item_id once, got {ids[twice[0]]} twice")
        features = {}
        for name, column in columns.items():
            if len(column) != len(ids):
                raise DataError(f"items: {name!r} has {len(column)} rows for {len(ids)} item_ids")
            stored = np.array(column if order is None else column[order], dtype=_smallest(name, column))
            features[name] = torch.from_numpy(stored)
        return cls(torch.from_numpy(np.array(ids)), features)

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor]) -> Self:
        """From this module's own state_dict, without a copy. Raises BundleError as the constructor."""
        others = [name for name in tensors if not name.startswith(_PREFIX)]
        if others != ["item_ids"]:
            raise BundleError(f"items: expected item_ids and features, found {sorted(others) or 'no item_ids'}")
        features = {name.removeprefix(_PREFIX): t for name, t in tensors.items() if name.startswith(_PREFIX)}
        return cls(tensors["item_ids"], features)

    @property
    def num_items(self) -> int:
        """I."""
        return len(self.item_ids)

    def rows_of(self, item_ids: Tensor) -> Tensor:
        """item_ids int64 [...] -> rows int64 [...]; -1 for an item this version does not have."""
        rows = torch.searchsorted(self.item_ids, item_ids).clamp_max_(self.num_items - 1)
        return rows.masked_fill_(self.item_ids[rows] != item_ids, -1)

    def gather(self, names: Iterable[str], rows: Tensor) -> dict[str, Tensor]:
        """The features `names` of rows int64 [...] -> [..., ...], integers as int64.

        Raises IndexError for a row the table does not have, -1 too.
        """
        flat = rows.reshape(-1)
        taken = {name: _wide(self._column(name).index_select(0, flat)) for name in names}
        return {name: column.reshape(*rows.shape, *column.shape[1:]) for name, column in taken.items()}

    def features(self) -> dict[str, Tensor]:
        """Every feature of every item [I, ...], as held."""
        return {name: self._column(name) for name in self.names}

    def first_fault(self, schema: FeatureSchema, sizes: Mapping[str, int]) -> str | None:
        """A sentence naming the first item feature that `schema` with the fitted `sizes` cannot read, or None."""
        missing, extra = (
            [n for n in schema.item if n not in self.names],
            [n for n in self.names if n not in schema.item],
        )
        if missing or extra:
            return f"item features: missing {missing}, not in the schema {extra}"
        for name, kind in schema.item.items():
            column = self._column(name)
            is_whole = column.dtype in _INTEGERS
            widths = {Bag: getattr(kind, "length", 0), Embedding: getattr(kind, "width", 0)}
            shape = [self.num_items, widths[type(kind)]] if type(kind) in widths else [self.num_items]
            if list(column.shape) != shape:
                return f"item feature {name!r}: expected {shape}, found {list(column.shape)}"
            if isinstance(kind, Category | Bag):
                lowest, rows = (-1 if isinstance(kind, Bag) else 0), sizes[f"item.{name}"]
                low, high = (int(x) for x in column.aminmax()) if is_whole else (lowest - 1, 0)
                if not (lowest <= low and high < rows):
                    return f"item feature {name!r}: expected whole numbers from {lowest} to {rows - 1}"
        return None

    def _column(self, name: str) -> Tensor:
        return self.get_buffer(_PREFIX + name)


def _smallest(name: str, column: Array) -> np.dtype[np.generic]:
    if np.issubdtype(column.dtype, np.integer):
        low, high = (int(column.min()), int(column.max())) if column.size else (0, 0)
        for kind in (np.int8, np.int16, np.int32, np.int64):
            if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
                return np.dtype(kind)
    if column.dtype == np.float32:
        return np.dtype(np.float32)
    raise DataError(f"items: {name!r} is {column.dtype}; expected whole numbers of 64 bits, or float32")


def _wide(column: Tensor) -> Tensor:
    return column.long() if column.dtype in _INTEGERS else column


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
