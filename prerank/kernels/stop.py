"""Whether somebody still waits for what runs: told to native code, which looks between blocks.

Who starts work that may be left behind gives its thread a Stop; whoever leaves it sets it.
"""

from __future__ import annotations

import ctypes
from contextvars import ContextVar

from prerank.errors import Cancelled


class Stop:
    """Set once, by any thread; `address` is that of an int32 that is not 0 from then on."""

    __slots__ = ("_flag",)

    def __init__(self) -> None:
        self._flag = ctypes.c_int32(0)

    def set(self) -> None:
        """Nobody waits any more."""
        self._flag.value = 1

    @property
    def is_set(self) -> bool:
        """Whether nobody waits any more."""
        return bool(self._flag.value)

    @property
    def address(self) -> int:
        """Where native code finds it, as long as this object is there."""
        return ctypes.addressof(self._flag)

    def check(self) -> None:
        """Raises Cancelled once it is set."""
        if self.is_set:
            raise Cancelled("nobody waits for this any more")


_NEVER = Stop()
_current: ContextVar[Stop] = ContextVar("prerank_stop", default=_NEVER)


def current() -> Stop:
    """That of what runs here; one that nobody sets, where nobody may leave it."""
    return _current.get()


def let(stop: Stop | None) -> None:
    """From here on, in this context, work may be left by setting `stop`; None: it may not."""
    _current.set(_NEVER if stop is None else stop)
