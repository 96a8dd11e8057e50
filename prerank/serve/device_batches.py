"""Requests that wait for a device, as batches: small ones share one, within a bound on waiting; large are alone."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from prerank.errors import DeadlineExceeded, DeviceFailed
from prerank.serve.device_sought import Sought
from prerank.serve.graph import Deadline
from prerank.types import CandidateSet, Features


@dataclass(slots=True, eq=False)
class Job:
    """One request: the ranker's side of its user [1, ...], candidates [1, N] or how they are sought, and how many win.

    Jobs of equal `line` may share a batch of at most `most`. `expected_s` is its share of a batch's time. Its future is
    of `Ranked`, or of `Judged` where a version only judges.
    """

    user_side: Features
    candidates: CandidateSet | Sought
    k: int
    line: Hashable
    most: int = 1
    deadline: Deadline | None = None
    expected_s: float = 0.0
    arrived: float = 0.0
    future: Future[Any] = field(default_factory=Future)

    @property
    def given(self) -> CandidateSet:
        """The candidates of a request that came with them."""
        assert isinstance(self.candidates, CandidateSet)
        return self.candidates

    @property
    def num(self) -> int:
        """N."""
        return self.given.rows.shape[1]


class Lines:
    """Jobs wait in a line each, and whole batches leave. Threads may share it.

    A batch leaves when it is as large as it may be, or when its first job has waited `wait_s`. `ended` is told of a job
    that leaves in no batch, for its caller left or its time ran out.
    """

    def __init__(
        self,
        wait_s: float,
        ended: Callable[[Job], None] = lambda job: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._wait_s, self._ended, self._clock = wait_s, ended, clock
        self._changed = threading.Condition()
        self._lines: dict[Hashable, deque[Job]] = {}
        self._is_closed = False

    def put(self, job: Job) -> None:
        """Let it wait from now on. Raises DeviceFailed once this is closed."""
        with self._changed:
            if self._is_closed:
                raise DeviceFailed("the device engine is closed, and takes nothing new")
            job.arrived = self._clock()
            self._lines.setdefault(job.line, deque()).append(job)
            self._changed.notify()

    def close(self) -> None:
        """Take nothing new; what waits leaves without more waiting."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def __len__(self) -> int:
        with self._changed:
            return sum(map(len, self._lines.values()))

    def take(self) -> list[Job] | None:
        """The next batch; waits until there is one. None once this is closed and empty."""
        while True:
            with self._changed:
                found = self._next()
            if found is None:
                return None
            # outside, for a future's callbacks are anybody's
            batch = [job for job in found if self._is_wanted(job)]
            if batch:
                return batch

    def _next(self) -> list[Job] | None:
        while True:
            if self._is_closed and not self._lines:
                return None
            now = self._clock()
            ripe = [line for line in self._lines.values() if self._ripens(line) <= now]
            if ripe:
                line = min(ripe, key=lambda one: one[0].arrived)
                batch = [line.popleft() for _ in range(min(line[0].most, len(line)))]
                if not line:
                    del self._lines[batch[0].line]
                if self._lines:
                    self._changed.notify()  # this thread goes away with its batch, and somebody must watch the rest
                return batch
            soonest = min(map(self._ripens, self._lines.values()), default=None)
            self._changed.wait(None if soonest is None else max(0.0, soonest - now))

    def _ripens(self, line: deque[Job]) -> float:
        """When the first batch of a line may leave."""
        if self._is_closed or len(line) >= line[0].most:
            return line[0].arrived
        return line[0].arrived + self._wait_s

    def _is_wanted(self, job: Job) -> bool:
        late = job.deadline is not None and job.deadline.passed(self._clock())
        if not job.future.set_running_or_notify_cancel():
            self._ended(job)
            return False
        if late:
            assert job.deadline is not None
            self._ended(job)
            text = f"the deadline of {job.deadline.ms:g} ms passed while it waited for the device; allow more"
            job.future.set_exception(DeadlineExceeded(text))
        return not late
