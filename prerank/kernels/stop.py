"""Whether somebody still waits for what runs: told to native code, which looks between blocks.

Who starts work that may be left behind does so inside a Stop; whoever leaves it sets it, or it has a time.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from prerank.errors import Cancelled


def _now_ns() -> int:
    """By the clock that native code reads."""
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC)


class _Told(ctypes.Structure):
    """See native/stop.h."""

    _fields_ = [("is_set", ctypes.c_int32), ("until_ns", ctypes.c_int64)]


class Stop:
    """Set once, by any thread, or left when its time has come; native code finds both at `address`."""

    __slots__ = ("_told",)

    def __init__(self) -> None:
        self._told = _Told(0, 0)

    def set(self) -> None:
        """Nobody waits any more."""
        self._told.is_set = 1

    def is_set(self) -> bool:
        """Whether somebody has set it."""
        return bool(self._told.is_set)

    def is_left(self) -> bool:
        """Whether nobody waits any more: it is set, or its time has come."""
        until_ns = self._told.until_ns
        return bool(self._told.is_set) or bool(until_ns and _now_ns() >= until_ns)

    @property
    def address(self) -> int:
        """Where native code finds it, as long as this object is there."""
        return ctypes.addressof(self._told)

    def check(self) -> None:
        """Raises Cancelled once it is left."""
        if self.is_left():
            raise Cancelled("nobody waits for this any more")

    @contextmanager
    def here(self, left_s: float | None = None) -> Iterator[None]:
        """Inside, in this context, work may be left by setting this; it ends after `left_s` seconds, unless None."""
        before = _current.get()
        self._told.until_ns = 0 if left_s is None else _now_ns() + max(1, round(left_s * 1e9))
        _current.set(self)
        try:
            yield
        finally:
            self._told.until_ns = 0
            _current.set(before)


_NEVER = Stop()
_current: ContextVar[Stop] = ContextVar("prerank_stop", default=_NEVER)


def current() -> Stop:
    """That of what runs here; one that nobody sets, where nobody may leave it."""
    return _current.get()
