"""What was changed of items while serving: one LMDB file, a record an item, read whole when a version is opened.

The key is the item_id, big-endian and of flipped sign so that keys are in its order; the value is JSON. An item that
no version has yet keeps its record for the one that will. Whole items, and that items left, have a moment, so that a
version can tell those that it was made with.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeAlias

import lmdb
import msgspec

from prerank.errors import DataError
from prerank.stores.environments import SharedEnvironment, share_to_write
from prerank.stores.user_file import id_of, key_of
from prerank.types import ItemChange

_MAP_BYTES = 1 << 36  # address space, not disk


_Plain: TypeAlias = str | int | float | bool | None


class _Record(msgspec.Struct, omit_defaults=True):
    on: bool | None = None
    pacing: float | None = None
    values: dict[str, float] = {}
    columns: dict[str, _Plain | list[_Plain]] | None = None
    removed: bool = False
    time_ns: int = 0

    @classmethod
    def of(cls, change: ItemChange, time_ns: int) -> _Record:
        """As it is kept."""
        columns = None if change.columns is None else dict(change.columns)
        return cls(change.on, change.pacing, dict(change.values), columns, change.removed, time_ns)

    def change(self, item_id: int) -> ItemChange:
        """All of it as one change of the item."""
        return ItemChange(item_id, self.on, self.pacing, self.values, self.columns, self.removed)


@dataclass(frozen=True, slots=True)
class Stored:
    """All that was changed of one item, as one; `time_ns` is when it came whole or left, and 0 where it did neither."""

    change: ItemChange
    time_ns: int


class ItemStore:
    """An open store. Threads may share one: they write in turn."""

    def __init__(self, shared: SharedEnvironment, path: Path) -> None:
        self._shared: SharedEnvironment | None = shared
        self._env, self._path = shared.env, path

    @classmethod
    def open(cls, path: Path) -> ItemStore:
        """The file at `path`, made if it is not there. Raises DataError if it is no such store."""
        try:
            return cls(share_to_write(path, _MAP_BYTES), path)
        except (lmdb.Error, OSError) as error:
            raise DataError(f"{path}: not a store of items: {error}; move it away to start an empty one") from None

    def put(self, changes: Sequence[ItemChange]) -> list[ItemChange]:
        """Merge each change into its item's record, and give what every item's is then, each once.

        All are on the disk when this returns, or none is. Raises DataError if the file cannot be written.
        """
        merged: dict[int, ItemChange] = {}
        try:
            with self._env.begin(write=True) as turn:
                # within the turn, so that whoever writes later has the later time
                now_ns = time.time_ns()
                for change in changes:
                    record = self._decoded(turn.get(key_of(change.item_id)))
                    whole = record.change(change.item_id).then(change)
                    is_dated = change.columns is not None or change.removed
                    kept = _Record.of(whole, now_ns if is_dated else record.time_ns)
                    turn.put(key_of(change.item_id), msgspec.json.encode(kept))
                    merged[change.item_id] = whole
        except (lmdb.Error, OSError) as error:
            raise DataError(f"{self._path}: cannot be written: {error}") from None
        return list(merged.values())

    def get(self, item_ids: Iterable[int]) -> list[Stored]:
        """The records of these items, of one moment, as far as there are any. Raises DataError for a damaged one."""
        with self._env.begin() as turn:
            found = [(one, turn.get(key_of(one))) for one in item_ids]
        records = [(item_id, self._decoded(content)) for item_id, content in found if content is not None]
        return [Stored(record.change(item_id), record.time_ns) for item_id, record in records]

    def all(self) -> Iterator[Stored]:
        """Every item's record, by rising item_id. Raises DataError for one that is damaged."""
        with self._env.begin() as turn:
            for key, content in turn.cursor():
                record = self._decoded(bytes(content))
                yield Stored(record.change(id_of(bytes(key))), record.time_ns)

    def close(self) -> None:
        """Let go of the file."""
        if self._shared is not None:
            self._shared.release()
            self._shared = None

    def __enter__(self) -> ItemStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _decoded(self, content: bytes | None) -> _Record:
        if content is None:
            return _Record()
        try:
            return msgspec.json.decode(content, type=_Record)
        except msgspec.DecodeError as error:
            raise DataError(f"{self._path}: a record is damaged: {error}; move the file away to start anew") from None
