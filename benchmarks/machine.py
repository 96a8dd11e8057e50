"""What this machine is, what it can do at best, and what a piece of work takes of it.

Torch is imported only where it is used: a child process whose memory is measured should hold no more than its work.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVarTuple

from benchmarks.result import Hardware
from prerank._machine import memory_gib, num_cores, processor, version_of

REPOSITORY = Path(__file__).parents[1]
_PACKAGES = (
    *("prerank", "torch", "triton", "numpy", "pyarrow", "onnxruntime", "pyroaring", "lightgbm"),
    *("faiss-cpu", "hnswlib", "usearch"),
)
Args = TypeVarTuple("Args")


def hardware() -> Hardware:
    """This machine."""
    return Hardware(processor(), num_cores(), round(memory_gib(), 1))


def versions() -> dict[str, str]:
    """Of Python and the packages that decide the numbers."""
    return {"python": platform.python_version(), **{package: version_of(package) for package in _PACKAGES}}


def commit() -> str:
    """The commit measured, with `+` where tracked or new files other than results differ from it.

    Where there is no repository, as on a machine that was lent, what PRERANK_COMMIT says.
    """
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("PRERANK_COMMIT", "unknown")
    return head + ("+" if changed else "")


def ceilings() -> dict[str, float]:
    """This machine's processor at its best, now; see `kernels.ceilings`."""
    from prerank.kernels.ceilings import ceilings as of_device

    return of_device("cpu")


def best_s(work: Callable[[], object], least_s: float = 0.5) -> float:
    """The shortest of the calls, in seconds, of as many as `least_s` holds, at least three after a first one."""
    from prerank.kernels.ceilings import best_s as of_calls

    return of_calls(work, least_s)


def times_ms(work: Callable[[], object], repeats: int, warm_up: int = 1) -> list[float]:
    """How long each call took, in milliseconds, after `warm_up` calls that do not count."""
    for _ in range(warm_up):
        work()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(1000 * (time.perf_counter() - started))
    return times


@dataclass(frozen=True, slots=True)
class Spent:
    """What a piece of work took in a process of its own, and what it `made`, a number of its own choice.

    `times_s` of each of its calls; `peak_bytes` the largest resident memory, `start_bytes` that before the first.
    """

    times_s: tuple[float, ...]
    peak_bytes: int
    start_bytes: int
    made: int

    @property
    def seconds(self) -> float:
        """Of the median call."""
        return sorted(self.times_s)[len(self.times_s) // 2]

    @property
    def peak_gib(self) -> float:
        """All of the process, Python and libraries too."""
        return self.peak_bytes / 2**30

    @property
    def above_imports_mib(self) -> float:
        """Without what the process held before the work."""
        return (self.peak_bytes - self.start_bytes) / 2**20


def in_own_process(work: Callable[[*Args], int], *args: *Args, repeats: int = 1) -> Spent:
    """`work`, a function of a module, called with `args` in a fresh process, so that its memory is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_spend, work, args, repeats).result()


def _spend(work: Callable[..., int], args: tuple[object, ...], repeats: int) -> Spent:
    start, times, made = resident_bytes(), [], 0
    for _ in range(repeats):
        started = time.perf_counter()
        made = work(*args)
        times.append(time.perf_counter() - started)
    return Spent(tuple(times), memory_of("VmHWM"), start, made)


def resident_bytes() -> int:
    """What this process holds now."""
    return memory_of("VmRSS")


def memory_of(field: str, pid: int | str = "self") -> int:
    """Bytes that a process, by default this one, holds (VmRSS; RssAnon: of its own) or held at most (VmHWM).

    Linux alone: getrusage would count what the parent held when it started this process.
    """
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=REPOSITORY, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def say(what: str) -> None:
    """Progress, for whoever waits; results go to the other stream."""
    print(what, file=sys.stderr, flush=True)
