"""What the device engine asks of a device: streams, events, captured graphs, page-locked memory. And a CPU as one.

The engine has one code path. On a CPU each call is done when it returns, a graph is the work it was captured from, and
an event has always happened; on a GPU (`serve.device_cuda`) the same calls are put into queues.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Event(Protocol):
    """A moment in a stream."""

    def wait(self) -> None:
        """Return when the stream has come so far; raises what the device failed with before that."""
        ...


class Graph(Protocol):
    """Work that was captured: which kernels, of which addresses."""

    def replay(self) -> None:
        """Put it all into the stream that is current; see `Stream.do`."""
        ...


class Stream(Protocol):
    """A queue of work that is done in order; those of different streams overlap."""

    def do(self, work: Callable[[], None]) -> None:
        """Call `work`, whose kernels and copies that do not wait come into this stream."""
        ...

    def follow(self, event: Event) -> None:
        """Let what comes into this stream from now on begin after `event`; the caller does not wait."""
        ...

    def mark(self) -> Event:
        """The moment when all that is in the stream now is done."""
        ...


class Pool(Protocol):
    """Memory that graphs share: those of one pool are never replayed at the same time."""

    def capture(self, work: Callable[[], None]) -> Graph:
        """`work` as a graph. It was done before, so that nothing is compiled or grown meanwhile.

        What it makes lasts until the next replay of the pool, so it must leave its results in memory of others. Raises
        what `work` raises, and RuntimeError where it does what cannot be captured.
        """
        ...

    @property
    def stream(self) -> Stream:
        """Where `work` is to be done before it is captured."""
        ...

    @property
    def num_bytes(self) -> int:
        """How much memory its graphs hold."""
        ...


class Device(Protocol):
    """Where a replica of a scorer is and computes. Threads may share one."""

    @property
    def name(self) -> str:
        """What logs and metrics call it."""
        ...

    @property
    def where(self) -> torch.device:
        """Where its tensors are."""
        ...

    def stream(self) -> Stream:
        """A new one."""
        ...

    def pool(self) -> Pool:
        """A new one, empty."""
        ...

    def locked(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory of the host, page-locked: copies between it and the device need not be waited for."""
        ...

    def free_bytes(self) -> int:
        """How much memory could be taken now."""
        ...

    def is_lost(self, error: BaseException) -> bool:
        """Whether `error` says that the device is gone, with all that was in its memory."""
        ...


@dataclass(frozen=True, slots=True)
class _Happened:
    def wait(self) -> None:
        pass


@dataclass(frozen=True, slots=True)
class _Again:
    """A graph of a CPU: its work, once more."""

    work: Callable[[], None]

    def replay(self) -> None:
        self.work()


class _Direct:
    """A stream of a CPU."""

    def do(self, work: Callable[[], None]) -> None:
        work()

    def follow(self, event: Event) -> None:
        event.wait()

    def mark(self) -> Event:
        return _Happened()


class _NoPool:
    """A pool of a CPU: its graphs hold nothing."""

    def __init__(self) -> None:
        self.stream: Stream = _Direct()
        self.num_bytes = 0

    def capture(self, work: Callable[[], None]) -> Graph:
        return _Again(work)


class CpuDevice:
    """This machine's processor and memory."""

    where = torch.device("cpu")

    def __init__(self, name: str = "cpu") -> None:
        self.name = name

    def stream(self) -> Stream:
        """One that does at once what comes."""
        return _Direct()

    def pool(self) -> Pool:
        """One that holds nothing."""
        return _NoPool()

    def locked(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Any memory does."""
        return torch.zeros(tuple(shape), dtype=dtype)

    def free_bytes(self) -> int:
        """What the system says is free."""
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def is_lost(self, error: BaseException) -> bool:
        """A process does not outlive its processor."""
        return False
