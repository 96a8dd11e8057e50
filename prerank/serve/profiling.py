"""Requests asked one after another: as they are served, and once more under torch's profiler.

The profiler makes everything slower, what is short most, so a stage's time is taken without it too.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from prerank.errors import ConfigError
from prerank.kernels.ranges import Tally, counting, stage
from prerank.serve.answer import Answer
from prerank.types import Report, silent

REQUEST = "request"
"""The range in the trace that is all of one request."""
_MOST_WARM = 10


class Asking(Protocol):
    """Requests that can be asked again and again, by one thread at a time; `serve.asking` has some."""

    @property
    def num(self) -> int:
        """How many different ones there are, one or more."""
        ...

    def ask(self, number: int) -> Answer:
        """The answer to one of them, by its number."""
        ...


@dataclass(frozen=True, slots=True)
class Profiled:
    """What came of `num` requests: milliseconds of each as served and under the profiler, and what ran in the latter.

    `stages_ms` are the times as served of each stage, by name, in the order in which they began. Of the requests of
    either run `num_degraded` had a stage replaced.
    """

    served_ms: tuple[float, ...]
    profiled_ms: tuple[float, ...]
    stages_ms: Mapping[str, tuple[float, ...]]
    tally: Tally
    num_degraded: int


def check_trace(trace: Path) -> None:
    """Raises ConfigError where a trace could not be written to; makes the file, if it is not there."""
    try:
        with trace.open("ab"):
            pass
    except OSError as error:
        raise ConfigError(f"--out {trace}: expected a file that can be written ({error.strerror or error})") from None


def profile(asking: Asking, num: int, trace: Path, report: Report = silent) -> Profiled:
    """Ask `num` requests, the same ones again where there are fewer, and write what the profiler saw as a Chrome trace.

    The processor's threads are in it, all of them, and CUDA devices' kernels where there is one. A `trace` whose name
    ends in .gz is compressed.
    """
    for number in range(min(asking.num, num, _MOST_WARM)):
        asking.ask(number)
    served, stages = [], dict[str, list[float]]()
    num_degraded = 0
    for number in range(num):
        answer, ms = _timed(asking, number % asking.num)
        served.append(ms)
        num_degraded += answer.degraded
        for one in answer.stages:
            stages.setdefault(one.name, []).append(one.ms)
        report("requests as served", number + 1, num, "requests")
    profiled = []
    # it tells about itself on stderr, at every level it has
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with counting() as tally, _profiler() as profiler:
        for number in range(num):
            answer, ms = _timed(asking, number % asking.num)
            profiled.append(ms)
            num_degraded += answer.degraded
            report("requests under the profiler", number + 1, num, "requests")
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    profiler.export_chrome_trace(str(trace))
    times = {name: tuple(of_stage) for name, of_stage in stages.items()}
    return Profiled(tuple(served), tuple(profiled), times, tally, num_degraded)


def _timed(asking: Asking, number: int) -> tuple[Answer, float]:
    with stage(REQUEST):
        start = time.perf_counter()
        answer = asking.ask(number)
        return answer, (time.perf_counter() - start) * 1000.0


def _profiler() -> torch_profile:
    devices = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    # stages run on threads that are there before it starts
    threads = _ExperimentalConfig(profile_all_threads=True)
    return torch_profile(activities=[ProfilerActivity.CPU, *devices], record_shapes=True, experimental_config=threads)
