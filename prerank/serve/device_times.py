"""How long a device takes, by what it took: to refuse at once a request that it would be too late for."""

from __future__ import annotations

import threading
from collections import deque
from itertools import islice

from prerank.serve.device_buckets import Buckets

_MOST = 64
_LATEST = 16
_CAUTION = 0.9
"""As `serve.admission` has them: a request's own batch is guessed to take more than so many of the latest did; those
before it the median of the latest few, for there the short and the long make up for each other."""


class Times:
    """Of batches by their size, one of `buckets`; None is a request of no size, which begins before its candidates.

    Threads may share one.
    """

    def __init__(self, buckets: Buckets) -> None:
        self._buckets = buckets
        self._lock = threading.Lock()
        sizes = (*buckets.sizes, None)
        self._whole: dict[int | None, deque[float]] = {size: deque(maxlen=_MOST) for size in sizes}
        self._share: dict[int | None, deque[float]] = {size: deque(maxlen=_MOST) for size in sizes}

    def note(self, size: int | None, num_requests: int, seconds: float) -> None:
        """A batch of so many requests of a size took so long; of a request that was cut, one of its pieces."""
        with self._lock:
            self._whole[size].append(seconds)
            self._share[size].append(seconds / num_requests)

    def own_s(self, num: int | None) -> float:
        """How long the batch of a request of `num` candidates may take, in seconds; 0 where nothing is known yet."""
        with self._lock:
            every = sorted(self._whole[self._size_of(num)])
        return self._num_pieces(num) * every[int(_CAUTION * (len(every) - 1))] if every else 0.0

    def share_s(self, num: int | None) -> float:
        """For how long a request of `num` candidates keeps others waiting, in seconds."""
        with self._lock:
            latest = sorted(islice(reversed(self._share[self._size_of(num)]), _LATEST))
        return self._num_pieces(num) * latest[len(latest) // 2] if latest else 0.0

    def _size_of(self, num: int | None) -> int | None:
        return None if num is None else self._buckets.size_of(num)

    def _num_pieces(self, num: int | None) -> int:
        return 1 if num is None else len(self._buckets.pieces(num))


class Backlog:
    """How long what waits and runs will keep the device, in seconds of one worker. Threads may share one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds = 0.0

    def add(self, seconds: float) -> None:
        """More of it, or less."""
        with self._lock:
            self._seconds += seconds

    @property
    def seconds(self) -> float:
        """Not less than none, whatever floats add up to."""
        return max(0.0, self._seconds)
