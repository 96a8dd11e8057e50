"""Memory that is read at random, in large pages: the processor then seldom has to ask where a page is.

Rows of a table of a million are each in a page of their own, and a processor remembers where a few thousand pages are.
"""

from __future__ import annotations

import ctypes
import sys

_LARGE = 2 << 20
_COLLAPSE = 25  # MADV_COLLAPSE of Linux 6.1: now, and whatever the system's setting for pages to come


def in_large_pages(address: int, num_bytes: int) -> bool:
    """Put the whole large pages among these bytes of the process's own memory into large pages, if the system can.

    What is in them stays, and threads may read meanwhile. False where there are none, or the system has no such pages,
    none that are free, or no such call: nothing has changed then. Memory of a mapped file is mostly not moved.
    """
    start = -(-address // _LARGE) * _LARGE
    length = (address + num_bytes) // _LARGE * _LARGE - start
    if length <= 0 or sys.platform != "linux":
        return False
    call = ctypes.CDLL(None).madvise
    return int(call(ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_int(_COLLAPSE))) == 0
