"""A Chrome trace of torch's profiler, read: each event's own time, and the stage of a request that it belongs to."""

from __future__ import annotations

import gzip
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from prerank.kernels.work import Work

_OURS, _TORCH = "user_annotation", "cpu_op"
_ON_HOST = (_OURS, _TORCH, "cuda_runtime", "cuda_driver")
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_BYTES = {"float": 4, "c10::BFloat16": 2, "c10::Half": 2}
_FACTORS = {
    **dict.fromkeys(("aten::mm", "aten::bmm", "aten::mv"), (0, 1)),
    **dict.fromkeys(("aten::addmm", "aten::baddbmm", "aten::addmv", "aten::addmv_"), (1, 2)),
}
"""By the name of a product, which of its arguments are multiplied."""


@dataclass(slots=True)
class Event:
    """Something that ran, from `start` for `us` microseconds, `self_us` of them not in another event of its thread.

    `stage` is the name of the stage it ran in or was launched from, "" outside of all, and `kernel` what it is, or was
    launched from, if its work is known: a kernel's range, or a product of matrices, whose `work` it has itself.
    """

    name: str
    start: float
    us: float
    self_us: float
    is_range: bool
    is_on_device: bool
    work: Work
    stage: str = ""
    kernel: str = ""


def read_trace(path: Path, stages: Collection[str], kernels: Collection[str]) -> list[Event]:
    """The events of a trace in which ranges of these names are those of stages and of kernels."""
    text = path.read_bytes()
    events: list[Mapping[str, Any]] = json.loads(gzip.decompress(text) if path.suffix == ".gz" else text)["traceEvents"]
    found = [one for one in events if one.get("ph") == "X" and one.get("cat") in (*_ON_HOST, *_ON_DEVICE)]
    launched: dict[int | None, Event] = {}
    made = list(_on_host((one for one in found if one["cat"] in _ON_HOST), stages, kernels, launched))
    for one in found:
        if one["cat"] in _ON_DEVICE:
            us = float(one["dur"])
            event = Event(one["name"], float(one["ts"]), us, us, False, True, Work())
            by = launched.get(one.get("args", {}).get("correlation"))
            if by is not None:
                event.stage, event.kernel = by.stage, by.kernel
            made.append(event)
    return made


def _on_host(
    events: Iterable[Mapping[str, Any]],
    stages: Collection[str],
    kernels: Collection[str],
    launched: dict[int | None, Event],
) -> Iterator[Event]:
    """Those of threads, nested; `launched` becomes who started what of a device, by correlation."""
    threads: dict[tuple[Any, Any], list[Mapping[str, Any]]] = {}
    for one in events:
        threads.setdefault((one.get("pid"), one.get("tid")), []).append(one)
    for of_thread in threads.values():
        around: list[Event] = []
        for one in sorted(of_thread, key=lambda one: (one["ts"], -one["dur"])):
            start, us = float(one["ts"]), float(one["dur"])
            while around and start >= around[-1].start + around[-1].us:
                around.pop()
            is_range = one["cat"] == _OURS
            event = Event(one["name"], start, us, us, is_range, False, _product(one))
            if around:
                around[-1].self_us -= us
                event.stage, event.kernel = around[-1].stage, around[-1].kernel
                if event.work != Work():  # around it is the same product under another name, if it is one
                    around[-1].work = Work()
            if is_range and event.name in stages:
                event.stage, event.kernel = event.name, ""
            elif (is_range and event.name in kernels) or event.work != Work():
                event.kernel = event.name
            around.append(event)
            if not is_range and one["cat"] != _TORCH:
                launched[one.get("args", {}).get("correlation")] = event
            yield event


def _product(event: Mapping[str, Any]) -> Work:
    """Of matrices [..., n, k] by [..., k, m], or by a vector [k]: both are read and the result is written."""
    places = _FACTORS.get(event["name"])
    if places is None:
        return Work()
    args = event.get("args", {})
    shapes, types = args.get("Input Dims", []), args.get("Input type", [])
    if len(shapes) <= places[1] or types[places[0]] not in _BYTES:
        return Work()
    left, right = shapes[places[0]], shapes[places[1]]
    size = _BYTES[types[places[0]]]
    width = 1 if len(right) == 1 else right[-1]
    num_bytes = size * (prod(left) + prod(right) + prod(left[:-1]) * width)
    flops = 2 * prod(left) * width
    return Work(0, num_bytes, flops) if size == 4 else Work(flops, num_bytes)
