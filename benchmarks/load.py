"""Load over HTTP from a process of its own: so many clients that each wait for their answer, or requests that come
when they come, whether or not those before were answered.

In an open loop a request's time counts from when it was due, so one that could not even be sent is as late as it is;
how much of it is the sender's own, who may share the cores, is told too.
`python -m benchmarks.load` takes a Plan as JSON on its input and gives what came of it.
"""

from __future__ import annotations

import asyncio
import json
import os
import selectors
import subprocess
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, field

import numpy as np

from benchmarks.machine import REPOSITORY
from prerank.kernels.turns import take_turns

_VERSION = b'"version":"'


@dataclass(frozen=True, slots=True)
class Plan:
    """What to send: `bodies` in turn to `path`, by `clients` that wait, or `rate` a second as a Poisson process."""

    port: int
    bodies: tuple[str, ...]
    seconds: float
    clients: int = 0
    rate: float = 0.0
    path: str = "/v1/recommend"
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Loaded:
    """Of each request: when it was due, in seconds from the start, how long until it was answered, and the status.

    `late_ms` of it passed before it was sent. `version` is the answer's; a status of 0 is a connection that broke.
    """

    due_s: list[float] = field(default_factory=list)
    ms: list[float] = field(default_factory=list)
    late_ms: list[float] = field(default_factory=list)
    status: list[int] = field(default_factory=list)
    version: list[str] = field(default_factory=list)
    degraded: list[bool] = field(default_factory=list)

    def times(self, status: int = 200, start: float = 0.0, end: float = float("inf")) -> list[float]:
        """Milliseconds of the requests with this status that were due in that time."""
        found = zip(self.due_s, self.ms, self.status, strict=True)
        return [ms for due, ms, one in found if one == status and start <= due < end]

    def from_sent(self, status: int = 200) -> list[float]:
        """Milliseconds of the requests with this status from when they were sent."""
        found = zip(self.ms, self.late_ms, self.status, strict=True)
        return [ms - late for ms, late, one in found if one == status]

    def counts(self) -> dict[int, int]:
        """How many of each status."""
        return {one: self.status.count(one) for one in sorted(set(self.status))}


def load(plan: Plan) -> Loaded:
    """Send it all, from another process."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.load"],
        input=json.dumps(asdict(plan)),
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    if done.returncode:
        raise RuntimeError(f"the load could not be sent: {done.stderr}")
    return Loaded(**json.loads(done.stdout))


class _Connections:
    """Kept connections to one port: as many as requests are under way at once."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._free: deque[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = deque()

    async def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1:{self._port}\r\ncontent-type: application/json\r\n"
        message = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
        try:
            pair = self._free.popleft() if self._free else await asyncio.open_connection("127.0.0.1", self._port)
            reader, writer = pair
            writer.write(message)
            headers = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(headers.split(b"content-length:")[1].split(b"\r\n")[0])
            content = await reader.readexactly(length)
        except (OSError, asyncio.IncompleteReadError):
            return 0, b""
        if b"connection: close" in headers:
            writer.close()
        else:
            self._free.append(pair)
        return int(headers[9:12]), content


async def _send(plan: Plan) -> Loaded:
    connections, loaded = _Connections(plan.port), Loaded()
    bodies = [one.encode() for one in plan.bodies]
    start = time.perf_counter()

    async def one(number: int, due: float) -> None:
        late = time.perf_counter() - start - due
        status, content = await connections.post(plan.path, bodies[number % len(bodies)])
        took = time.perf_counter() - start - due
        loaded.due_s.append(round(due, 5))
        loaded.ms.append(round(1000 * took, 4))
        loaded.late_ms.append(round(1000 * late, 4))
        loaded.status.append(status)
        at = content.find(_VERSION)
        version = content[at + len(_VERSION) : content.index(b'"', at + len(_VERSION))].decode() if at >= 0 else ""
        loaded.version.append(version)
        loaded.degraded.append(b'"degraded":true' in content)

    async def client(first: int) -> None:
        number = first
        while (now := time.perf_counter() - start) < plan.seconds:
            await one(number, now)
            number += plan.clients

    if plan.clients:
        await asyncio.gather(*(client(n) for n in range(plan.clients)))
        return loaded
    made = np.random.default_rng(plan.seed)
    gaps = made.exponential(1 / plan.rate, int(2 * plan.rate * plan.seconds) + 100)
    due = [float(at) for at in np.cumsum(gaps) if at < plan.seconds]
    sent = set()
    for number, at in enumerate(due):
        await asyncio.sleep(max(0.0, at - (time.perf_counter() - start)))
        task = asyncio.create_task(one(number, at))
        sent.add(task)
        task.add_done_callback(sent.discard)
    await asyncio.gather(*sent)
    return loaded


def _go_first() -> None:
    """Who measures has the processor when it wakes, before those it measures: for real where the system lets it."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except (OSError, AttributeError):  # not allowed, or not Linux
        take_turns(slice_ms=0.1)


def _punctual() -> asyncio.AbstractEventLoop:
    # epoll waits for whole milliseconds, and who sends late seems to be answered late
    return asyncio.SelectorEventLoop(selectors.SelectSelector())


def main() -> None:
    plain = json.load(sys.stdin)
    plan = Plan(**{**plain, "bodies": tuple(plain["bodies"])})
    _go_first()
    with asyncio.Runner(loop_factory=_punctual) as runner:
        print(json.dumps(asdict(runner.run(_send(plan)))))


if __name__ == "__main__":
    main()
