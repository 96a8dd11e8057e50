"""Eligible rows in two kernels: the first decides words and counts their bits, the second writes the rows of the bits.

Between them torch sums the counts, so that every program of the second knows where its rows start.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from prerank.kernels.triton import launching_on

_BLOCK = 64  # words a program: 4096 rows, not tuned


def rows_of(bitmaps: Tensor, chosen: Tensor, starts: Tensor, inverted: Tensor, num_items: int) -> Tensor:
    """`kernels.eligible.eligible_rows` of arguments that were checked, all on one device."""
    words, ends, firsts = _decided(bitmaps, chosen, starts, inverted, num_items)
    num = int(ends[-1]) if len(ends) else 0
    rows = torch.empty(num, dtype=torch.int64, device=bitmaps.device)
    if len(firsts):
        with launching_on(words):
            write[(len(firsts),)](words, firsts, rows, len(words), num_items, BLOCK=_BLOCK)
    return rows


def _decided(
    bitmaps: Tensor, chosen: Tensor, starts: Tensor, inverted: Tensor, num_items: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The words of the answer; of each block, past which place of all rows its own end, and where they start."""
    num_words = bitmaps.shape[1]
    blocks = triton.cdiv(num_words, _BLOCK)
    words = torch.empty(num_words, dtype=torch.int64, device=bitmaps.device)
    counts = torch.empty(blocks, dtype=torch.int64, device=bitmaps.device)
    if blocks:
        with launching_on(bitmaps):
            decide[(blocks,)](
                bitmaps.contiguous(),
                chosen.contiguous(),
                starts.contiguous(),
                inverted.contiguous(),
                words,
                counts,
                len(inverted),
                num_words,
                num_items,
                BLOCK=_BLOCK,
            )
    ends = counts.cumsum(0)
    return words, ends, ends - counts


@triton.jit
def bits_of(words: tl.tensor, places: tl.tensor, num_items: tl.tensor) -> tl.tensor:
    """words int64 [BLOCK] at `places` of the bitmap -> their bits int32 [BLOCK, 64], zero past num_items."""
    bit = tl.arange(0, 64).to(tl.int64)[None, :]
    has = (words[:, None] >> bit) & 1
    return tl.where(places[:, None] * 64 + bit < num_items, has, 0).to(tl.int32)


@triton.jit
def words_at(
    bitmaps: tl.tensor,
    chosen: tl.tensor,
    starts: tl.tensor,
    inverted: tl.tensor,
    places: tl.tensor,
    num_groups: tl.tensor,
    num_words: tl.tensor,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """The words int64 [BLOCK] of who is eligible at `places` of a bitmap."""
    inside = places < num_words
    eligible = tl.full((BLOCK,), -1, tl.int64)
    group = 0
    # `while`, as Triton 3.6 cannot interpret a `range` of a tensor with numpy 2.4
    while group < num_groups:
        any_of = tl.zeros((BLOCK,), tl.int64)
        at, end = tl.load(starts + group), tl.load(starts + group + 1)
        while at < end:
            bitmap = tl.load(chosen + at).to(tl.int64)
            any_of |= tl.load(bitmaps + bitmap * num_words + places, mask=inside, other=0)
            at += 1
        # all ones turn every bit around, zero none
        eligible &= any_of ^ -tl.load(inverted + group).to(tl.int64)
        group += 1
    return eligible


@triton.jit
def decide(
    bitmaps: tl.tensor,
    chosen: tl.tensor,
    starts: tl.tensor,
    inverted: tl.tensor,
    words: tl.tensor,
    counts: tl.tensor,
    num_groups: tl.tensor,
    num_words: tl.tensor,
    num_items: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """A program's words of the answer and how many rows they let through."""
    block = tl.program_id(0)
    places = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    eligible = words_at(bitmaps, chosen, starts, inverted, places, num_groups, num_words, BLOCK)
    tl.store(words + places, eligible, mask=places < num_words)
    tl.store(counts + block, tl.sum(tl.sum(bits_of(eligible, places, num_items), 1), 0).to(tl.int64))


@triton.jit
def write(
    words: tl.tensor,
    starts: tl.tensor,
    rows: tl.tensor,
    num_words: tl.tensor,
    num_items: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """A program's rows, ascending, from where those of the programs before it end."""
    block = tl.program_id(0)
    places = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    found = tl.load(words + places, mask=places < num_words, other=0)
    bits = tl.reshape(bits_of(found, places, num_items), (BLOCK * 64,))
    before = tl.cumsum(bits, 0) - bits
    first = block.to(tl.int64) * BLOCK * 64
    at = tl.load(starts + block) + before
    tl.store(rows + at, first + tl.arange(0, BLOCK * 64), mask=bits > 0)
