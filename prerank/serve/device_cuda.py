"""A CUDA device as the engine asks for it: streams, events, graphs captured by hand, page-locked memory.

Graphs are captured here and not by torch.compile, whose trees of graphs assert where several threads use them; and not
by `torch.cuda.graph`, which first gives memory back to the driver, and for that every stream has to come to an end.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from prerank.errors import ConfigError
from prerank.serve.device_streams import Event, Graph, Pool, Stream

_CAPTURING = threading.Lock()
"""A process captures one graph at a time."""

_LOST = frozenset((46, 100, 101, 214, 220, 226, 700, 702, 710, 714, 715, 716, 717, 718, 719))
"""The errors of the CUDA runtime after which nothing works in this process: no device, memory that is broken or was
addressed wrongly, a kernel that ran too long or was none."""


def cuda_device(number: int = 0) -> CudaDevice:
    """The CUDA device of this number. Raises ConfigError where there is none, or nothing that its kernels need."""
    if not torch.cuda.is_available():
        why = "there is no CUDA device" if torch.version.cuda else "this torch is built without CUDA"
        raise ConfigError(f"device cuda: {why}; `prerank doctor` says what this machine has")
    if number >= torch.cuda.device_count():
        raise ConfigError(f"device cuda:{number}: there are {torch.cuda.device_count()} CUDA devices")
    from prerank.kernels import triton

    if not triton.is_here():
        raise ConfigError("device cuda: triton is not installed; install the version that this torch names")
    # sums of products of bfloat16 stay float32 until they are whole
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    return CudaDevice(torch.device("cuda", number))


@dataclass(frozen=True, slots=True)
class CudaDevice:
    """The CUDA device `where`, whose number is told."""

    where: torch.device

    @property
    def name(self) -> str:
        """Such as cuda:0."""
        return str(self.where)

    def stream(self) -> Stream:
        """A new one, of no priority."""
        return CudaStream(torch.cuda.Stream(self.where))  # type: ignore[no-untyped-call]

    def pool(self) -> Pool:
        """A new one, with a stream that its graphs are captured on."""
        with torch.cuda.device(self.where):
            stream = torch.cuda.Stream(self.where)  # type: ignore[no-untyped-call]
            return CudaPool(torch.cuda.graph_pool_handle(), CudaStream(stream))

    def locked(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Page-locked."""
        return torch.zeros(tuple(shape), dtype=dtype, pin_memory=True)

    def free_bytes(self) -> int:
        """What the driver has left, and what torch holds and does not use."""
        free, _ = torch.cuda.mem_get_info(self.where)
        return free + torch.cuda.memory_reserved(self.where) - torch.cuda.memory_allocated(self.where)

    def is_lost(self, error: BaseException) -> bool:
        """Whether it is one of those after which every call fails."""
        if not isinstance(error, torch.AcceleratorError):
            return False
        code = getattr(error, "error_code", None)
        return code is None or code in _LOST


@dataclass(frozen=True, slots=True)
class CudaStream:
    """A stream of a CUDA device."""

    own: torch.cuda.Stream

    def do(self, work: Callable[[], None]) -> None:
        """See `Stream`."""
        with torch.cuda.stream(self.own):
            work()

    def follow(self, event: Event) -> None:
        """See `Stream`."""
        self.own.wait_event(cast("CudaEvent", event).own)

    def mark(self) -> Event:
        """See `Stream`."""
        return CudaEvent(self.own.record_event())


@dataclass(frozen=True, slots=True)
class CudaEvent:
    """An event of a CUDA device; who waits for one keeps its core, which is its own, and is the sooner back for it."""

    own: torch.cuda.Event

    def wait(self) -> None:
        """See `Event`."""
        self.own.synchronize()


@dataclass(frozen=True, slots=True)
class CudaPool:
    """A pool of torch's allocator. Its graphs are captured on one stream, without which they would share nothing."""

    handle: torch.cuda._POOL_HANDLE
    stream: CudaStream

    def capture(self, work: Callable[[], None]) -> Graph:
        """See `Pool`. What other threads do meanwhile does not matter: the capture is this thread's own."""
        graph = torch.cuda.CUDAGraph()
        with _CAPTURING, torch.cuda.stream(self.stream.own):
            self.stream.own.synchronize()
            graph.capture_begin(pool=self.handle, capture_error_mode="thread_local")
            try:
                work()
            except BaseException:
                with suppress(RuntimeError):  # the one that tells is the first
                    graph.capture_end()
                raise
            graph.capture_end()
        return cast("Graph", graph)

    @property
    def num_bytes(self) -> int:
        """Of the segments that torch's allocator holds for the pool."""
        segments = torch.cuda.memory.memory_snapshot(self.handle, include_traces=False)  # type: ignore[no-untyped-call]
        return sum(int(one["total_size"]) for one in segments)
