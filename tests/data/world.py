"""A small, sound world for the tests of data: three tables over three days, and the funnel file that reads them."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq

from prerank.config import Config, parse_config

DAY_MS = 86_400_000
START_MS = 1_650_844_800_000  # 2022-04-25 00:00 UTC
ROWS, USERS, ITEMS = 600, 20, 30

PLAIN = {
    "name": "tiny",
    "data": {
        "impressions": "impressions*.parquet",
        "items": "items.parquet",
        "users": "users.parquet",
        "train": ["2022-04-25", "2022-04-25"],
        "validate": ["2022-04-26", "2022-04-26"],
        "test": ["2022-04-27", "2022-04-27"],
    },
    "features": {
        "user": {"age": {"kind": "number"}},
        "context": {"surface": {"kind": "category"}, "slot": {"kind": "number"}},
        "item": {
            "item_id": {"kind": "category"},
            "tags": {"kind": "bag"},
            "vector": {"kind": "embedding", "width": 2},
            "bid_micros": {"kind": "value"},
        },
    },
    "tasks": {"click": {"label": "is_click"}},
    "retrieval": {"relevant": "is_click", "targets": {"is_click": 1.0}},
    "utility": {"click": {"value": "bid_micros"}},
}


def plain(**data: object) -> dict:
    """The funnel file, with keys of [data] replaced."""
    made = deepcopy(PLAIN)
    made["data"] |= data
    return made


def config(**data: object) -> Config:
    return parse_config(plain(**data), "tiny.toml")


def users() -> pa.Table:
    return pa.table({"user_id": np.arange(USERS), "age": np.arange(USERS) + 20.0})


def items() -> pa.Table:
    ids = np.arange(ITEMS)
    return pa.table(
        {
            "item_id": ids,
            "tags": pa.array([[int(i) % 3, 7] for i in ids], pa.list_(pa.int16())),
            "vector": pa.array([[float(i), 1.0] for i in ids], pa.list_(pa.float32())),
            "bid_micros": ids * 1000,
        }
    )


def impressions() -> pa.Table:
    """Two hundred rows on each of three days; every third is a click."""
    row = np.arange(ROWS)
    return pa.table(
        {
            "user_id": row % USERS,
            "item_id": row % ITEMS,
            "time_ms": START_MS + row * (DAY_MS * 3 // ROWS),
            "is_click": (row % 3 == 0).astype(np.int8),
            "surface": pa.array(np.array(["feed", "search"])[row % 2]),
            "slot": (row * 7 % 11).astype(np.float64),
        }
    )


def write(folder: Path, row_group: int = 100, **tables: pa.Table) -> Path:
    """The world's tables as Parquet, each replaced by the one named here."""
    for name, table in {"users": users(), "items": items(), "impressions": impressions(), **tables}.items():
        pq.write_table(table, folder / f"{name}.parquet", row_group_size=row_group)
    return folder


def write_csv(folder: Path, name: str, table: pa.Table) -> Path:
    csv.write_csv(table, folder / f"{name}.csv")
    return folder


def put(table: pa.Table, column: str, values: object) -> pa.Table:
    """The table with one column replaced or added."""
    array = values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values)
    if column in table.column_names:
        return table.set_column(table.column_names.index(column), column, array)
    return table.append_column(column, array)


def put_at(table: pa.Table, column: str, row: int, value: object) -> pa.Table:
    """The table with one cell replaced."""
    values = table.column(column).to_pylist()
    values[row] = value
    return put(table, column, pa.array(values, table.column(column).type))
