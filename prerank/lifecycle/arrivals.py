"""Items that came, changed or left while earlier versions served, in the items that the next one is published with.

Whichever is later counts: what a server was told of an item, or the file of the items table. So a change holds until
the table has it, and slack that was taken is free again in the next version.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import structlog

from prerank.config import Config
from prerank.data.logs import Tables
from prerank.errors import DataError
from prerank.features.rates import GroupRates
from prerank.features.transforms import Transforms
from prerank.stores.items import ItemStore, Stored
from prerank.types import Array

ITEMS = "items.lmdb"
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Stock:
    """The items a version is made of, by rising item_id: int64 [I], encoded and raw [I, ...], popularity [I, P].

    `until_ns` is when the last of those came, or left, that a server was told of.
    """

    item_ids: Array
    columns: Mapping[str, Array]
    table: pa.Table
    popularity: Array
    until_ns: int


def with_arrivals(stock: Stock, config: Config, transforms: Transforms, tables: Tables, home: Path) -> Stock:
    """`stock`, of the items table, with what came since and without what left.

    An item's popularity stays, and nobody was shown a new one. A rate is that of the item's group; where there are none
    it stays too, and that of a new one is 0, as of all items together.
    Raises DataError where what came does not fit the table's types.
    """
    if not (home / ITEMS).exists():
        return stock
    with ItemStore.open(home / ITEMS) as store:
        dated = [one for one in store.all() if one.time_ns]
    table_ns = min(file.stat().st_mtime_ns for file in tables.source("items").files)
    later = [one for one in dated if one.time_ns > table_ns]
    until_ns = max((one.time_ns for one in dated), default=0)
    came = [one for one in later if one.change.columns is not None and _fits(one, config)]
    left = [one.change.item_id for one in later if one.change.removed]
    if not came and not left:
        return replace(stock, until_ns=until_ns)
    ids = np.array([one.change.item_id for one in came], np.int64)
    stays = ~np.isin(stock.item_ids, np.concatenate([ids, np.array(left, np.int64)]))
    if not stays.any() and not came:
        raise DataError(f"items: all {len(stays)} of the table were taken out of the version that serves; none is left")
    raw = _rows(came, stock.table.schema)
    encoded = dict(transforms.encode("item", _rows(came, tables.source("items").schema)))
    place = np.searchsorted(stock.item_ids, ids).clip(0, len(stock.item_ids) - 1)
    is_new = stock.item_ids[place] != ids
    for name, rate in config.features.rates().items():
        if rate.by:
            encoded[name] = GroupRates(stock.columns[rate.by], stock.columns[name]).of(encoded[rate.by])
        else:
            encoded[name] = np.where(is_new, 0.0, stock.columns[name][place]).astype(np.float32)
    popularity = np.where(is_new[:, None], stock.popularity.min(axis=0), stock.popularity[place])
    item_ids = np.concatenate([stock.item_ids[stays], ids])
    order = np.argsort(item_ids, kind="stable")
    return Stock(
        item_ids=item_ids[order],
        columns={n: np.concatenate([column[stays], encoded[n]])[order] for n, column in stock.columns.items()},
        table=pa.concat_tables([stock.table.filter(pa.array(stays)), raw]).take(pa.array(order)),
        popularity=np.concatenate([stock.popularity[stays], popularity])[order].astype(np.float32),
        until_ns=until_ns,
    )


def _fits(one: Stored, config: Config) -> bool:
    missing = [name for name in config.item_columns() if name not in (one.change.columns or {})]
    if missing:
        _log.warning("an item that came lacks columns that are read now", item_id=one.change.item_id, lacks=missing)
    return not missing


def _rows(came: list[Stored], schema: pa.Schema) -> pa.Table:
    """Items as they were sent, as rows of the table's types; a column that was not sent is null."""
    columns = {}
    for field in schema:
        sent = [(one.change.columns or {}).get(field.name) for one in came]
        try:
            columns[field.name] = pa.array(sent, from_pandas=False).cast(field.type)
        except (pa.ArrowException, TypeError, OverflowError) as error:
            raise DataError(
                f"items that came while serving: column {field.name!r}: expected {field.type} as in the items table: "
                f"{error}; send them again"
            ) from None
    return pa.table(columns, schema=schema)
