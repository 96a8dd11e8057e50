"""A circuit breaker: a store that failed again and again is left alone for a while, so that nobody waits for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

from prerank.errors import CircuitOpen


class Breaker:
    """Around each call: after `failures` of them in a row have failed, calls are refused for `rest_s` seconds.

    Then one call is let through; if it succeeds all are again, and if it fails there is another rest. Threads may share
    one. (Nygard 2007, Release It!, "Circuit Breaker".)
    """

    def __init__(
        self, what: str, failures: int = 5, rest_s: float = 2.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._what, self._most, self._rest_s, self._clock = what, failures, rest_s, clock
        self._lock = threading.Lock()
        self._failed = 0
        self._until = 0.0

    @property
    def is_open(self) -> bool:
        """Whether a call would be refused now."""
        with self._lock:
            return self._failed >= self._most and self._clock() < self._until

    def __enter__(self) -> None:
        """Raises CircuitOpen where the store is to be left alone."""
        with self._lock:
            if self._failed < self._most:
                return
            now = self._clock()
            if now < self._until:
                raise CircuitOpen(
                    f"{self._what}: failed {self._failed} times in a row; not asked again for {self._until - now:.1f} s"
                )
            self._until = now + self._rest_s  # this call is let through, and others wait for what comes of it

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            if error is None:
                self._failed = 0
                return
            self._failed += 1
            if self._failed >= self._most:
                self._until = self._clock() + self._rest_s
