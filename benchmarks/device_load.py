"""Many requests of a device engine: as many as it can, or as they come; and what changes meanwhile.

Requests come in an open loop, by a thread of the process that serves: a request's time counts from when it was due.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from threading import Semaphore

import numpy as np
import torch

from benchmarks.device_world import Asked, World
from benchmarks.scorer_world import SEED, WINNERS
from prerank.bundle.judge import Ranked
from prerank.errors import DeviceFailed
from prerank.serve.device import DeviceEngine
from prerank.serve.device_buckets import Buckets
from prerank.serve.device_options import Options
from prerank.serve.device_streams import Device
from prerank.serve.device_version import DeviceVersion
from prerank.types import ItemChange

_SPIN_S = 0.001  # from which on a thread looks at the clock instead of sleeping
_AT_ONCE = 10  # items that change in a call


@dataclass(frozen=True, slots=True)
class Engines:
    """How an engine is begun: for requests of `sizes`, by `workers`, `most` in a batch, which wait `wait_ms` for it."""

    sizes: tuple[int, ...]
    workers: int = 2
    wait_ms: float = 0.2
    most: int = 4

    @contextmanager
    def begun(self, device: Device, world: World) -> Iterator[tuple[DeviceEngine, DeviceVersion]]:
        """The engine, and the world's scorer in bfloat16 as its version."""
        cores = sorted(os.sched_getaffinity(0))
        own = cores[-self.workers :] if len(cores) >= 4 * self.workers else None
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as a server has it: threads that look for work would take the workers' cores
        try:
            with DeviceEngine(device, self.workers, self.wait_ms, own) as engine:
                yield engine, self.load(engine, world)
        finally:
            torch.set_num_threads(threads)

    def load(self, engine: DeviceEngine, world: World) -> DeviceVersion:
        """Another version of the same."""
        buckets = Buckets(self.sizes, together=self.most * self.sizes[0], most_requests=self.most)
        like = world.asked(1).user_side
        return engine.load(world.scorer, like, Options(WINNERS, buckets, torch.bfloat16))


def asked_once(version: DeviceVersion, one: Asked) -> Ranked:
    """A request alone."""
    return version.submit(one.user_side, one.candidates, WINNERS).result()


def saturation(version: DeviceVersion, requests: Sequence[Asked], seconds: float, at_once: int) -> float:
    """Requests a second with so many under way all the time; it takes longer where none is answered that soon.

    Raises what a request ended with, if it was no answer.
    """
    slots, done, failed = Semaphore(at_once), list[float](), list[BaseException]()

    def ended(future: Future[Ranked]) -> None:
        error = future.exception()
        if error is None:
            done.append(time.perf_counter())
        else:
            failed.append(error)
        slots.release()

    start = time.perf_counter()
    for number in count():
        slots.acquire()
        if failed:
            raise failed[0]
        if done and done[-1] - start > seconds:
            break
        one = requests[number % len(requests)]
        version.submit(one.user_side, one.candidates, WINNERS).add_done_callback(ended)
    found = list(done)
    return len(found) / (max(found) - start)


@dataclass(slots=True)
class Came:
    """Milliseconds of the requests that were answered, and what the others ended with."""

    ms: list[float] = field(default_factory=list)
    failed: list[BaseException] = field(default_factory=list)


def as_they_come(
    version: Callable[[], DeviceVersion], requests: Sequence[Asked], rate: float, seconds: float, seed: int = SEED
) -> Came:
    """So many a second on average, a Poisson process, each to the version of its moment; at least one."""
    made, came = np.random.default_rng(seed), Came()
    due = np.cumsum(made.exponential(1 / rate, int(2 * rate * seconds) + 100))
    settled, num_sent = Semaphore(0), 0
    start = time.perf_counter()
    for number, at in enumerate(due[: max(1, int((due < seconds).sum()))].tolist()):
        _until(start + at)
        one = requests[number % len(requests)]
        try:
            future = _submitted(version, one)
        except Exception as error:
            came.failed.append(error)
            continue
        num_sent += 1
        future.add_done_callback(partial(_ended, came, start + at, settled))
    for _ in range(num_sent):
        settled.acquire()
    return came


@contextmanager
def changing(world: World, version: Callable[[], DeviceVersion], a_second: int = 1000) -> Iterator[list[int]]:
    """Meanwhile so many items a second change: what is live of them, and what the ranker reads. Yields how many did."""
    scorer, ended, counts = world.scorer, threading.Event(), [0]
    made, num = np.random.default_rng(SEED), world.scorer.items.num_rows
    scorer.tell(lambda rows, slots, taken: version().put(rows, slots, taken))

    def run() -> None:
        start = time.perf_counter()
        while not ended.wait(max(0.0, start + counts[0] / a_second - time.perf_counter())):
            rows = torch.from_numpy(made.choice(num, _AT_ONCE, replace=False))
            bids = made.integers(1_000, 1_000_000, _AT_ONCE).tolist()
            changes = [ItemChange(0, values={"bid_micros": float(bid)}) for bid in bids]
            scorer.live.change(rows.tolist(), changes)
            scorer.put_side(rows, {name: one[rows.flip(0)] for name, one in scorer.item_side.tensors().items()})
            counts[0] += _AT_ONCE

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield counts
    finally:
        ended.set()
        thread.join()
        scorer.tell(None)


def _submitted(version: Callable[[], DeviceVersion], one: Asked) -> Future[Ranked]:
    serving = version()
    try:
        return serving.submit(one.user_side, one.candidates, WINNERS)
    except DeviceFailed:
        if version() is serving:
            raise
        return version().submit(one.user_side, one.candidates, WINNERS)  # the other left in between


def _ended(came: Came, due: float, settled: Semaphore, future: Future[Ranked]) -> None:
    error = future.exception()
    if error is not None:
        came.failed.append(error)
    else:
        came.ms.append(1000 * (time.perf_counter() - due))
    settled.release()


def _until(moment: float) -> None:
    while (left := moment - time.perf_counter()) > 0:
        time.sleep(left - _SPIN_S if left > 2 * _SPIN_S else 0)
