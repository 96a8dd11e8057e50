"""What a device can do at best: bytes it copies and products it forms a second. Speed is judged beside these."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

_COPY_BYTES = 1 << 28
_SIZE = {"cpu": 2048, "cuda": 8192}


def ceilings(device: str = "cpu", least_s: float = 0.5) -> dict[str, float]:
    """The best of repeated runs, now: GB/s of a copy (bytes read plus written), GFLOP/s of square matrix products.

    `device` is "cpu" or "cuda"; each is measured for `least_s` seconds.
    """
    source = torch.ones(_COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    found = {"copy_gb_s": 2 * _COPY_BYTES / best_s(lambda: target.copy_(source), least_s, device) / 1e9}
    size = _SIZE[device]
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        seconds = best_s(partial(torch.matmul, left, right), least_s, device)
        found[f"{name}_matmul_gflop_s"] = 2 * size**3 / seconds / 1e9
    return {name: round(value, 1) for name, value in found.items()}


def best_s(work: Callable[[], object], least_s: float = 0.5, device: str = "cpu") -> float:
    """The shortest of the calls, in seconds, of as many as `least_s` holds, at least three after a first one."""
    times: list[float] = []
    while len(times) < 4 or sum(times) < least_s:
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])
