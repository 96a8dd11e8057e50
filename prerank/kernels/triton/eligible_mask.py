"""Eligible rows as a mask, in one kernel: a program decides its words and writes a byte a row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from prerank.kernels.triton import launching_on

_BLOCK = 16  # words a program: 1024 rows, not tuned


def mask_of(bitmaps: Tensor, chosen: Tensor, starts: Tensor, inverted: Tensor, num_items: int) -> Tensor:
    """`kernels.eligible_mask.eligible_mask`, all on one device."""
    mask = torch.empty(num_items, dtype=torch.bool, device=bitmaps.device)
    if num_items:
        num_words = bitmaps.shape[1]
        with launching_on(bitmaps):
            decide_mask[(triton.cdiv(num_words, _BLOCK),)](
                bitmaps.contiguous(),
                chosen.contiguous(),
                starts.contiguous(),
                inverted.contiguous(),
                mask,
                len(inverted),
                num_words,
                num_items,
                BLOCK=_BLOCK,
            )
    return mask


@triton.jit
def decide_mask(
    bitmaps: tl.tensor,
    chosen: tl.tensor,
    starts: tl.tensor,
    inverted: tl.tensor,
    mask: tl.tensor,
    num_groups: tl.tensor,
    num_words: tl.tensor,
    num_items: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """A program's words of the answer, as a byte a row."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
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
    bit = tl.arange(0, 64).to(tl.int64)[None, :]
    rows = places[:, None] * 64 + bit
    tl.store(mask + rows, ((eligible[:, None] >> bit) & 1) != 0, mask=rows < num_items)
