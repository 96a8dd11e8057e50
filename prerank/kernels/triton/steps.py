"""What a step of a generated program is made of: values [TILE, width] of candidates, a piece of a register each.

A piece of one column is [TILE, 1]; the columns of another past its own are zero (`kernels.device_layout`).
"""

import triton
import triton.language as tl

from prerank.kernels.device_blocks import CODES
from prerank.kernels.device_layout import STEP

_CODES = tl.constexpr(CODES)
_STEP = tl.constexpr(STEP)


@triton.jit
def vector(start: tl.tensor, WIDTH: tl.constexpr) -> tl.tensor:
    """float32 [1, WIDTH] from `start` on."""
    return tl.load(start + tl.arange(0, WIDTH))[None, :].to(tl.float32)


@triton.jit
def filled(start: tl.tensor, TILE: tl.constexpr, WIDTH: tl.constexpr) -> tl.tensor:
    """The same in every row, [TILE, WIDTH]."""
    return tl.zeros((TILE, WIDTH), tl.float32) + vector(start, WIDTH)


@triton.jit
def gathered(
    table: tl.tensor, rows: tl.tensor, is_row: tl.tensor, ROW: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr
) -> tl.tensor:
    """WIDTH columns of a table [I, ROW] at rows [TILE], zero where is_row is not."""
    columns = tl.arange(0, PADDED)
    inside = is_row[:, None] & (columns < WIDTH)[None, :]
    return tl.load(table + rows[:, None] * ROW + columns[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def multiplied(summed: tl.tensor, x: tl.tensor, start: tl.tensor, NUMBER: tl.constexpr) -> tl.tensor:
    """summed float32 [TILE, WIDTH] + x [TILE, DEPTH] times the block [DEPTH, WIDTH] from `start` on."""
    WIDTH: tl.constexpr = summed.shape[1]
    DEPTH: tl.constexpr = x.shape[1]
    if DEPTH == 1:
        found = summed + x.to(tl.float32) * vector(start, WIDTH)
    elif WIDTH == 1:
        found = summed + tl.sum(x.to(tl.float32) * vector(start, DEPTH), 1, keep_dims=True)
    else:
        block = tl.load(start + tl.arange(0, DEPTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :])
        # float32 in full: what ties must tie on every device
        found = tl.dot(x.to(NUMBER), block.to(NUMBER), summed, input_precision="ieee")
    return found


@triton.jit
def streamed(summed: tl.tensor, x: tl.tensor, start: tl.tensor, DEPTH: tl.constexpr, NUMBER: tl.constexpr) -> tl.tensor:
    """The same of DEPTH columns of scratch, whose rows begin at `x` [TILE], STEP after STEP."""
    WIDTH: tl.constexpr = summed.shape[1]
    steps = tl.arange(0, _STEP)
    for at in range(0, DEPTH, _STEP):
        part = tl.load(x[:, None] + at + steps[None, :])
        block = tl.load(start + (at + steps)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :])
        summed = tl.dot(part.to(NUMBER), block.to(NUMBER), summed, input_precision="ieee")
    return summed


@triton.jit
def loaded(x: tl.tensor, WIDTH: tl.constexpr) -> tl.tensor:
    """WIDTH columns of scratch whose rows begin at `x` [TILE], as float32."""
    return tl.load(x[:, None] + tl.arange(0, WIDTH)[None, :]).to(tl.float32)


@triton.jit
def stored(x: tl.tensor, value: tl.tensor) -> None:
    """value [TILE, WIDTH] to scratch, whose rows begin at `x` [TILE]; rounded to its type."""
    tl.store(x[:, None] + tl.arange(0, value.shape[1])[None, :], value.to(x.dtype.element_ty))


@triton.jit
def gelu(x: tl.tensor) -> tl.tensor:
    """Of float32, without approximation."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def total(x: tl.tensor) -> tl.tensor:
    """Of each row, [TILE, 1]."""
    return tl.sum(x.to(tl.float32), 1, keep_dims=True)


@triton.jit
def spread(x: tl.tensor, mean: tl.tensor, WIDTH: tl.constexpr) -> tl.tensor:
    """Of each row, the sum of squares of its WIDTH columns less the mean [TILE, 1]."""
    centred = tl.where((tl.arange(0, x.shape[1]) < WIDTH)[None, :], x - mean, 0.0)
    return tl.sum(centred * centred, 1, keep_dims=True)


@triton.jit
def largest(x: tl.tensor, WIDTH: tl.constexpr) -> tl.tensor:
    """Of each row's WIDTH columns, [TILE, 1]."""
    return tl.max(tl.where((tl.arange(0, x.shape[1]) < WIDTH)[None, :], x, float("-inf")), 1, keep_dims=True)


@triton.jit
def raised(x: tl.tensor, top: tl.tensor, WIDTH: tl.constexpr) -> tl.tensor:
    """exp(x - top) of WIDTH columns, zero past them."""
    return tl.where((tl.arange(0, x.shape[1]) < WIDTH)[None, :], tl.exp(x - top), 0.0)


@triton.jit
def column(x: tl.tensor, NUMBER_OF: tl.constexpr) -> tl.tensor:
    """One column, float32 [TILE, 1]."""
    return tl.sum(tl.where((tl.arange(0, x.shape[1]) == NUMBER_OF)[None, :], x, 0.0), 1, keep_dims=True)


@triton.jit
def matched(
    table: tl.tensor, rows: tl.tensor, is_row: tl.tensor, MEMBERS: tl.constexpr, codes: tl.tensor, CODES: tl.constexpr
) -> tl.tensor:
    """log(1 + how many of CODES positive ones from `codes` on are among a row's MEMBERS), [TILE, 1]."""
    count = tl.zeros((rows.shape[0], 1), tl.float32)
    for member in tl.static_range(MEMBERS):
        wanted = tl.load(table + rows * MEMBERS + member, mask=is_row, other=0).to(tl.int64)[:, None]
        for start in range(0, CODES, _CODES):
            held = tl.load(codes + start + tl.arange(0, _CODES))[None, :]
            count += tl.sum(((wanted == held) & (held > 0)).to(tl.float32), 1, keep_dims=True)
    return tl.log(1.0 + count)


@triton.jit
def put(logits: tl.tensor, x: tl.tensor, is_row: tl.tensor, inside: tl.tensor, WIDTH: tl.constexpr) -> None:
    """WIDTH columns of an answer, whose rows begin at `logits` [TILE]; NaN where is_row is not."""
    columns = tl.arange(0, x.shape[1])
    kept = inside[:, None] & (columns < WIDTH)[None, :]
    tl.store(logits[:, None] + columns[None, :], tl.where(is_row[:, None], x, float("nan")), mask=kept)
