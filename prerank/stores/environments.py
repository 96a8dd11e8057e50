"""LMDB files open for reading, each once a process: two versions share a store, and the library opens none twice.

A file is known by its inode, so one that was replaced and the one that took its path are two.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path

import lmdb

_lock = threading.Lock()
_opened: dict[tuple[int, int], SharedEnvironment] = {}


@dataclass(slots=True, eq=False)
class SharedEnvironment:
    """An open file and how many hold it; `release` it as often as it was given."""

    env: lmdb.Environment
    key: tuple[int, int]
    num_bytes: int
    num_holders: int = 0

    def release(self) -> None:
        """Close the file when nobody else holds it."""
        with _lock:
            self.num_holders -= 1
            if not self.num_holders:
                del _opened[self.key]
                self.env.close()


def share(path: Path) -> SharedEnvironment:
    """The file at `path`, a single LMDB file, to read. Raises lmdb.Error or OSError if it is none."""
    with _lock:
        while True:
            found = path.stat()
            key = (found.st_dev, found.st_ino)
            if key not in _opened:
                env = lmdb.open(str(path), subdir=False, readonly=True, lock=False, create=False, max_dbs=0)
                if not os.path.samestat(found, path.stat()):
                    env.close()  # replaced while it was opened, so which of the two it is cannot be known
                    continue
                _opened[key] = SharedEnvironment(env, key, found.st_size)
            _opened[key].num_holders += 1
            return _opened[key]
