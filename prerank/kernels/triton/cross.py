"""The low-rank cross layer in one kernel: what lies between its two products never leaves the program."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from prerank.kernels.triton import launching_on

MOST_RANK = 128
"""Above it a program's tile of narrow rows does not stay in registers; torch's two products serve there."""

_TILE = 32  # rows a program, columns a step: not tuned
_COLUMNS = 64


def cross(x0: Tensor, x: Tensor, narrow: Tensor, widen: Tensor, bias: Tensor) -> Tensor:
    """`kernels.cross.cross_layer` of arguments that were checked, x0 and x [N, W], of a rank up to MOST_RANK."""
    (num, width), rank = x.shape, len(narrow)
    out = torch.empty((num, width), dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    with launching_on(x):
        layer[(triton.cdiv(num, _TILE),)](
            x0.contiguous(),
            x.contiguous(),
            narrow.contiguous(),
            widen.contiguous(),
            bias.contiguous(),
            out,
            num,
            WIDTH=width,
            RANK=rank,
            PADDED=max(16, triton.next_power_of_2(rank)),
            TILE=_TILE,
            COLUMNS=_COLUMNS,
        )
    return out


@triton.jit
def layer(
    x0: tl.tensor,
    x: tl.tensor,
    narrow: tl.tensor,
    widen: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    num: tl.tensor,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """TILE rows of out [N, WIDTH]; narrow [RANK, WIDTH], widen [WIDTH, RANK], PADDED a power of two from RANK on."""
    places = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    ranks = tl.arange(0, PADDED)
    is_row, is_rank = places < num, ranks < RANK
    thin = tl.zeros((TILE, PADDED), tl.float32)
    for start in range(0, WIDTH, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        is_column = columns < WIDTH
        at = places[:, None] * WIDTH + columns[None, :]
        weights = narrow + ranks[None, :] * WIDTH + columns[:, None]
        thin = tl.dot(
            tl.load(x + at, mask=is_row[:, None] & is_column[None, :], other=0.0),
            tl.load(weights, mask=is_column[:, None] & is_rank[None, :], other=0.0),
            thin,
            input_precision="ieee",  # float32 in full: what ties must tie on every device
        )
    # infinity times the zeros past RANK is not zero
    thinned = tl.where(is_rank[None, :], thin, 0.0).to(x.dtype.element_ty)
    for start in range(0, WIDTH, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        is_column = columns < WIDTH
        at = places[:, None] * WIDTH + columns[None, :]
        inside = is_row[:, None] & is_column[None, :]
        weights = widen + columns[None, :] * RANK + ranks[:, None]
        wide = tl.dot(
            thinned,
            tl.load(weights, mask=is_rank[:, None] & is_column[None, :], other=0.0),
            input_precision="ieee",
        )
        wide += tl.load(bias + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
        first = tl.load(x0 + at, mask=inside, other=0.0).to(tl.float32)
        own = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + at, first * wide + own, mask=inside)
