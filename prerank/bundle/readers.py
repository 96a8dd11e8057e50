"""Who still reads: so that a row that nobody has any more is given away only when nobody reads it any more."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


class Readers:
    """Reads begin and end; `mark` draws a line after those that have begun. Threads may share one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._line = 0
        self._reading: Counter[int] = Counter()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """While this lasts, no row that its reader may have seen is given away."""
        with self._lock:
            line = self._line
            self._reading[line] += 1
        try:
            yield
        finally:
            with self._lock:
                self._reading[line] -= 1
                if not self._reading[line]:
                    del self._reading[line]

    def mark(self) -> int:
        """A line: reads that have begun are before it, later ones are not."""
        with self._lock:
            self._line += 1
            return self._line

    def are_past(self, line: int) -> bool:
        """Whether all reads that began before this line have ended."""
        with self._lock:
            return all(began >= line for began in self._reading)
