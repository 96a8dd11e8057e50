"""Which items of a version are resident, and what its tables have room for beside them, as [inventory] says."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prerank.bundle.item_table import Room
from prerank.config import Config, Resident
from prerank.errors import DataError
from prerank.schema import Bag, Category, Value
from prerank.types import Array

_MOST_VALUE = 2**63 - 1


def room_for(config: Config, sizes: Mapping[str, int], item_ids: Array, items: pa.Table) -> Room:
    """The room for `items` [I] of item_ids int64 [I], with `sizes` codes of each category and bag by "item.name".

    Raises DataError as `resident_items`.
    """
    inventory, kinds = config.inventory, config.features.item
    resident = None if inventory.resident is None else resident_items(inventory.resident, item_ids, items)
    most: dict[str, int] = {}
    if inventory.slack or resident is not None:  # what comes later may have any code, and any worth
        most = {name: sizes[f"item.{name}"] - 1 for name, kind in kinds.items() if isinstance(kind, Category | Bag)}
        most |= {name: _MOST_VALUE for name, kind in kinds.items() if isinstance(kind, Value)}
    return Room(inventory.slack, inventory.cached, resident, config.known_of_all(), most)


def resident_items(resident: Resident, item_ids: Array, items: pa.Table) -> Array | None:
    """bool [I]: the items whose features are to be in memory, or None where that is all of them.

    Raises DataError where the column `by` is missing or no numbers.
    """
    where = f"inventory.resident.by = {resident.by!r}"
    if resident.by not in items.column_names:
        raise DataError(f"{where}: expected a column of the items table, which has {items.column_names}")
    column = items.column(resident.by)
    kind = column.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)):
        raise DataError(f"{where}: expected a column of numbers, found {kind}")
    if resident.top >= len(item_ids):
        return None
    numbers = pc.fill_null(column.cast(pa.float64()), -np.inf).to_numpy()
    # the last key is the first to sort by
    order = np.lexsort((item_ids, -np.nan_to_num(numbers, nan=-np.inf, posinf=np.inf, neginf=-np.inf)))
    chosen = np.zeros(len(item_ids), bool)
    chosen[order[: resident.top]] = True
    return chosen
