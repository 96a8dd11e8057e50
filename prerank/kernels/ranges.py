"""Named ranges around stages and kernels, for who profiles: torch's profiler, or NVIDIA's tools through NVTX.

Where nobody does, one costs the look at a flag. Who profiles may also count what kernels had to do (`counting`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar, Token
from functools import cache
from types import TracebackType
from typing import TypeAlias

import torch
from torch.autograd import profiler

from prerank.kernels.work import Work

NVTX = "PRERANK_NVTX"
"""The environment variable that turns NVTX ranges on (1) or off (0); unset, they are on where a tool of NVIDIA's is."""

_TOOLS = ("NVTX_INJECTION64_PATH", "NSYS_PROFILING_SESSION_ID")  # set in the processes that they start
_NOTHING = nullcontext()
_stage: ContextVar[str] = ContextVar("prerank_stage", default="")

Done: TypeAlias = dict[tuple[str, str], tuple[int, Work]]
"""How often a kernel was called and its work in all, by the stage it ran in ("" for none) and its name."""


class Tally:
    """What ran while it counted: the names of `stages`, and what kernels had `done`. Threads may share one."""

    def __init__(self) -> None:
        self.stages: set[str] = set()
        self.done: Done = {}
        self._lock = threading.Lock()

    def add(self, stage: str, kernel: str, work: Work) -> None:
        """One call more."""
        with self._lock:
            calls, before = self.done.get((stage, kernel), (0, Work()))
            self.done[stage, kernel] = calls + 1, before + work


_tally: Tally | None = None


@contextmanager
def counting() -> Iterator[Tally]:
    """Count what runs meanwhile in this process, on any thread, while torch's profiler is on."""
    global _tally
    assert _tally is None, "one counts at a time"
    _tally = tally = Tally()
    try:
        yield tally
    finally:
        _tally = None


def stage(name: str) -> AbstractContextManager[object]:
    """Around what this thread does for a stage of a request."""
    return _StageRange(name) if profiler._is_profiler_enabled or _has_nvtx() else _NOTHING


def kernel(name: str, work: Callable[[], Work]) -> AbstractContextManager[object]:
    """Around one call of native code; `work` is asked afterwards, and only where somebody counts."""
    return _KernelRange(name, work) if profiler._is_profiler_enabled or _has_nvtx() else _NOTHING


class _Range:
    def __init__(self, name: str) -> None:
        self._name = name
        self._recorded: profiler.record_function | None = None

    def __enter__(self) -> None:
        if profiler._is_profiler_enabled:
            self._recorded = profiler.record_function(self._name)
            self._recorded.__enter__()  # type: ignore[no-untyped-call]
        if _has_nvtx():
            torch.cuda.nvtx.range_push(self._name)  # type: ignore[no-untyped-call]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if _has_nvtx():
            torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]
        if self._recorded is not None:
            self._recorded.__exit__(kind, error, trace)


class _StageRange(_Range):
    def __enter__(self) -> None:
        self._before: Token[str] = _stage.set(self._name)
        if _tally is not None:
            _tally.stages.add(self._name)
        super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        _stage.reset(self._before)


class _KernelRange(_Range):
    def __init__(self, name: str, work: Callable[[], Work]) -> None:
        super().__init__(name)
        self._work = work

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        if error is None and _tally is not None:
            _tally.add(_stage.get(), self._name, self._work())


@cache
def _has_nvtx() -> bool:
    said = os.environ.get(NVTX)
    is_wanted = any(os.environ.get(name) for name in _TOOLS) if said is None else said != "0"
    return is_wanted and torch.cuda.is_available()
