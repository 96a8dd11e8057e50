"""What an answer says about each winner: the items table as one memory-mapped Arrow file, read by row number.

Only the pages of the rows asked for are touched. Row numbers are those of one version's ItemTable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prerank._rows import rows_of
from prerank._toml import nearest
from prerank.errors import DataError
from prerank.types import Array, Given

_MOST_SELECTED = 64
_INT64 = pa.int64()


class MetadataTable:
    """An open `metadata.arrow`. Threads may share one. A file of one record batch is read fastest."""

    def __init__(self, table: pa.Table, path: Path) -> None:
        self._table = table
        self._path = path
        self.columns: tuple[str, ...] = tuple(table.column_names)
        self.num_rows: int = table.num_rows
        self._later: dict[int, Mapping[str, Given]] = {}
        self._readers = {field.name: _reader(field.type) for field in table.schema}
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
