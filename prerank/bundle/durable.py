"""Files that are wholly there or not at all, whenever the machine stops."""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LOCK = ".lock"


def sync(path: Path) -> None:
    """Have the disk hold what `path`, a file or a folder, holds now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Write `text` to `path`; every reader sees the old file or the new one, also after a crash."""
    beside = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        beside.write_text(text, encoding="utf-8")
        sync(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    sync(path.parent)


def append_line(path: Path, line: str) -> None:
    """Add a whole `line` to the file at `path`; one that was cut while being written goes."""
    with path.open("ab+") as file:
        whole = _whole_bytes(path)
        if whole < path.stat().st_size:
            file.truncate(whole)
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())
    sync(path.parent)


def _whole_bytes(path: Path) -> int:
    """How many bytes of the file are whole lines."""
    return path.read_bytes().rfind(b"\n") + 1


@contextmanager
def locked(store: Path) -> Iterator[None]:
    """Hold the one lock of a funnel's store; threads and processes wait their turn, a dead holder's is let go."""
    store.mkdir(parents=True, exist_ok=True)
    with (store / _LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
