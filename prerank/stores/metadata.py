"""What an answer says about each winner: the items table as one memory-mapped Arrow file, read by row number.

Only the pages of the rows asked for are touched. Row numbers are those of one version's ItemTable. The columns that
come with every answer are in the file once more, as the JSON that is sent of each row: to make it anew of a hundred
winners, each in another place, takes longer than to find it.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prerank._rows import rows_of
from prerank._toml import nearest
from prerank.errors import DataError
from prerank.types import Array, Given

READY = "prerank.json"
"""The column of ready JSON, an object a row; its field's metadata names the columns in it."""
_NAMES = b"columns"
_MOST_SELECTED = 64
_ROWS_AT_ONCE = 1 << 13
_INT64 = pa.int64()


def write_metadata(path: Path, table: pa.Table, ready: Sequence[str]) -> None:
    """Write the rows of `table`, and of the columns `ready` the JSON that answers send.

    The JSON is on the disk while it is made. Raises DataError for columns that are not there.
    """
    if READY in table.column_names:
        raise DataError(f"{path}: the items table has a column {READY!r}, which is the name of our own; rename it")
    table = table.combine_chunks().replace_schema_metadata(None)
    whole = MetadataTable(table, path)
    whole.check_columns(ready)
    offsets = np.zeros(table.num_rows + 1, np.int64)
    with TemporaryFile(dir=path.parent) as made:
        for start in range(0, table.num_rows if ready else 0, _ROWS_AT_ONCE):
            rows = np.arange(start, min(start + _ROWS_AT_ONCE, table.num_rows))
            said = [msgspec.json.encode(one) for one in whole.take(rows, ready)]
            offsets[rows + 1] = [len(one) for one in said]
            made.writelines(said)
        np.cumsum(offsets, out=offsets)
        made.flush()
        if offsets[-1]:
            content = pa.py_buffer(mmap.mmap(made.fileno(), 0, access=mmap.ACCESS_READ))
            column = pa.Array.from_buffers(pa.large_binary(), table.num_rows, [None, pa.py_buffer(offsets), content])
            field = pa.field(READY, column.type, metadata={_NAMES: json.dumps(list(ready)).encode()})
            table = table.append_column(field, column)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=max(table.num_rows, 1))


class MetadataTable:
    """An open `metadata.arrow`. Threads may share one. A file of one record batch is read fastest."""

    def __init__(self, table: pa.Table, path: Path) -> None:
        self._table = table
        self._path = path
        self.columns: tuple[str, ...] = tuple(name for name in table.column_names if name != READY)
        self.num_rows: int = table.num_rows
        self._later: dict[int, Mapping[str, Given]] = {}
        self._readers = {field.name: _reader(field.type) for field in table.schema if field.name != READY}
        self._ready = _Ready.of(table)
        self._selected: dict[tuple[str, ...], pa.Table] = {}

    @classmethod
    def open(cls, path: Path) -> MetadataTable:
        """Map the Arrow IPC file at `path`. Raises DataError if there is none or it cannot be answered in JSON."""
        if not path.is_file():
            raise DataError(f"{path}: expected the items' metadata (an Arrow IPC file), found none")
        try:
            with pa.memory_map(str(path)) as source:
                table = pa.ipc.open_file(source).read_all()
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{path}: expected an Arrow IPC file, but it is not one: {_first_line(error)}") from None
        for field in table.schema:
            if pa.types.is_nested(field.type) and not _is_list(field.type):
                raise DataError(
                    f"{path}: column {field.name!r} is {field.type}, and an answer carries text, numbers, booleans "
                    "and lists of these; leave it out with [metadata] columns"
                )
        return cls(table, path)

    def num_bytes(self, column: str) -> int:
        """What a column takes in the file. Raises DataError for an unknown one."""
        self.check_columns([column])
        return int(self._table.column(column).nbytes)

    def check_columns(self, columns: Sequence[str]) -> None:
        """Raises DataError for the first of `columns` that the file does not have, with the nearest name."""
        for name in columns:
            if name not in self.columns:
                raise DataError(
                    f"{self._path}: expected a column of {list(self.columns)}, got {name!r}"
                    f"{nearest(name, self.columns)}"
                )

    def take(self, rows: Array, columns: Sequence[str] = ()) -> list[Mapping[str, Given]]:
        """The `columns` (none named: all) of `rows` int64 [K] -> K mappings.

        Raises DataError for an unknown column, IndexError for a row of another version.
        """
        names = tuple(columns) or self.columns
        if not names:
            return [{} for _ in rows]
        table = self._of_columns(names)
        if self._later and len(rows) and rows.max() >= self.num_rows:
            return self._mixed(rows, names)
        places = np.ascontiguousarray(rows, np.int64)
        taken = table.take(pa.Array.from_buffers(_INT64, len(places), [None, pa.py_buffer(places)]))
        return rows_of(names, [self._readers[name](_whole(taken.column(at))) for at, name in enumerate(names)])

    def take_json(self, rows: Array, columns: Sequence[str]) -> list[msgspec.Raw]:
        """`take` of these columns as JSON objects; found, not made, where they are those that come with answers.

        Raises as `take` does.
        """
        names, ready = tuple(columns), self._ready
        if ready is None or names != ready.names:
            return [_json_of(one) for one in (self.take(rows, names) if names else [{} for _ in rows])]
        if not (self._later and len(rows) and rows.max() >= self.num_rows):
            return ready.take(rows)
        in_file = rows < self.num_rows
        found = iter(ready.take(rows[in_file]))
        later = (_json_of(one) for one in self.take(rows[~in_file], names))
        return [next(found if is_first else later) for is_first in in_file.tolist()]

    def _of_columns(self, names: tuple[str, ...]) -> pa.Table:
        """The table of these alone, kept: most requests want the same."""
        found = self._selected.get(names)
        if found is None:
            self.check_columns(names)
            found = self._table.select(list(names))
            if len(self._selected) < _MOST_SELECTED:  # callers say which
                self._selected[names] = found
        return found

    def put(self, rows: Sequence[int], said: pa.Table) -> None:
        """What to say of rows [n] after those of the file: `said` [n], with every column of it."""
        values = [_reader(column.type)(_whole(column)) for column in said.columns] or [[None] * len(rows)]
        for row, one in zip(rows, zip(*values, strict=True), strict=True):
            assert row >= self.num_rows, "the file's rows are as published"
            self._later[row] = dict(zip(said.column_names, one, strict=False))

    def _mixed(self, rows: Array, names: tuple[str, ...]) -> list[Mapping[str, Given]]:
        in_file = rows < self.num_rows
        said = iter(self.take(rows[in_file], names))
        later = ({name: self._later[row][name] for name in names} for row in rows[~in_file].tolist())
        return [next(said if is_first else later) for is_first in in_file.tolist()]


@dataclass(frozen=True, slots=True)
class _Ready:
    """The JSON object of row r is `said[offsets[r] : offsets[r + 1]]`, of the columns `names`."""

    names: tuple[str, ...]
    offsets: Array
    said: memoryview

    @classmethod
    def of(cls, table: pa.Table) -> _Ready | None:
        """None where the file has none: it is older, or in several batches."""
        if READY not in table.column_names or table.column(READY).num_chunks != 1:
            return None
        names = json.loads(table.schema.field(READY).metadata[_NAMES])
        _, offsets, said = table.column(READY).chunk(0).buffers()
        return cls(tuple(names), np.frombuffer(offsets, np.int64), memoryview(said))

    def take(self, rows: Array) -> list[msgspec.Raw]:
        """The objects of rows int64 [K], which stay in the file until they are sent."""
        if len(rows) and rows.min() < 0:
            raise IndexError(f"metadata: expected rows of the file, got {rows.min()}")
        places = zip(self.offsets[rows].tolist(), self.offsets[rows + 1].tolist(), strict=True)
        said, raw = self.said, msgspec.Raw
        return [raw(said[start:end]) for start, end in places]


def _json_of(row: Mapping[str, Given]) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(row))


def _whole(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _reader(kind: pa.DataType) -> Callable[[pa.Array], list[Given]]:
    """What makes plain values of a column of this type."""
    if pa.types.is_temporal(kind) or pa.types.is_decimal(kind):
        return lambda column: list(pc.cast(column, pa.string()).to_pylist())
    if pa.types.is_dictionary(kind):
        return lambda column: list(column.dictionary_decode().to_pylist())
    if pa.types.is_floating(kind):
        return _floats
    return _as_they_are


def _floats(column: pa.Array) -> list[Given]:
    # JSON has no NaN, and a missing number is what it means
    values = column.to_numpy(zero_copy_only=False).astype(np.float64)
    return [value if value == value and abs(value) != np.inf else None for value in values.tolist()]


def _as_they_are(column: pa.Array) -> list[Given]:
    values: list[Given] = column.to_pylist()
    return values


def _is_list(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return is_list and not pa.types.is_nested(kind.value_type)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
