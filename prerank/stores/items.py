"""What was changed of items while serving: one LMDB file, a record an item, read whole when a version is opened.

The key is the item_id, big-endian and of flipped sign so that keys are in its order; the value is JSON. An item that
no version has yet keeps its record for the one that will.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import lmdb
import msgspec

from prerank.errors import DataError
from prerank.stores.environments import SharedEnvironment, share_to_write
from prerank.stores.user_file import id_of, key_of
from prerank.types import ItemChange

_MAP_BYTES = 1 << 36  # address space, not disk


class _Record(msgspec.Struct, omit_defaults=True):
    on: bool | None = None
    pacing: float | None = None
    values: dict[str, float] = {}


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

    def put(self, changes: Sequence[ItemChange]) -> None:
        """Merge each change into its item's record; all are on the disk when this returns, or none is.

        Raises DataError if the file cannot be written.
        """
        try:
            with self._env.begin(write=True) as turn:
                for change in changes:
                    record = self._decoded(turn.get(key_of(change.item_id)))
                    if change.on is not None:
                        record.on = change.on
                    if change.pacing is not None:
                        record.pacing = change.pacing
                    record.values |= change.values
                    turn.put(key_of(change.item_id), msgspec.json.encode(record))
        except (lmdb.Error, OSError) as error:
            raise DataError(f"{self._path}: cannot be written: {error}") from None

    def all(self) -> Iterator[ItemChange]:
        """Every item's record, by rising item_id. Raises DataError for one that is damaged."""
        with self._env.begin() as turn:
            for key, content in turn.cursor():
                record = self._decoded(bytes(content))
                yield ItemChange(id_of(bytes(key)), record.on, record.pacing, record.values)

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
