"""The least a request could take on a device, from what that device copies, multiplies and launches at best, now."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial

import torch

from prerank.kernels.ceilings import best_s, ceilings
from prerank.serve.device_streams import Device

_LINK_BYTES = 1 << 26
_LAUNCHES = 200


@dataclass(frozen=True, slots=True)
class Roofline:
    """GB/s that the device copies, GFLOP/s of bfloat16 products, GB/s up its link, ms of a graph of next to nothing."""

    copy_gb_s: float
    bf16_gflop_s: float
    link_gb_s: float
    launch_ms: float

    @classmethod
    def measured(cls, device: Device, least_s: float = 0.3) -> Roofline:
        """Each for `least_s` seconds."""
        kind = device.where.type
        found = ceilings(kind, least_s)
        above, there = device.locked((_LINK_BYTES,), torch.uint8), torch.empty(_LINK_BYTES, dtype=torch.uint8)
        there = there.to(device.where)
        link_s = best_s(partial(there.copy_, above, non_blocking=True), least_s, kind)
        return cls(
            copy_gb_s=found["copy_gb_s"],
            bf16_gflop_s=found["bf16_matmul_gflop_s"],
            link_gb_s=round(_LINK_BYTES / link_s / 1e9, 1),
            launch_ms=round(_launch_ms(device), 6),
        )

    def least_ms(self, num_bytes: float, flops: float) -> float:
        """Bytes read and written while products are formed, and a launch: what no overlap goes below."""
        return max(num_bytes / self.copy_gb_s, flops / self.bf16_gflop_s) / 1e6 + self.launch_ms

    def in_turn_ms(self, num_bytes: float, flops: float, link_bytes: float) -> float:
        """The same where nothing overlaps, and with what goes over the link."""
        return (num_bytes / self.copy_gb_s + flops / self.bf16_gflop_s + link_bytes / self.link_gb_s) / 1e6 + (
            self.launch_ms
        )

    def named(self, when: str) -> dict[str, float]:
        """By the names of a result's ceilings."""
        return {
            f"device_copy_gb_s_{when}": self.copy_gb_s,
            f"device_bf16_gflop_s_{when}": self.bf16_gflop_s,
            f"device_link_gb_s_{when}": self.link_gb_s,
            f"device_launch_ms_{when}": self.launch_ms,
        }


def _launch_ms(device: Device) -> float:
    """The median of a graph of one addition to one number, from its replay until the host knows that it is done."""
    number, pool, stream = torch.zeros(1, device=device.where), device.pool(), device.stream()

    def work() -> None:
        number.add_(1)

    pool.stream.do(work)
    pool.stream.mark().wait()
    graph, times = pool.capture(work), list[float]()
    for _ in range(_LAUNCHES):
        start = time.perf_counter()
        stream.do(graph.replay)
        stream.mark().wait()
        times.append(1000 * (time.perf_counter() - start))
    return sorted(times)[len(times) // 2]
