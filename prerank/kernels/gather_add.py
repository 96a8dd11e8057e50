"""What a candidate's first layer is: its gathered row, plus the user's part, plus a product of what crosses the two.

A first layer of user, item and crossing features is split, W [u; i; c] = W_u u + W_i i + W_c c: W_i i is a row of the
item side, W_u u is one row a request, and only W_c c is a product a candidate. On GPUs the three are one Triton kernel.
On CPUs it is torch: the native engine fuses these steps for itself (`program.Gather`, `program.Linear` with `add`), and
is what ranks there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prerank.kernels import triton
from prerank.kernels.shapes import check_float, check_shapes


def gather_add(
    table: Tensor, rows: Tensor, user: Tensor, crossing: Tensor | None = None, weight: Tensor | None = None
) -> Tensor:
    """out[b, n] = table[rows[b, n]] + user[b] + weight crossing[b, n], [B, N, W].

    table [I, W], user [B, W], and crossing [B, N, C] with weight [W, C] or neither: all of one type of `shapes.FLOATS`,
    which is out's too, and of any strides; rows int64 [B, N], each as often as asked. Sums are float32, rounded once.
    It is for serving: the compiled operation has no gradient.
    Raises IndexError for a row that the table does not have, ValueError for other shapes, types or devices.
    """
    if torch.compiler.is_compiling():
        found: Tensor = _operation(table, rows, user, crossing, weight)
        return found
    # the first call of a custom operation imports the whole compiler, over a second: nobody but it needs that
    return _here(table, rows, user, crossing, weight)


def _here(table: Tensor, rows: Tensor, user: Tensor, crossing: Tensor | None, weight: Tensor | None) -> Tensor:
    serves = by_triton if triton.serves(table.device) else reference
    return serves(table, rows, user, crossing, weight)


@torch.library.custom_op("prerank::gather_add", mutates_args=())
def _operation(table: Tensor, rows: Tensor, user: Tensor, crossing: Tensor | None, weight: Tensor | None) -> Tensor:
    return _here(table, rows, user, crossing, weight)


@_operation.register_fake
def _(table: Tensor, rows: Tensor, user: Tensor, crossing: Tensor | None, weight: Tensor | None) -> Tensor:
    return table.new_empty((*rows.shape, table.shape[1]))


def reference(table: Tensor, rows: Tensor, user: Tensor, crossing: Tensor | None, weight: Tensor | None) -> Tensor:
    """`gather_add` in plain torch, on any device."""
    _check(table, rows, user, crossing, weight)
    summed = table[rows].float() + user.float().unsqueeze(1)
    if crossing is not None and weight is not None:
        summed = summed + crossing.float() @ weight.float().t()
    return summed.to(table.dtype)


def by_triton(table: Tensor, rows: Tensor, user: Tensor, crossing: Tensor | None, weight: Tensor | None) -> Tensor:
    """`gather_add` by the Triton kernel: on a GPU, or in Triton's interpreter, whose bfloat16 is wrong."""
    _check(table, rows, user, crossing, weight)
    from prerank.kernels.triton.gather_add import sum_rows  # where there is no GPU there need be no triton

    return sum_rows(table, rows, user, crossing, weight)


def _check(table: Tensor, rows: Tensor, user: Tensor, crossing: Tensor | None, weight: Tensor | None) -> None:
    check_float("gather_add", "table", table)
    expected = {
        "table": (table, table.dtype, "IW"),
        "rows": (rows, torch.int64, "BN"),
        "user": (user, table.dtype, "BW"),
    }
    if (crossing is None) != (weight is None):
        raise ValueError("gather_add: expected crossing and weight together or neither")
    if crossing is not None and weight is not None:
        expected |= {"crossing": (crossing, table.dtype, "BNC"), "weight": (weight, table.dtype, "WC")}
    check_shapes("gather_add", expected)
    if rows.numel():
        low, high = torch.stack(rows.aminmax()).tolist()
        if low < 0 or high >= len(table):
            raise IndexError(f"rows: expected 0 to {len(table) - 1}, got {low} to {high}")
