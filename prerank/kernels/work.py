"""What a call must do at the least, and how long that takes a device at its best: what speed is judged beside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from prerank.kernels.program import Linear, Program

_ROW, _LOGIT, _WEIGHT = 8, 4, 2  # bytes: a row's number comes, a logit leaves, a weight is kept as bfloat16


@dataclass(frozen=True, slots=True)
class Work:
    """FLOPs of products, `flops` of bfloat16 ones and `float32_flops`, and bytes read and written, each once."""

    flops: int = 0
    num_bytes: int = 0
    float32_flops: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flops + other.flops, self.num_bytes + other.num_bytes, self.float32_flops + other.float32_flops
        )


def floor_ms(work: Work, ceilings: Mapping[str, float]) -> float:
    """The least milliseconds it takes a device of these `kernels.ceilings`: its bytes or its products, the longer.

    What stands in the processor's caches is read faster than a copy of memory, so work that is small enough may beat
    its bytes.
    """
    float32 = ceilings["fp32_matmul_gflop_s"]
    # what is rounded to bfloat16 can be multiplied as float32 too, which processors without the former do faster
    bfloat16 = max(ceilings["bf16_matmul_gflop_s"], float32)
    products_ms = (work.flops / bfloat16 + work.float32_flops / float32) / 1e6
    return max(work.num_bytes / ceilings["copy_gb_s"] / 1e6, products_ms)


def program_work(program: Program, row_bytes: int, num: int) -> Work:
    """That of `num` candidates, whose row of the item side's tables takes `row_bytes` in all.

    The weights are read once and products are bfloat16's. A request's own vectors are little and left out, and so is
    what stays in a block of candidates: norms, activations, mixes.
    """
    weights = [step.weight for step in program.steps if isinstance(step, Linear)]
    weight_bytes = sum(_WEIGHT * weight.numel() for weight in weights if isinstance(weight, Tensor))
    return Work(program.flops * num, (row_bytes + _ROW + _LOGIT * program.logits.width) * num + weight_bytes)
