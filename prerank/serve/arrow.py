"""Changes of many items as an Arrow stream: the fields of the JSON, as columns."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa

from prerank._toml import nearest
from prerank.errors import RequestError
from prerank.serve.wire import MalformedBody
from prerank.types import Given, ItemChange

CONTENT_TYPE = "application/vnd.apache.arrow.stream"
COLUMNS = "item_id int64, and any of on bool, pacing double, removed bool, values struct and columns struct"
_FIELDS = ("item_id", "on", "pacing", "removed", "values", "columns")


def decode_items_stream(content: bytes) -> list[ItemChange]:
    """A row a change; a null says nothing, but within `columns`, where it is a value that is not known.

    Raises MalformedBody for what is no Arrow stream, RequestError naming the column that is wrong.
    """
    try:
        table = pa.ipc.open_stream(pa.BufferReader(content)).read_all()
    except (pa.ArrowException, OSError) as error:
        raise MalformedBody(f"body: expected an Arrow IPC stream: {str(error).splitlines()[0]}") from None
    for name in table.column_names:
        if name not in _FIELDS:
            raise RequestError(f"{name}: unknown column, expected {COLUMNS}{nearest(name, _FIELDS)}")
    if "item_id" not in table.column_names or table.column("item_id").null_count:
        raise RequestError(f"item_id: expected one in every row; the columns are {COLUMNS}")
    num = table.num_rows
    item_ids = _typed(table, "item_id", pa.int64())
    on, pacing = (_typed(table, name, kind) for name, kind in (("on", pa.bool_()), ("pacing", pa.float64())))
    removed = [bool(one) for one in _typed(table, "removed", pa.bool_())]
    values = _structs(table, "values", pa.float64())
    said = [{name: one for name, one in (row or {}).items() if isinstance(one, float)} for row in values]
    columns = _structs(table, "columns", None)
    return [ItemChange(item_ids[n], on[n], pacing[n], said[n], columns[n], removed[n]) for n in range(num)]


def _typed(table: pa.Table, name: str, kind: pa.DataType) -> list:  # type: ignore[type-arg]
    if name not in table.column_names:
        return [None] * table.num_rows
    try:
        return list(table.column(name).cast(kind).to_pylist())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise RequestError(f"{name}: expected {kind}, got {table.column(name).type}: {error}") from None


def _structs(table: pa.Table, name: str, kind: pa.DataType | None) -> list[Mapping[str, Given] | None]:
    """Each row of a struct column as a dict, its fields of this type or, if None, as JSON has them."""
    if name not in table.column_names:
        return [None] * table.num_rows
    column = table.column(name)
    if not pa.types.is_struct(column.type):
        raise RequestError(f"{name}: expected a struct, got {column.type}")
    flat = table.select([name]).flatten()
    fields = {}
    for field in column.type:
        own = pa.table({field.name: flat.column(f"{name}.{field.name}")})
        fields[field.name] = _typed(own, field.name, kind or _json_type(field.type))
    present = column.is_valid().to_pylist()
    rows = zip(*fields.values(), strict=True) if fields else iter([()] * table.num_rows)
    return [
        dict(zip(fields, row, strict=True)) if is_there else None for row, is_there in zip(rows, present, strict=True)
    ]


def _json_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_temporal(kind):
        return pa.string()
    if pa.types.is_decimal(kind):
        return pa.float64()
    return kind.value_type if pa.types.is_dictionary(kind) else kind
