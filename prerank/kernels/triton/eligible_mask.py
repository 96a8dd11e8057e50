"""Eligible rows as a mask, in one kernel: a program decides its words and writes a byte a row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from prerank.kernels.triton import launching_on
from prerank.kernels.triton.eligible import words_at

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
    eligible = words_at(bitmaps, chosen, starts, inverted, places, num_groups, num_words, BLOCK)
    bit = tl.arange(0, 64).to(tl.int64)[None, :]
    rows = places[:, None] * 64 + bit
    tl.store(mask + rows, ((eligible[:, None] >> bit) & 1) != 0, mask=rows < num_items)
