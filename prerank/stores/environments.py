"""Open LMDB files, each once a process: two versions share a store, and the library opens none twice.

A file is known by its inode, so one that was replaced and the one that took its path are two.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import lmdb

_lock = threading.Lock()
_opened: dict[tuple[int, int], SharedEnvironment] = {}


@dataclass(slots=True, eq=False)
class SharedEnvironment:
    """An open file and how many hold it; `release` it as often as it was given.

    A file of fewer `num_bytes` than it promised when it was opened is cut short, and reading it kills the process.
    """

    env: lmdb.Environment
    key: tuple[int, int]
    promised_bytes: int
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
    return _share(path, _to_read)


def share_to_write(path: Path, map_bytes: int) -> SharedEnvironment:
    """The file at `path` to read and write, made if it is not there; it may grow to `map_bytes`.

    A commit is on the disk before it returns. Threads and processes write in turn and never wait to read.
    Raises lmdb.Error or OSError if it is no such file, or cannot be written.
    """
    if not path.exists():
        path.touch()  # an empty file is an empty store, and has the inode it is known by
        sync_folder(path.parent)

    def to_write(path: Path) -> lmdb.Environment:
        # without metasync a crash of the machine may undo the last commit, not damage the file, for half the time
        env = lmdb.open(str(path), subdir=False, metasync=False, map_size=map_bytes, max_dbs=0)
        env.reader_check()  # places of readers that died
        return env

    return _share(path, to_write)


def sync_folder(folder: Path) -> None:
    """Have the disk hold the names that are in `folder` now."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _to_read(path: Path) -> lmdb.Environment:
    return lmdb.open(str(path), subdir=False, readonly=True, lock=False, create=False, max_dbs=0)


def _share(path: Path, opened: Callable[[Path], lmdb.Environment]) -> SharedEnvironment:
    with _lock:
        while True:
            found = path.stat()
            key = (found.st_dev, found.st_ino)
            if key not in _opened:
                env = opened(path)
                if not os.path.samestat(found, path.stat()):
                    env.close()  # replaced while it was opened, so which of the two it is cannot be known
                    continue
                # what is promised is asked before what is there, for a file that another process makes longer
                promised = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
                _opened[key] = SharedEnvironment(env, key, promised, path.stat().st_size)
            _opened[key].num_holders += 1
            return _opened[key]
