"""Where ids are in an ascending array: by a hash of their own natively, else by bisection.

Bisection of many ids waits for memory again and again, one time after the other; the hash waits once for the place,
once for the id there, and for many ids at once.
"""

from __future__ import annotations

import ctypes

import numpy as np

from prerank.kernels import native
from prerank.types import Array

_MOST = 1 << 30  # places are int32
_FULL = 0.75


class Lookup:
    """Places in `ids` int64 [N], which ascend and stay as they are. Threads may share one.

    Natively it takes 5 to 11 bytes an id beside the ids.
    """

    def __init__(self, ids: Array) -> None:
        assert ids.dtype == np.int64
        assert ids.ndim == 1
        self._ids = np.ascontiguousarray(ids)
        self._places: Array | None = None
        library = native.library()
        if library is None or not 0 < len(ids) < _MOST * _FULL:
            return
        self._bits = max(1, int(np.ceil(np.log2(len(ids) / _FULL))))
        self._places = np.zeros(1 << self._bits, np.int32)
        self._build(library)
        self._find = library.prerank_lookup
        self._find.restype = None
        self._known = (_at(self._ids), _at(self._places), ctypes.c_int32(self._bits))

    def find(self, wanted: Array) -> Array:
        """`wanted` int64 [...] -> int64 [...]: the place of each, -1 of one that is not there."""
        if self._places is None:
            return bisected(self._ids, wanted)
        wanted = np.asarray(wanted, np.int64, order="C")
        found = np.empty(wanted.shape, np.int64)
        self._find(*self._known, _at(wanted), ctypes.c_int64(wanted.size), _at(found))
        return found

    def _build(self, library: ctypes.CDLL) -> None:
        assert self._places is not None
        library.prerank_lookup_build.restype = None
        size = ctypes.c_int64(len(self._ids))
        library.prerank_lookup_build(_at(self._ids), size, _at(self._places), ctypes.c_int32(self._bits))


def bisected(ids: Array, wanted: Array) -> Array:
    """The same without a hash, of `ids` int64 [N]."""
    if not len(ids):
        return np.full(wanted.shape, -1, np.int64)
    places = np.minimum(np.searchsorted(ids, wanted), len(ids) - 1)
    return np.where(ids[places] == wanted, places, -1)


def _at(array: Array) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
