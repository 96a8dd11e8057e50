"""A server that ends by finishing: a signal closes the door, and it goes when nobody is inside any more."""

from __future__ import annotations

import time
from types import FrameType

import uvicorn

from prerank.serve.admission import Door

MOST_S = 10.0
"""Seconds that those inside have to finish after a signal."""


class EndingServer(uvicorn.Server):
    """uvicorn's, which would close its sockets at once; so those who come late hear that it ends, not nothing.

    The first signal closes `door`. It goes when nobody is inside and `linger_s` seconds have passed, in which whoever
    spreads requests over servers can see that it is not ready; a second signal ends it at once.
    """

    def __init__(self, config: uvicorn.Config, door: Door, linger_s: float = 0.0) -> None:
        super().__init__(config)
        self._door, self._linger_s = door, linger_s
        self._signal = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """What a signal does; see `uvicorn.Server`."""
        if self._door.is_closed:
            super().handle_exit(sig, frame)
        else:
            self._signal = sig
            self._door.close()

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; see `uvicorn.Server`."""
        closed_at = self._door.closed_at
        if closed_at is not None and not self.should_exit:
            passed_s = time.monotonic() - closed_at - self._linger_s
            if passed_s >= (0.0 if not self._door.num_inside else MOST_S):
                super().handle_exit(self._signal, None)
        return await super().on_tick(counter)
