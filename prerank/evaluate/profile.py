"""Where a request's time goes: each stage and each kernel, how often, how long, and beside its floor.

The floor is what a kernel had to do at the least, its bytes and its products, over what this machine does at its best.
Work that nobody counts, Python's and that of torch's smaller operations, has none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from prerank.evaluate.trace import Event, read_trace
from prerank.kernels.ceilings import ceilings
from prerank.kernels.ranges import Done
from prerank.kernels.work import Work, floor_ms
from prerank.serve.profiling import REQUEST, Asking, Profiled, profile
from prerank.types import Report, silent

Ceilings = Mapping[str, Mapping[str, float]]
"""`kernels.ceilings` by device, "cpu" and "cuda"; none where they were not measured."""

OUTSIDE = "between stages"
_QUANTILES = {"p50": 50, "p90": 90, "p99": 99}


@dataclass(frozen=True, slots=True)
class Line:
    """One stage, where `kernel` is "", or what ran in it; milliseconds, FLOPs and bytes are of a request, on average.

    `kind` is "stage", "native" (code of ours), "torch" (an operation, or the call that starts one on a device) or
    "device" (what ran there). `self_ms` is without what is nested, and what `share` of a request's time it is; `ms` of
    what started something on a device is the device's time. `served_ms`, of a stage, is the median without the
    profiler. The floor is None where nothing of the work is known, or no ceilings are.
    """

    stage: str
    kernel: str
    kind: str
    calls: float
    ms: float
    self_ms: float
    share: float
    served_ms: float | None
    flops: float
    num_bytes: float
    floor_ms: float | None
    over_floor: float | None


@dataclass(frozen=True, slots=True)
class Profile:
    """What came of `num_requests`, of which `num_different` are not the same; `lines` stage by stage, longest first.

    `served_ms` and `profiled_ms` are quantiles of a request's milliseconds, without and with the profiler.
    """

    num_requests: int
    num_different: int
    num_degraded: int
    served_ms: Mapping[str, float]
    profiled_ms: Mapping[str, float]
    ceilings: Ceilings
    lines: tuple[Line, ...]


def profile_requests(
    asking: Asking, num: int, trace: Path, report: Report = silent, is_measured: bool = True
) -> Profile:
    """Ask `num` requests under the profiler, write the Chrome `trace`, and read it.

    With `is_measured` the ceilings are measured too, which takes some seconds; without there are no floors.
    """
    found = profile(asking, num, trace, report)
    devices = (["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]) if is_measured else []
    measured = {}
    for number, device in enumerate(devices):
        measured[device] = ceilings(device)
        report("ceilings of this machine", number + 1, len(devices), "devices")
    tally = found.tally
    events = read_trace(trace, tally.stages, {kernel for _, kernel in tally.done})
    return Profile(
        num_requests=num,
        num_different=min(num, asking.num),
        num_degraded=found.num_degraded,
        served_ms=_quantiles(found.served_ms),
        profiled_ms=_quantiles(found.profiled_ms),
        ceilings=measured,
        lines=tuple(lines(events, found, measured)),
    )


def lines(events: Sequence[Event], found: Profiled, measured: Ceilings) -> list[Line]:
    """Of a trace's events and of what else was found of its requests."""
    num, request_ms = len(found.profiled_ms), sum(found.profiled_ms)
    kernels = _kernels(events, found.tally.done)
    named = sorted(found.tally.stages - {REQUEST})
    floors = {name: [one.floor_ms(measured) for one in kernels if one.stage == name] for name in named}
    told = []
    for name in named:
        own = [one for one in events if one.is_range and one.name == one.stage == name]
        us, work = sum(one.us for one in own), sum((one.work for one in kernels if one.stage == name), Work())
        known = [floor for floor in floors[name] if floor is not None]
        served = found.stages_ms.get(name)
        told.append(
            _line(
                _Sum(name, "", "stage", len(own), us, sum(one.self_us for one in own), work),
                num,
                request_ms,
                sum(known) if known else None,
                None if served is None else float(np.median(served)),
            )
        )
    outside = _outside_us(events)
    told.append(_line(_Sum(OUTSIDE, "", "stage", num, outside, outside, Work()), num, request_ms, None, None))
    told.sort(key=lambda one: -one.ms)
    inside = [_line(one, num, request_ms, one.floor_ms(measured), None) for one in kernels]
    inside.sort(key=lambda one: (-one.self_ms, one.kernel))
    places = {one.stage: [one] for one in told}
    for one in inside:
        places[one.stage if one.stage in places else OUTSIDE].append(one)
    return [one for place in places.values() for one in place]


@dataclass(slots=True)
class _Sum:
    """All calls of one thing in one stage; microseconds, and those of a device that it started."""

    stage: str
    kernel: str
    kind: str
    calls: int = 0
    us: float = 0.0
    self_us: float = 0.0
    work: Work = Work()  # noqa: RUF009 - frozen
    device_us: float = 0.0

    def floor_ms(self, measured: Ceilings) -> float | None:
        """Of all calls."""
        of = measured.get("cuda" if self.device_us else "cpu")
        return floor_ms(self.work, of) if of is not None and self.work != Work() else None


def _kernels(events: Iterable[Event], done: Done) -> list[_Sum]:
    sums: dict[tuple[str, str, str], _Sum] = {}
    native = {kernel for _, kernel in done}

    def of(stage: str, kernel: str, kind: str) -> _Sum:
        stage = "" if stage == REQUEST else stage
        return sums.setdefault((stage, kernel, kind), _Sum(stage, kernel, kind))

    for one in events:
        is_native = one.is_range and one.name == one.kernel
        if one.is_range and not is_native:
            continue
        kind = "native" if is_native else "device" if one.is_on_device else "torch"
        found = of(one.stage, one.name, kind)
        found.calls, found.us, found.self_us = found.calls + 1, found.us + one.us, found.self_us + one.self_us
        found.work += one.work
        if one.is_on_device and one.kernel:
            of(one.stage, one.kernel, "native" if one.kernel in native else "torch").device_us += one.us
    for (stage, kernel), (_, work) in done.items():
        of(stage, kernel, "native").work += work
    return list(sums.values())


def _line(one: _Sum, num: int, request_ms: float, floor: float | None, served: float | None) -> Line:
    ms = (one.device_us or one.us) / 1000.0
    return Line(
        stage=one.stage or OUTSIDE,
        kernel=one.kernel,
        kind=one.kind,
        calls=one.calls / num,
        ms=ms / num,
        self_ms=one.self_us / 1000.0 / num,
        share=(one.us if one.kind == "stage" else one.self_us) / 1000.0 / request_ms,
        served_ms=served,
        flops=(one.work.flops + one.work.float32_flops) / num,
        num_bytes=one.work.num_bytes / num,
        floor_ms=None if floor is None else floor / num,
        over_floor=None if not floor else ms / floor,
    )


def _outside_us(events: Iterable[Event]) -> float:
    """The time of requests in which no stage ran, on any thread."""
    edges: list[tuple[float, int, int]] = []  # when, how many requests more or fewer run from then on, and stages
    for one in events:
        if one.is_range and one.name == one.stage:
            is_request = one.name == REQUEST
            edges.append((one.start, int(is_request), int(not is_request)))
            edges.append((one.start + one.us, -int(is_request), -int(not is_request)))
    us, before, requests, stages = 0.0, 0.0, 0, 0
    for when, more_requests, more_stages in sorted(edges):
        if requests and not stages:
            us += when - before
        before, requests, stages = when, requests + more_requests, stages + more_stages
    return us


def _quantiles(ms: Sequence[float]) -> dict[str, float]:
    return {name: float(np.percentile(ms, share)) for name, share in _QUANTILES.items()}
