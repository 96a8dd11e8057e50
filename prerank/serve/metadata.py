"""What answers say of items: the columns that come with them, and those that are asked for later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import torch

from prerank._toml import nearest
from prerank.bundle.item_table import ItemTable
from prerank.config import Metadata
from prerank.errors import RequestError
from prerank.serve.answer import INT64
from prerank.stores.metadata import MetadataTable
from prerank.stores.reads import ReadCounts
from prerank.types import Array, Given

MOST_ITEMS = 10_000
"""The most items of one call for metadata."""


@dataclass(frozen=True, slots=True)
class Described:
    """The version, and each item's columns; None for an item that it does not have."""

    version: str
    items: Sequence[Mapping[str, Given] | None]


class Descriptions:
    """The metadata of a version's items. `counts`, if any, notes which columns are read."""

    def __init__(
        self, options: Metadata, metadata: MetadataTable, items: ItemTable, version: str, counts: ReadCounts | None
    ) -> None:
        self._metadata, self._items, self._version, self._counts = metadata, items, version, counts
        self.deferred = options.deferred
        self.needed = options.needed_of(metadata.columns)
        metadata.check_columns([*self.needed, *self.deferred])

    def columns_of(self, wanted: tuple[str, ...] | None) -> tuple[str, ...]:
        """The columns of an answer: those `wanted`, or all that come with answers.

        Raises RequestError for one that does not.
        """
        for name in wanted or ():
            if name in self.deferred:
                raise RequestError(f"metadata: {name!r} does not come with answers; ask for it with POST /v1/metadata")
            if name not in self.needed:
                raise RequestError(
                    f"metadata: expected columns of {list(self.needed)}, got {name!r}{nearest(name, self.needed)}"
                )
        return self.needed if wanted is None else wanted

    def take(self, rows: Array, wanted: tuple[str, ...] | None) -> list[msgspec.Raw]:
        """The columns of an answer for rows int64 [K], in order, as JSON objects."""
        columns = self.columns_of(wanted)
        if self._counts is not None:
            self._counts.add(columns, len(rows), wanted is not None)
        return self._metadata.take_json(rows, columns)

    def describe(self, item_ids: Sequence[int], columns: Sequence[str] | None) -> Described:
        """These columns of items, deferred ones too; all of them if None.

        Raises RequestError for a column that is not kept, and for too many items.
        """
        known = [*self.needed, *self.deferred]
        names = known if columns is None else list(columns)
        for name in names:
            if name not in known:
                raise RequestError(f"columns: expected some of {known}, got {name!r}{nearest(name, known)}")
        if not 1 <= len(item_ids) <= MOST_ITEMS:
            raise RequestError(f"item_ids: expected 1 to {MOST_ITEMS:,} of them, got {len(item_ids):,}")
        for item_id in item_ids:
            if item_id not in INT64:
                raise RequestError(f"item_ids: expected int64, got {item_id}")
        rows = self._items.rows_of(torch.tensor(list(item_ids))).numpy()
        is_here = rows >= 0
        if self._counts is not None:
            self._counts.add(names, int(is_here.sum()), columns is not None)
        found = iter(self._metadata.take(rows[is_here], names) if names else [{} for _ in range(int(np.sum(is_here)))])
        return Described(self._version, [next(found) if here else None for here in is_here.tolist()])
