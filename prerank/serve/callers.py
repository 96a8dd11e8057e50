"""Who still waits for a search that runs: looked at all the time, for a native scan is told by a flag alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prerank.kernels.stop import Stop

_LOOK_S = 0.005


class Callers:
    """Searches that run, each ended when its caller is found gone. Threads share one; one thread of its own looks."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: dict[Stop, Callable[[], bool]] = {}
        self._thread: threading.Thread | None = None

    @contextmanager
    def waited_for(self, is_gone: Callable[[], bool]) -> Iterator[None]:
        """What runs here may be left: it raises Cancelled some milliseconds after `is_gone` says so.

        `is_gone` is not asked any more when this ends.
        """
        stop = Stop()
        with self._changed:
            self._waiting[stop] = is_gone
            if self._thread is None:
                self._thread = threading.Thread(target=self._look, name="callers", daemon=True)
                self._thread.start()
            self._changed.notify()
        try:
            with stop.here():
                yield
        finally:
            with self._changed:  # whoever looks has done so
                del self._waiting[stop]

    def _look(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    self._changed.wait()
                for stop, is_gone in self._waiting.items():
                    if not stop.is_set() and is_gone():
                        stop.set()
                self._changed.wait(_LOOK_S)
