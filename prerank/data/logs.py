"""The tables of [data]: users and items whole, impressions and history streamed as Arrow batches.

An adapter of a public dataset first writes these tables in our form, once for each state of its files.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pyarrow as pa

from prerank._toml import nearest
from prerank.config import Config
from prerank.data import kuairand
from prerank.data.calendar import day_column, spans
from prerank.data.sources import Source, Within, find
from prerank.errors import DataError
from prerank.schema import Bag, Owner, column_of

DAY = "day"
"""The column every streamed batch ends with: days since 1970-01-01 in [data].timezone, int32."""
BATCH_ROWS = 65_536
_TABLES = ("users", "items", "impressions", "history")
_REQUESTS = "requests"


@dataclass(frozen=True, slots=True)
class Adapter:
    """A reader of a public dataset: the files it reads of a folder, and how it writes our tables from them.

    `form` changes when what it writes changes.
    """

    sources: Callable[[Path], Sequence[Path]]
    convert: Callable[[Path, Path], None]
    form: int


ADAPTERS: dict[str, Adapter] = {"kuairand": Adapter(kuairand.sources, kuairand.convert, kuairand.FORM)}


class Tables:
    """The tables of one funnel file. A table that cannot be opened raises its DataError when it is asked for."""

    def __init__(self, config: Config, found: Mapping[str, Source | DataError], fingerprint: str) -> None:
        self.config = config
        self._found = found
        self._fingerprint = fingerprint

    @property
    def names(self) -> tuple[str, ...]:
        """Which of "users", "items", "impressions", "history" and "requests" the funnel file names."""
        return tuple(self._found)

    def source(self, name: str) -> Source:
        """The files and the schema of one table. Raises DataError where it cannot be opened."""
        found = self._found[name]
        if isinstance(found, DataError):
            raise found
        return found

    def users(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The users table in file order (None: all columns)."""
        return self.source("users").table(columns, BATCH_ROWS)

    def items(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The items table in file order (None: all columns)."""
        return self.source("items").table(columns, BATCH_ROWS)

    def impressions(
        self, columns: Sequence[str], days: Sequence[str] | None = None, batch_rows: int = BATCH_ROWS
    ) -> Iterator[pa.RecordBatch]:
        """The log's `columns`, each once, and `day`, in file order; of the ISO `days` only (None: all).

        Row groups without one of these days are not read. Raises DataError where a column is missing or the time
        column is not integer milliseconds.
        """
        source = self.source("impressions")
        return self._events(source, columns, self._only(source, days), batch_rows)

    def history(self, columns: Sequence[str], batch_rows: int = BATCH_ROWS) -> Iterator[pa.RecordBatch]:
        """The same of the events older than the log; nothing where [data].history is empty.

        Types are the log's. A column the history does not have comes as null, a key or the time never.
        """
        if "history" not in self._found:
            return
        source, log = self.source("history"), self.source("impressions")
        data = self.config.data
        keys = (data.user_id, data.item_id, data.time)
        wanted = list(dict.fromkeys(columns))
        unknown = [c for c in source.missing(wanted) if c in keys or c not in log.schema.names]
        if unknown:
            near = nearest(unknown[0], source.schema.names)
            raise DataError(f"history: no column {unknown[0]!r}{near}; it has {', '.join(source.schema.names)}")
        present = [c for c in wanted if c in source.schema.names]
        for batch in self._events(source, present, None, batch_rows):
            yield self._like_log(batch, wanted, log, source)

    def fingerprint(self) -> str:
        """64 hex digits of the names, sizes and times of change, when opened, of every file the tables come from."""
        return self._fingerprint

    def _events(
        self, source: Source, columns: Sequence[str], only: Within | None, batch_rows: int
    ) -> Iterator[pa.RecordBatch]:
        wanted = list(dict.fromkeys(columns))
        if DAY in wanted:
            raise DataError(f"{source.name}.{DAY}: prerank computes this name from the time; rename the column")
        time = self.config.data.time
        _integer_time(source, time)
        read = wanted if time in wanted else [*wanted, time]
        for batch in source.scan(read, only, batch_rows):
            day = day_column(batch.column(time), self.config.data.timezone)
            yield batch.select(wanted).append_column(DAY, day)

    def _only(self, source: Source, days: Sequence[str] | None) -> Within | None:
        if days is None:
            return None
        time = self.config.data.time
        _integer_time(source, time)
        return Within(time, spans(days, self.config.data.timezone))

    def _like_log(self, batch: pa.RecordBatch, wanted: Sequence[str], log: Source, source: Source) -> pa.RecordBatch:
        columns = []
        for name in wanted:
            has = name in log.schema.names
            kind = log.schema.field(name).type if has else source.schema.field(name).type
            if name not in batch.schema.names:
                columns.append(pa.nulls(batch.num_rows, kind))
                continue
            try:
                columns.append(batch.column(name).cast(kind))
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise DataError(f"history.{name}: expected the log's type, {kind}: {error}") from error
        return pa.RecordBatch.from_arrays([*columns, batch.column(DAY)], names=[*wanted, DAY])


def open_tables(config: Config, folder: Path, work: Path) -> Tables:
    """The tables of `config` under `folder`; an adapter's tables are made under `work` first, unless they are there.

    Raises DataError naming every table that cannot be opened.
    """
    tables = find_tables(config, folder, work)
    problems = []
    for name in tables.names:
        try:
            tables.source(name)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    return tables


def find_tables(config: Config, folder: Path, work: Path) -> Tables:
    """The same, where a table that cannot be opened raises only when it is asked for: `prerank check` goes on.

    Raises DataError where the adapter is not known, or its own files are missing or not as it knows them.
    """
    data, own = config.data, folder
    origins: list[tuple[str, Path]] = []
    if data.adapter:
        origins = [(data.adapter, f) for f in _adapter(data.adapter).sources(folder)]
        folder = _adapted(data.adapter, folder, origins, work)
    found: dict[str, Source | DataError] = {}
    for name in _TABLES:
        pattern = str(getattr(data, name))
        if not pattern:
            continue
        try:
            source = find(name, pattern, folder, _split_columns(config, name))
        except DataError as error:
            found[name] = error
            continue
        found[name] = source
        if not data.adapter:
            origins += [(name, f) for f in source.files]
    if data.requests:  # a server's, so no adapter makes them
        try:
            found[_REQUESTS] = logged = find(_REQUESTS, data.requests, own)
            origins += [(_REQUESTS, f) for f in logged.files]
        except DataError as error:
            found[_REQUESTS] = error
    return Tables(config, found, _fingerprint(origins))


def _adapter(name: str) -> Adapter:
    if name not in ADAPTERS:
        raise DataError(
            f"data.adapter: expected one of {', '.join(ADAPTERS)}, got {name!r}{nearest(name, list(ADAPTERS))}"
        )
    return ADAPTERS[name]


def _adapted(name: str, folder: Path, origins: Sequence[tuple[str, Path]], work: Path) -> Path:
    """The folder of the adapter's tables; a folder of this name is complete, or it is not there."""
    adapter = _adapter(name)
    made = work / "tables" / f"{name}-{adapter.form}-{_fingerprint(origins)[:16]}"
    if made.is_dir():
        return made
    building = made.with_name(f".{made.name}-{uuid4().hex[:8]}")
    building.mkdir(parents=True)
    try:
        adapter.convert(folder, building)
        building.rename(made)
    except OSError:
        if not made.is_dir():  # another process may have made the same tables meanwhile
            raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return made


def _split_columns(config: Config, name: str) -> list[str]:
    """The columns of one table that hold text to be split: in CSV, "12" must not become a number."""
    owners: dict[str, Owner] = {"users": "user", "items": "item"}
    features = config.features.of(owners.get(name, "context"))
    return [column_of(n, kind) for n, kind in features.items() if isinstance(kind, Bag) and kind.separator]


def _integer_time(source: Source, time: str) -> None:
    if time not in source.schema.names:
        near = nearest(time, source.schema.names)
        raise DataError(f"{source.name}: no time column {time!r}{near}; set [data].time")
    kind = source.schema.field(time).type
    if not pa.types.is_integer(kind):
        raise DataError(f"{source.name}.{time}: expected integer milliseconds (UTC), got {kind}")


def _fingerprint(origins: Sequence[tuple[str, Path]]) -> str:
    lines = []
    for name, file in origins:
        stat = file.stat()
        lines.append(f"{name}\t{file.name}\t{stat.st_size}\t{stat.st_mtime_ns}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()
