"""How soon a thread has its turn on a processor that others want too."""

from __future__ import annotations

import ctypes

from prerank.kernels import native


def take_turns(nicer: int = 0, slice_ms: float = 0.0) -> bool:
    """Make the calling thread so much nicer to others, and its turns so long; 0: as long as the system thinks right.

    One that wakes has the processor from one of longer turns: Linux 6.12 on, an earlier one takes the niceness alone.
    False where nothing changed: without native kernels, elsewhere than on Linux, by another policy than the usual one.
    """
    library = native.library()
    if library is None:
        return False
    return bool(library.prerank_take_turns(ctypes.c_int32(nicer), ctypes.c_int64(round(1e6 * slice_ms))))
