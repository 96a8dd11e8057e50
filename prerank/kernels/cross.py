"""The low-rank cross layer as one operation: two thin products and their epilogue.

On GPUs it is one Triton kernel, which pays where the rank is small: the products then read far more than they compute,
and what lies between them need not be written. On CPUs it is torch: the native engine fuses these steps for itself
(`program.Linear` with `cross`), and is what ranks there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prerank.kernels import triton
from prerank.kernels.shapes import check_float, check_shapes


def cross_layer(x0: Tensor, x: Tensor, narrow: Tensor, widen: Tensor, bias: Tensor) -> Tensor:
    """x0 * (widen (narrow x) + bias) + x, [N, W] (Wang et al. 2021, DCN V2, eq. 2, narrow V^T and widen U).

    x0 and x [N, W], narrow [R, W], widen [W, R], bias [W]: all of one type of `shapes.FLOATS`, which is out's too, and
    of any strides. Sums are float32; narrow x is rounded to the type, as matrix units want it, and so is out.
    It is for serving: the compiled operation has no gradient. Raises ValueError for other shapes, types or devices.
    """
    if torch.compiler.is_compiling():
        found: Tensor = _operation(x0, x, narrow, widen, bias)
        return found
    # the first call of a custom operation imports the whole compiler, over a second: nobody but it needs that
    return _here(x0, x, narrow, widen, bias)


def _here(x0: Tensor, x: Tensor, narrow: Tensor, widen: Tensor, bias: Tensor) -> Tensor:
    serves = by_triton if triton.serves(x0.device) else reference
    return serves(x0, x, narrow, widen, bias)


@torch.library.custom_op("prerank::cross_layer", mutates_args=())
def _operation(x0: Tensor, x: Tensor, narrow: Tensor, widen: Tensor, bias: Tensor) -> Tensor:
    return _here(x0, x, narrow, widen, bias)


@_operation.register_fake
def _(x0: Tensor, x: Tensor, narrow: Tensor, widen: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def reference(x0: Tensor, x: Tensor, narrow: Tensor, widen: Tensor, bias: Tensor) -> Tensor:
    """`cross_layer` in plain torch, on any device."""
    _check(x0, x, narrow, widen, bias)
    thin = (x.float() @ narrow.float().t()).to(x.dtype)
    wide = thin.float() @ widen.float().t() + bias.float()
    return torch.addcmul(x.float(), x0.float(), wide).to(x.dtype)


def by_triton(x0: Tensor, x: Tensor, narrow: Tensor, widen: Tensor, bias: Tensor) -> Tensor:
    """`cross_layer` by the Triton kernel, or by `reference` above the rank that it is for.

    On a GPU, or in Triton's interpreter, whose bfloat16 is wrong.
    """
    _check(x0, x, narrow, widen, bias)
    from prerank.kernels.triton.cross import MOST_RANK, cross  # where there is no GPU there need be no triton

    if len(narrow) > MOST_RANK:
        return reference(x0, x, narrow, widen, bias)
    return cross(x0, x, narrow, widen, bias)


def _check(x0: Tensor, x: Tensor, narrow: Tensor, widen: Tensor, bias: Tensor) -> None:
    check_float("cross_layer", "x0", x0)
    check_shapes(
        "cross_layer",
        {
            "x0": (x0, x0.dtype, "NW"),
            "x": (x, x0.dtype, "NW"),
            "narrow": (narrow, x0.dtype, "RW"),
            "widen": (widen, x0.dtype, "WR"),
            "bias": (bias, x0.dtype, "W"),
        },
    )
