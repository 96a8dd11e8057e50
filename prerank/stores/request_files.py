"""The files of a log of requests: found, written whole or not at all, and read."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from prerank.errors import DataError
from prerank.stores.requests import SCHEMA, LoggedRequest, to_rows, to_table

PATTERN = "requests-*.parquet"
"""The names of a log's files; they sort as they were begun."""
ROWS_AT_ONCE = 256
_FORMAT_KEY, _FORMAT = b"prerank.requests", b"1"
_ROWS_A_GROUP = 1024


def write_requests(folder: Path, name: str, rows: Sequence[LoggedRequest]) -> Path:
    """The rows as one file of `folder`; a reader sees all of it or nothing, and nobody but its owner may read it.

    Raises OSError where it cannot be written; then nothing of it is left.
    """
    beside = folder / f".{name}-{secrets.token_hex(4)}"
    table = to_table(rows).replace_schema_metadata({_FORMAT_KEY: _FORMAT})
    try:
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            pq.write_table(table, file, compression="zstd", row_group_size=_ROWS_A_GROUP)
            file.flush()
            os.fsync(file.fileno())
        os.rename(beside, folder / name)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    return folder / name


def request_files(folder: Path) -> list[Path]:
    """The files of the log in `folder`, oldest first. Raises DataError where there is none."""
    if not folder.is_dir():
        raise DataError(f"{folder}: expected a folder that `prerank serve --log-requests` wrote, found none")
    found = sorted(folder.glob(PATTERN))
    if not found:
        raise DataError(
            f"{folder}: expected files {PATTERN}, found none; a server that logs writes one a minute, and when it ends"
        )
    return found


def read_requests(files: Sequence[Path]) -> Iterator[LoggedRequest]:
    """Every request of these files, in their order. Raises DataError for one that is no log of requests, or damaged."""
    for path in files:
        for batch in _batches(path):
            yield from to_rows(batch)


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    try:
        with pq.ParquetFile(path) as opened:
            _check(path, opened.schema_arrow)
            yield from opened.iter_batches(ROWS_AT_ONCE, columns=SCHEMA.names)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: expected a Parquet file of a log of requests: {error}") from None


def _check(path: Path, schema: pa.Schema) -> None:
    found = (schema.metadata or {}).get(_FORMAT_KEY)
    if found is None:
        raise DataError(
            f"{path}: a Parquet file, but no log of requests: it has the columns {', '.join(schema.names[:8])}; "
            "expected one that `prerank serve --log-requests` wrote"
        )
    if found != _FORMAT:
        raise DataError(f"{path}: expected format {_FORMAT.decode()} of the log of requests, found {found.decode()}")
    for wanted in SCHEMA:
        if wanted.name not in schema.names or schema.field(wanted.name).type != wanted.type:
            raise DataError(f"{path}: the log of requests is damaged: it has no column {wanted.name} of {wanted.type}")
