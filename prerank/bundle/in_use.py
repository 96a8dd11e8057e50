"""Which versions processes have loaded: each holds a lock in the version's folder, which dies with the process.

`flock`, so on a network file system other machines are seen only as far as that file system keeps it.
"""

from __future__ import annotations

import fcntl
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prerank.bundle.manifest import MANIFEST


class Hold:
    """A version is in use for as long as this is referred to."""

    def __init__(self, descriptor: int) -> None:
        weakref.finalize(self, os.close, descriptor)


def hold(path: Path) -> Hold | None:
    """Say that the version in the folder `path` is in use; None where it has no manifest, or there are no locks."""
    try:
        descriptor = os.open(path / MANIFEST, os.O_RDONLY)
    except OSError:
        return None
    held = Hold(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    except OSError:
        return None
    return held


@contextmanager
def unused(path: Path) -> Iterator[bool]:
    """Whether nobody has the version in the folder `path`; while this lasts, nobody can begin to.

    One without a manifest nobody can have. Where that cannot be known, somebody has it.
    """
    try:
        descriptor = os.open(path / MANIFEST, os.O_RDWR)  # some file systems ask for that
    except FileNotFoundError:
        yield True
        return
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)
