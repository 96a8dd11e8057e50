"""The device engine: a thread a worker, each with its own stream, graphs and page-locked memory, over one queue.

Requests of any of its versions wait in lines (`device_batches`), small ones for company. A worker takes a batch, copies
it to the device, replays the graph of its shape and copies the winners back, and waits once, at the end; what other
workers do meanwhile overlaps with it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from types import TracebackType
from weakref import WeakSet

import torch

from prerank.bundle.scorer import Scorer
from prerank.serve.device_batches import Job, Lines
from prerank.serve.device_counts import Counts, Snapshot
from prerank.serve.device_options import Options, Shared
from prerank.serve.device_streams import Device
from prerank.serve.device_times import Backlog
from prerank.serve.device_version import DeviceVersion
from prerank.types import Features


class DeviceEngine:
    """`workers` threads for `device`, pinned to `cores` in turn if there are any; small requests wait up to `wait_ms`.

    Threads may share one.
    """

    def __init__(
        self, device: Device, workers: int = 2, wait_ms: float = 0.2, cores: Sequence[int] | None = None
    ) -> None:
        self._counts, self._versions, self._lock = Counts(), WeakSet[DeviceVersion](), threading.Lock()
        self._lines = Lines(wait_ms / 1000, lambda job: _version(job).ended(job))
        self._shared = Shared(device, device.stream(), self._lines, self._counts, Backlog(), workers)
        self._threads = []
        for number in range(workers):
            core = cores[number % len(cores)] if cores else None
            self._threads.append(threading.Thread(target=self._work, args=(number, core), name=f"device-{number}"))
            self._threads[-1].start()

    @property
    def name(self) -> str:
        """Of the device."""
        return self._shared.device.name

    def load(self, scorer: Scorer, like: Features, options: Options) -> DeviceVersion:
        """A version on the device, beside those that are there and go on meanwhile; `like` is a user's side [1, ...].

        Raises DeviceFull where it does not fit beside them.
        """
        version = DeviceVersion(self._shared, scorer, like, options)
        with self._lock:
            self._versions.add(version)
        return version

    def snapshot(self) -> Snapshot:
        """What it did, and what there is now."""
        with self._lock:
            sizes = [one.sizes() for one in self._versions]  # of one that is closed nothing
        graphs, tables, buffers = (sum(column) for column in zip((0, 0, 0), *sizes, strict=True))
        now = {"graph_bytes": graphs, "table_bytes": tables, "buffer_bytes": buffers}
        return self._counts.snapshot(waiting=len(self._lines), **now)

    def snapshots(self) -> dict[str, Snapshot]:
        """The same by the name of the device."""
        return {self.name: self.snapshot()}

    def close(self) -> None:
        """Take nothing new, answer what waits, and end the threads."""
        self._lines.close()
        for thread in self._threads:
            thread.join()
        with self._lock:
            for version in self._versions:
                version.close()

    def __enter__(self) -> DeviceEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _work(self, number: int, core: int | None) -> None:
        if core is not None:
            os.sched_setaffinity(0, {core})  # of this thread alone
        with torch.inference_mode():
            while (jobs := self._lines.take()) is not None:
                _version(jobs[0]).answer(number, jobs)
                del jobs  # a version that was left is not kept by the last of its requests


def _version(job: Job) -> DeviceVersion:
    assert isinstance(job.line, tuple)
    version = job.line[0]
    assert isinstance(version, DeviceVersion)
    return version
