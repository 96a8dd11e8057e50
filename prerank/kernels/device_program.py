"""Programs on a GPU: every step over a tile of candidates in one kernel, and the same in torch where that cannot run.

`program.run` is the same arithmetic and the reference; the kernel multiplies in the type it is told to and adds in
float32. How it holds registers, `kernels.device_layout` says.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from prerank.kernels import triton
from prerank.kernels.device_layout import read_in_full
from prerank.kernels.program import Program, of_request, run
from prerank.kernels.shapes import check_float
from prerank.types import Features

Runs: TypeAlias = Callable[[Features, Tensor], Tensor]
"""A batch's user side [B, ...] and rows int64 [B, N] -> logits float32 [B, N, T]."""


class DeviceProgram:
    """A program with the item side's tables it reads, [I, ...] each, ready to run on their device.

    Gathered tables are of a type of `shapes.FLOATS`, [I, W], matched ones whole numbers [I] or [I, M]. Products are
    made in `dtype`, and in float32 where torch runs. Tables are used where they are, but for float32 ones that no step
    needs in full: of those the kernel has a copy of `dtype`. Raises ValueError for tables of other types, that are not
    contiguous, or on several devices.
    """

    def __init__(self, program: Program, item_side: Features, dtype: torch.dtype = torch.bfloat16) -> None:
        tables = {name: item_side[name] for name in program.tables()}
        device = _checked(tables)
        self._copies: list[tuple[Tensor, Tensor]] = []
        if triton.serves(device):
            full = read_in_full(program)
            kept = {name: table if name in full else self._copy(table, dtype) for name, table in tables.items()}
            self._run = by_triton(program, kept, dtype)
        else:
            self._run = partial(reference, program, tables)

    def __call__(self, user: Features, rows: Tensor) -> Tensor:
        """Rows int64 [N] and one request's user side, or [B, N] and a batch's [B, ...].

        -> logits float32 [N, T] or [B, N, T]. All on the tables' device. A row that they do not have gets NaN: to raise
        for it, the host would have to wait for the device.
        """
        if rows.dim() == 1:
            return self._run({name: tensor.unsqueeze(0) for name, tensor in user.items()}, rows.unsqueeze(0))[0]
        return self._run(user, rows)

    def update(self, rows: Tensor) -> None:
        """Read rows int64 [n] of the item side again, which changed; a request of such a row must not be running."""
        with torch.inference_mode():
            for source, copy in self._copies:
                copy[rows] = source[rows].to(copy.dtype)

    def _copy(self, table: Tensor, dtype: torch.dtype) -> Tensor:
        if table.dtype != torch.float32 or dtype == torch.float32:
            return table
        self._copies.append((table, table.to(dtype)))
        return self._copies[-1][1]


def by_triton(program: Program, tables: Features, dtype: torch.dtype) -> Runs:
    """The program in one kernel, of tables as they are.

    On a GPU, or in Triton's interpreter, whose bfloat16 is wrong.
    """
    from prerank.kernels.triton.program import FusedProgram  # where there is no GPU there need be no triton

    return FusedProgram(program, tables, dtype)


def reference(program: Program, tables: Features, user: Features, rows: Tensor) -> Tensor:
    """The same in plain torch and float32, on any device, a request after another."""
    if not rows.numel():
        return torch.zeros(*rows.shape, program.logits.width, device=rows.device)
    inside = (rows >= 0) & (rows < len(next(iter(tables.values()))))
    found = []
    for number, own in enumerate(torch.where(inside, rows, 0)):
        items = {
            name: table[own].float() if table.is_floating_point() else table[own] for name, table in tables.items()
        }
        found.append(run(program, of_request(user, number), items))
    return torch.stack(found).masked_fill(~inside.unsqueeze(-1), torch.nan)


def _checked(tables: Features) -> torch.device:
    for name, table in tables.items():
        if table.is_floating_point():
            check_float("program", f"table {name!r}", table)
        if not table.is_contiguous():
            raise ValueError(f"program: expected table {name!r} to be contiguous, got strides {table.stride()}")
    devices = {table.device for table in tables.values()}
    if len(devices) != 1:
        raise ValueError(f"program: expected every table on one device, got them on {sorted(map(str, devices))}")
    return devices.pop()
