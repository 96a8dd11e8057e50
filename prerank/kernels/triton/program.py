"""A whole program in one kernel: a tile of candidates a program of the grid.

What a step computes stays in registers, or in the tile's scratch, which is meant to stay in the second cache:
launches are of as many tiles as run at once, and the next one writes the same scratch again.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from prerank.kernels.device_blocks import UserPacking
from prerank.kernels.device_layout import cut
from prerank.kernels.program import Program
from prerank.kernels.triton import launching_on
from prerank.kernels.triton.source import generate
from prerank.types import Features

_TILE = 64  # candidates of a program
_MOST = 128  # columns of a piece
_WARPS = 8
_BUDGET = 400  # bytes of values a candidate: with more the compiler spills registers
_STAGES = 3
_NUMBERS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


class FusedProgram:
    """`program` over `tables` on one device, as `kernels.device_program.DeviceProgram` gives them; products in `dtype`.

    The kernel is compiled at the first call, and again where users have more codes than before.
    """

    def __init__(self, program: Program, tables: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self.num_tasks = program.logits.width
        self._tables, self._dtype = [tables[name] for name in program.tables()], dtype
        device = self._tables[0].device
        widths = {name: table.shape[1] if table.dim() == 2 else 1 for name, table in tables.items()}
        cuts = cut(program, _MOST, _BUDGET)
        self._rows = (cuts.row, cuts.full_row)
        self.source = generate(program, cuts, widths)
        self._weights = self.source.weights.packed(dtype, device)
        self._vectors = self.source.vectors.packed(torch.float32, device)
        self._kernel: Any = _module(self.source.text).program
        self._packing: UserPacking | None = None

    def __call__(self, user: Features, rows: Tensor) -> Tensor:
        """A batch's user side [B, ...] and rows int64 [B, N] -> logits float32 [B, N, T]."""
        num_requests, num = rows.shape
        logits = torch.empty((num_requests, num, self.num_tasks), device=rows.device)
        if not logits.numel():
            return logits
        packing = self._packing
        if packing is None or not packing.fits(user):
            packing = self._packing = UserPacking(self.source.user.blocks, self.source.codes, user)
        tiles = triton.cdiv(num, _TILE)
        at_once = _programs(rows.device) if any(self._rows) else tiles * num_requests
        places = at_once * _TILE
        kept = torch.empty(places * self._rows[0], dtype=self._dtype, device=rows.device)
        kept_full = torch.empty(places * self._rows[1], device=rows.device)
        rest = (
            rows.contiguous(),
            kept,
            kept_full,
            packing.numbers(user),
            packing.codes(user),
            self._weights,
            self._vectors,
        )
        with launching_on(rows):
            for first in range(0, tiles * num_requests, at_once):
                self._kernel[(min(at_once, tiles * num_requests - first),)](
                    first,
                    tiles,
                    num,
                    len(self._tables[0]),
                    *rest,
                    logits,
                    *self._tables,
                    NUMBER=_NUMBERS[self._dtype],
                    TILE=_TILE,
                    CODES=packing.num_codes,
                    num_warps=_WARPS,
                    num_stages=_STAGES,
                )
        return logits


def _programs(device: torch.device) -> int:
    """Of one launch: as many as run at once, so that their scratch is written again before it leaves the cache."""
    if device.type != "cuda":
        return 2
    # a large program takes every register of a multiprocessor
    return torch.cuda.get_device_properties(device).multi_processor_count


def _module(text: str) -> ModuleType:
    """The source as a module of its own file, beside what Triton compiles: triton.jit and profilers read it there."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    name = f"prerank_program_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    path = Path(triton.knobs.cache.dir) / "prerank" / f"{name}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}")
    draft.write_text(text)
    draft.replace(path)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    return module
