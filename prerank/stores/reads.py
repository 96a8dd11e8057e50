"""How often each column of metadata was read, of all servers of a store: one small LMDB file of counters."""

from __future__ import annotations

import struct
import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import lmdb
import structlog

from prerank.errors import DataError
from prerank.stores.environments import SharedEnvironment, share_to_write

FILE = "metadata-reads.lmdb"
_COUNTS = struct.Struct("<QQ")
_MAP_BYTES = 1 << 30  # address space, not disk
_FLUSH_S = 10.0
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Reads:
    """Of one column: items for which somebody asked for it by name, and with which it was sent all the same."""

    asked: int
    unasked: int


class ReadCounts:
    """Counters that are in memory for some seconds and then on the disk. Threads may share one."""

    def __init__(self, shared: SharedEnvironment, path: Path) -> None:
        self._shared: SharedEnvironment | None = shared
        self._env, self._path = shared.env, path
        self._lock = threading.Lock()
        self._asked, self._unasked = Counter[str](), Counter[str]()
        self._flushed = time.monotonic()

    @classmethod
    def open(cls, path: Path) -> ReadCounts:
        """The file at `path`, made if it is not there. Raises DataError if it is no such file."""
        try:
            return cls(share_to_write(path, _MAP_BYTES), path)
        except (lmdb.Error, OSError) as error:
            raise DataError(f"{path}: not a file of counters: {error}; move it away to start anew") from None

    def add(self, columns: Iterable[str], num_items: int, by_name: bool) -> None:
        """Note that these columns were read of so many items; on the disk some seconds later, or at `flush`."""
        with self._lock:
            counts = self._asked if by_name else self._unasked
            for column in columns:
                counts[column] += num_items
            is_due = time.monotonic() - self._flushed > _FLUSH_S
        if is_due:
            self.flush()

    def flush(self) -> None:
        """Bring what was noted to the disk; where that cannot be written it is logged, for no answer depends on it."""
        with self._lock:
            asked, self._asked = self._asked, Counter()
            unasked, self._unasked = self._unasked, Counter()
            self._flushed = time.monotonic()
        columns = {*asked, *unasked}
        if not columns:
            return
        try:
            with self._env.begin(write=True) as turn:
                for column in columns:
                    before = _decoded(turn.get(column.encode()))
                    after = _COUNTS.pack(before.asked + asked[column], before.unasked + unasked[column])
                    turn.put(column.encode(), after)
        except (lmdb.Error, OSError) as error:
            _log.warning("reads of metadata could not be counted", path=str(self._path), error=str(error))

    def all(self) -> dict[str, Reads]:
        """Every column that was ever read."""
        self.flush()
        with self._env.begin() as turn:
            return {bytes(key).decode(): _decoded(bytes(value)) for key, value in turn.cursor()}

    def close(self) -> None:
        """Flush, and let go of the file."""
        if self._shared is not None:
            self.flush()
            self._shared.release()
            self._shared = None


def _decoded(value: bytes | None) -> Reads:
    return Reads(*_COUNTS.unpack(value)) if value is not None and len(value) == _COUNTS.size else Reads(0, 0)
