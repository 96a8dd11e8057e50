"""What a process takes on: how many at once, how many wait, who would be too late, and nobody new once it ends.

A request is refused when it comes or not at all: what was let in is begun, unless its time ran out or its client left
while it waited, and then nothing of it is done.
"""

from __future__ import annotations

import asyncio
import contextvars
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from itertools import islice
from typing import TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from prerank.errors import Cancelled, DeadlineExceeded
from prerank.kernels.stop import Stop
from prerank.serve.envelope import Refused
from prerank.serve.graph import Deadline
from prerank.serve.turns import stages_next

T = TypeVar("T")
_MOST_TIMES = 64
"""Of the latest requests, by whose times it is judged who would be too late."""
_LATEST = 16
_CAUTION = 0.97
"""What a request itself will take is guessed to be more than so many of the latest took; what those before it take is
the median of the `_LATEST`, for there the short and the long make up for each other."""


class Door:
    """Whether a process takes new requests, and how many are inside. Only the event loop and signals touch one."""

    def __init__(self) -> None:
        self.num_inside = 0
        self.closed_at: float | None = None

    @property
    def is_closed(self) -> bool:
        """Whether the process is ending."""
        return self.closed_at is not None

    def close(self) -> None:
        """Take nobody new from here on; `check` says so to them."""
        self.closed_at = time.monotonic()

    def check(self) -> None:
        """Raises Refused where the door is closed."""
        if self.is_closed:
            # a client that keeps its connection would ask the same process again
            headers = {"retry-after": "1", "connection": "close"}
            raise Refused(503, "Draining", "the server is ending and takes nothing new; ask again, or another", headers)


class Lane:
    """Work of one kind: `threads` at once, `waiting` more wait their turn, and the rest is turned away.

    `note` is told how many are here, `refused` why one was turned away. To be used from one event loop.
    """

    def __init__(
        self,
        name: str,
        threads: int,
        waiting: int,
        note: Callable[[int], None],
        door: Door,
        refused: Callable[[str], None],
    ) -> None:
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix=name, initializer=stages_next)
        self._threads, self._most, self._num = threads, threads + waiting, 0
        self._note, self._door, self._refused = note, door, refused
        self._times: deque[float] = deque(maxlen=_MOST_TIMES)

    async def run(
        self,
        work: Callable[[], bytes],
        deadline_of: Callable[[], Deadline | None] = lambda: None,
        cancelled: Stop | None = None,
    ) -> Response:
        """What `work` gives, as JSON; see `do`."""
        return Response(await self.do(work, deadline_of, cancelled), media_type="application/json")

    async def do(
        self,
        work: Callable[[], T],
        deadline_of: Callable[[], Deadline | None] = lambda: None,
        cancelled: Stop | None = None,
    ) -> T:
        """What `work` gives. `deadline_of` is asked only where it would have to wait.

        Raises Refused where too much waits, the deadline would pass before the work is done, or the process ends;
        DeadlineExceeded and Cancelled where that is so by when its turn came.
        """
        deadline = self._let_in(deadline_of)

        def begin() -> T:
            start = time.perf_counter()
            if cancelled is not None and cancelled.is_set():
                raise Cancelled("the client left before its turn")
            if deadline is not None and deadline.passed(start):
                raise DeadlineExceeded(
                    f"the deadline of {deadline.ms:g} ms passed while it waited for its turn; allow more with "
                    "deadline_ms"
                )
            try:
                return work()
            finally:
                self._times.append(time.perf_counter() - start)

        self._change(+1)
        try:
            context = contextvars.copy_context()  # the request that is seen, and its id for the logs
            return await asyncio.get_running_loop().run_in_executor(self.pool, context.run, begin)
        finally:
            self._change(-1)

    def _let_in(self, deadline_of: Callable[[], Deadline | None]) -> Deadline | None:
        """The deadline of one that may come in but has to wait. Raises Refused for one that may not."""
        try:
            self._door.check()
        except Refused:
            self._refused("draining")
            raise
        if self._num < self._threads:
            return None  # it begins at once, and who begins is answered as well as time allows
        typical_s, own_s = self._expected_s()
        wait_s = (self._num - self._threads + 1) * typical_s / self._threads
        again = {"retry-after": str(max(1, math.ceil(wait_s)))}
        if self._num >= self._most:
            self._refused("queue_full")
            raise Refused(503, "Overloaded", f"{self._num} requests are waiting already; try again later", again)
        deadline = deadline_of()
        if deadline is not None and wait_s + own_s > deadline.left_s(time.perf_counter()):
            self._refused("deadline")
            raise Refused(
                503,
                "Overloaded",
                f"the deadline of {deadline.ms:g} ms would pass first: {self._num} requests are here, and one takes "
                f"about {1000 * own_s:.3g} ms; try again later, or allow more with deadline_ms",
                again,
            )
        return deadline

    def _expected_s(self) -> tuple[float, float]:
        """How long one of those before takes, and how long the next one may."""
        if not self._times:
            return 0.0, 0.0
        latest = sorted(islice(reversed(self._times), _LATEST))
        every = sorted(self._times)
        return latest[len(latest) // 2], every[int(_CAUTION * (len(every) - 1))]

    def _change(self, by: int) -> None:
        self._num += by
        self._door.num_inside += by
        self._note(self._num)


@asynccontextmanager
async def leaving(http: HttpRequest) -> AsyncIterator[Stop]:
    """Set when the client of this request, whose body was read, has gone; while this lasts."""
    gone = Stop()

    async def wait() -> None:
        if (await http.receive())["type"] == "http.disconnect":
            gone.set()

    waiting = asyncio.create_task(wait())
    try:
        yield gone
    finally:
        waiting.cancel()
