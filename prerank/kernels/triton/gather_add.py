"""Gathered rows plus the user's part plus crossing features times a matrix, a tile of rows and columns a program."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from prerank.kernels.triton import launching_on

_TILE = 64  # candidates and columns of a program, not tuned
_STEP_BYTES = 64  # of crossing features a step: with 128 of float32 the registers spill


def sum_rows(table: Tensor, rows: Tensor, user: Tensor, crossing: Tensor | None, weight: Tensor | None) -> Tensor:
    """`kernels.gather_add.gather_add` of arguments that were checked, all on one device."""
    (num_requests, num), width = rows.shape, table.shape[1]
    out = torch.empty((num_requests, num, width), dtype=table.dtype, device=table.device)
    if not out.numel():
        return out
    # without crossing features none of it is read
    crossing, weight = (table[:0], table[:0]) if crossing is None or weight is None else (crossing, weight)
    depth = crossing.shape[-1] if crossing.dim() == 3 else 0
    with launching_on(table):
        add[(triton.cdiv(num, _TILE), triton.cdiv(width, _TILE), num_requests)](
            table,
            rows.contiguous(),
            user.contiguous(),
            crossing.contiguous(),
            weight.contiguous(),
            out,
            *table.stride(),
            num,
            WIDTH=width,
            CROSSING=depth,
            TILE=_TILE,
            DEPTH=_STEP_BYTES // table.element_size(),
        )
    return out


@triton.jit
def add(
    table: tl.tensor,
    rows: tl.tensor,
    user: tl.tensor,
    crossing: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    row_step: tl.tensor,
    column_step: tl.tensor,
    num: tl.tensor,
    WIDTH: tl.constexpr,
    CROSSING: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    """out [B, N, WIDTH] of one request, TILE candidates and TILE columns; CROSSING is C, zero for none."""
    request = tl.program_id(2).to(tl.int64)
    places = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    is_row, is_column = places < num, columns < WIDTH
    inside = is_row[:, None] & is_column[None, :]
    found = tl.load(rows + request * num + places, mask=is_row, other=0)
    at = found[:, None] * row_step + columns[None, :].to(tl.int64) * column_step
    summed = tl.load(table + at, mask=inside, other=0.0).to(tl.float32)
    summed += tl.load(user + request * WIDTH + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    for start in range(0, CROSSING, DEPTH):
        steps = start + tl.arange(0, DEPTH)
        is_step = steps < CROSSING
        of_rows = crossing + (request * num + places[:, None]) * CROSSING + steps[None, :]
        of_columns = weight + columns[None, :] * CROSSING + steps[:, None]
        summed = tl.dot(
            tl.load(of_rows, mask=is_row[:, None] & is_step[None, :], other=0.0),
            tl.load(of_columns, mask=is_step[:, None] & is_column[None, :], other=0.0),
            summed,
            input_precision="ieee",  # float32 in full: what ties must tie on every device
        )
    tl.store(out + (request * num + places[:, None]) * WIDTH + columns[None, :], summed, mask=inside)
