"""Items by key: the raw columns of every item of the table, for those that a version does not hold in memory.

The value is a JSON object of the columns that features read, by name. In LMDB the key is the item_id, big-endian with
the sign bit flipped; the file is replaced whole. `stores.redis_tail` is the same in Redis.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, TypeAlias

import lmdb
import msgspec
import pyarrow as pa

from prerank.errors import DataError
from prerank.stores.environments import SharedEnvironment, share, sync_folder
from prerank.stores.user_file import key_of
from prerank.types import Given, Report, silent

Row: TypeAlias = Mapping[str, Given]
_Plain: TypeAlias = str | int | float | bool | None
TAIL = "tail.lmdb"
"""The file's name in a funnel's store."""
RATE = "rate."
"""Before the name of a rate among the columns: it is of the log, and no column of the items table."""
_ITEMS_AT_ONCE = 1 << 14
_FIRST_MAP_BYTES = 1 << 26
_AGAIN = "write it again from the tables with `prerank publish`"
_row = msgspec.json.Decoder(dict[str, _Plain | list[_Plain]])


class TailStore(Protocol):
    """Where items are that are not in memory. Threads may share one."""

    def get(self, item_ids: Sequence[int]) -> list[Row | None]:
        """Each item's columns, None for one that is not there. Raises DataError where it cannot be read."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


def decode_row(content: bytes, where: str) -> Row:
    """A value of the store. Raises DataError naming `where`."""
    try:
        return _row.decode(content)
    except msgspec.DecodeError as error:
        raise DataError(f"{where}: expected a JSON object of columns: {error}; {_AGAIN}") from None


def encoded_rows(items: pa.Table, item_id: str, columns: Sequence[str]) -> list[tuple[int, bytes]]:
    """Each row's item_id and value; what is not finite is null."""
    lists = [_plain(items.column(name)).to_pylist() for name in columns]
    rows = zip(*lists, strict=True) if lists else iter([()] * items.num_rows)
    encoded = [msgspec.json.encode(dict(zip(columns, row, strict=True))) for row in rows]
    return list(zip(items.column(item_id).to_pylist(), encoded, strict=True))


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(pa.float64()) if pa.types.is_decimal(column.type) else column


class LmdbTail:
    """A `TailStore` in one LMDB file; it keeps reading the file that it opened when that is replaced."""

    def __init__(self, shared: SharedEnvironment, path: Path) -> None:
        self._shared: SharedEnvironment | None = shared
        self._env, self._path = shared.env, path

    @classmethod
    def open(cls, path: Path) -> LmdbTail:
        """The file at `path`, to read. Raises DataError if there is none, or it is damaged."""
        if not path.is_file():
            raise DataError(f"{path}: expected the items that are not in memory (one LMDB file), found none; {_AGAIN}")
        try:
            return cls(share(path), path)
        except (lmdb.Error, OSError) as error:
            raise DataError(f"{path}: expected items (one LMDB file), but it is not one: {error}") from None

    @staticmethod
    def write(path: Path, items: pa.Table, item_id: str, columns: Sequence[str], report: Report = silent) -> None:
        """Replace the file at `path` by `items`, their `columns` by their column `item_id`.

        It is built beside and renamed, so a reader sees the old or the new.
        """
        beside = path.with_name(f"{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
        items = items.sort_by(item_id)
        try:
            with lmdb.open(str(beside), subdir=False, lock=False, sync=False, map_size=_FIRST_MAP_BYTES) as env:
                for start in range(0, items.num_rows, _ITEMS_AT_ONCE):
                    some = encoded_rows(items.slice(start, _ITEMS_AT_ONCE), item_id, columns)
                    _put(env, [(key_of(one), value) for one, value in some])
                    report("store items", min(start + _ITEMS_AT_ONCE, items.num_rows), items.num_rows, "items")
                env.sync(True)
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
        sync_folder(path.parent)

    def get(self, item_ids: Sequence[int]) -> list[Row | None]:
        """See `TailStore.get`."""
        try:
            with self._env.begin() as turn:
                found = [turn.get(key_of(one)) for one in item_ids]
        except lmdb.Error as error:
            raise DataError(f"{self._path}: the file is damaged: {error}; {_AGAIN}") from None
        where = str(self._path)
        return [None if content is None else decode_row(content, where) for content in found]

    def close(self) -> None:
        """Let go of the file."""
        if self._shared is not None:
            self._shared.release()
            self._shared = None

    def __enter__(self) -> LmdbTail:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _put(env: lmdb.Environment, pairs: Sequence[tuple[bytes, bytes]]) -> None:
    """All of `pairs`, whose keys rise, with as much room as they need."""
    while True:
        try:
            with env.begin(write=True) as turn, turn.cursor() as cursor:
                cursor.putmulti(pairs, append=True)
            return
        except lmdb.MapFullError:
            env.set_mapsize(2 * env.info()["map_size"])
