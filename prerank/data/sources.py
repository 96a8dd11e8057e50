"""One table on disk: its files (Parquet or CSV, a glob is one table), its schema, and its rows as Arrow batches.

A batch is all that is held of a table; of a Parquet file, row groups that a filter on the time column rules out by
their statistics are not read. A CSV file says no types: they are inferred once, from the first 8 MB of each file.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
import pyarrow.parquet as pq

from prerank._toml import nearest
from prerank.errors import DataError

SUFFIXES: dict[str, str] = {".parquet": "parquet", ".pq": "parquet", ".csv": "csv", ".csv.gz": "csv"}
CSV_NULLS = ["", "null", "NULL"]
"""What a missing value looks like in CSV. "NA" is not among them: it is Namibia."""
CSV_BLOCK = 8 << 20


@dataclass(frozen=True, slots=True)
class Within:
    """Rows whose integer `column` lies in one of the half-open `spans`."""

    column: str
    spans: Sequence[tuple[int, int]]

    def mask(self, batch: pa.RecordBatch) -> pa.Array:
        """bool [rows]; a null lies nowhere."""
        values = batch.column(self.column).cast(pa.int64())
        inside = pa.array(np.zeros(len(values), dtype=bool))
        for first, end in self.spans:
            inside = pc.or_(inside, pc.and_(pc.greater_equal(values, first), pc.less(values, end)))
        return pc.fill_null(inside, False)

    def may_be_in(self, group: pq.RowGroupMetaData) -> bool:
        """False where a row group's statistics say that none of its rows can be."""
        for number in range(group.num_columns):
            chunk = group.column(number)
            if chunk.path_in_schema == self.column:
                known = chunk.statistics
                if known is None or not known.has_min_max:
                    return True
                return any(known.min < end and known.max >= first for first, end in self.spans)
        return True


@dataclass(frozen=True, slots=True)
class Source:
    """One table: `name` in [data], its files in the order of their names, the types its columns have in all of them.

    `lacking` names, by column, the files that do not have it although another does.
    """

    name: str
    files: tuple[Path, ...]
    format: str
    schema: pa.Schema
    lacking: Mapping[str, tuple[Path, ...]]

    def missing(self, columns: Sequence[str]) -> list[str]:
        """Of `columns`, those no file has."""
        return [c for c in columns if c not in self.schema.names]

    def scan(self, columns: Sequence[str], only: Within | None, batch_rows: int) -> Iterator[pa.RecordBatch]:
        """The rows of `only` (None: all), in file order, at most `batch_rows` at a time, no batch empty.

        Raises DataError where a column is in no file, or a value is not of its column's type.
        """
        absent = self.missing(columns)
        if absent:
            near = nearest(absent[0], self.schema.names)
            raise DataError(f"{self.name}: no column {absent[0]!r}{near}; it has {', '.join(self.schema.names)}")
        read = list(columns) if only is None or only.column in columns else [*columns, only.column]
        schema = pa.schema([self.schema.field(c) for c in read])
        stream = _parquet if self.format == "parquet" else _csv
        for file in self.files:
            try:
                for batch in stream(file, schema, only, batch_rows):
                    rows = batch if only is None else batch.filter(only.mask(batch))
                    for start in range(0, rows.num_rows, batch_rows):
                        yield rows.select(list(columns)).slice(start, batch_rows)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
                raise DataError(f"{self.name}: {file} cannot be read on: {error}{self._csv_note()}") from error

    def table(self, columns: Sequence[str] | None, batch_rows: int) -> pa.Table:
        """All rows of `columns` (None: of every column)."""
        names = self.schema.names if columns is None else list(columns)
        batches = list(self.scan(names, None, batch_rows))
        return pa.Table.from_batches(batches, schema=pa.schema([self.schema.field(n) for n in names]))

    def _csv_note(self) -> str:
        if self.format != "csv":
            return ""
        types = ", ".join(f"{f.name} {f.type}" for f in self.schema)
        megabytes = CSV_BLOCK >> 20
        return f"; types were inferred from the first {megabytes} MB of each file: {types}. Parquet says its own types"


def find(name: str, pattern: str, folder: Path, text: Sequence[str] = ()) -> Source:
    """The files of `pattern` under `folder` as one table; the columns `text` of a CSV file stay text.

    Raises DataError where there are none, they are not all of one format, or a column has types that do not meet.
    """
    files = tuple(sorted(Path(p) for p in glob.glob(str(folder / pattern)) if Path(p).is_file()))
    if not files:
        raise DataError(f"{name}: no file matches {str(folder / pattern)!r}; set [data].{name}")
    formats = {f: _format_of(f) for f in files}
    strange = [f for f, known in formats.items() if not known]
    if strange:
        raise DataError(f"{name}: expected one of {', '.join(SUFFIXES)}, got {strange[0]}")
    if len(set(formats.values())) > 1:
        raise DataError(f"{name}: expected files of one format, got {', '.join(f.name for f in files)}")
    chosen = formats[files[0]]
    schemas = {f: _schema(name, f, chosen, text) for f in files}
    columns = list(dict.fromkeys(c for s in schemas.values() for c in s.names))
    lacking = {c: tuple(f for f, s in schemas.items() if c not in s.names) for c in columns}
    schema = _unified(name, schemas, chosen)
    return Source(name, files, chosen, schema, {c: absent for c, absent in lacking.items() if absent})


def _format_of(file: Path) -> str:
    return next((kind for suffix, kind in SUFFIXES.items() if file.name.lower().endswith(suffix)), "")


def _schema(name: str, file: Path, kind: str, text: Sequence[str]) -> pa.Schema:
    try:
        if kind == "parquet":
            schema: pa.Schema = pq.read_schema(file).remove_metadata()
        else:
            schema = _inferred(file, text)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{name}: {file} is not readable as {kind}: {error}") from error
    repeated = sorted({c for c in schema.names if schema.names.count(c) > 1})
    if repeated:
        raise DataError(f"{name}: {file} has more than one column {repeated[0]!r}")
    return schema


def _inferred(file: Path, text: Sequence[str]) -> pa.Schema:
    """Numbers and booleans where every value of the first block is one, text otherwise, dates included."""
    convert = csv.ConvertOptions(
        null_values=CSV_NULLS, strings_can_be_null=True, column_types={c: pa.string() for c in text}
    )
    with csv.open_csv(file, read_options=csv.ReadOptions(block_size=CSV_BLOCK), convert_options=convert) as reader:
        found = reader.schema
    return pa.schema([f.with_type(pa.string()) if pa.types.is_temporal(f.type) else f for f in found])


def _unified(name: str, schemas: Mapping[Path, pa.Schema], kind: str) -> pa.Schema:
    fields: dict[str, pa.Field] = {}
    told: dict[str, Path] = {}
    for file, schema in schemas.items():
        for field in schema:
            known = fields.setdefault(field.name, field)
            told.setdefault(field.name, file)
            try:
                fields[field.name] = pa.unify_schemas(
                    [pa.schema([known]), pa.schema([field])], promote_options="permissive"
                ).field(0)
            except (pa.ArrowInvalid, pa.ArrowTypeError):
                raise DataError(
                    f"{name}.{field.name}: {known.type} in {told[field.name].name} but {field.type} in {file.name}; "
                    "write it with one type"
                ) from None
    nothing = pa.string() if kind == "csv" else pa.null()
    return pa.schema([f.with_type(nothing) if pa.types.is_null(f.type) else f for f in fields.values()])


def _parquet(file: Path, schema: pa.Schema, only: Within | None, batch_rows: int) -> Iterator[pa.RecordBatch]:
    # Not pyarrow.dataset: its scanner reads ahead up to a gigabyte of whichever files come next.
    with pq.ParquetFile(file) as opened:
        present = [c for c in schema.names if c in opened.schema_arrow.names]
        groups = range(opened.num_row_groups)
        wanted = [g for g in groups if only is None or only.may_be_in(opened.metadata.row_group(g))]
        if not wanted:
            return
        for batch in opened.iter_batches(batch_rows, row_groups=wanted, columns=present):
            yield _as(batch, schema)


def _csv(file: Path, schema: pa.Schema, only: Within | None, batch_rows: int) -> Iterator[pa.RecordBatch]:
    convert = csv.ConvertOptions(
        null_values=CSV_NULLS,
        strings_can_be_null=True,
        column_types=schema,
        include_columns=schema.names,
        include_missing_columns=True,
    )
    with csv.open_csv(file, read_options=csv.ReadOptions(block_size=CSV_BLOCK), convert_options=convert) as reader:
        for batch in reader:
            yield _as(batch, schema)


def _as(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """The columns of `schema`, null where the file does not have one."""
    columns = [
        batch.column(f.name).cast(f.type) if f.name in batch.schema.names else pa.nulls(batch.num_rows, f.type)
        for f in schema
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)
