"""Eligible rows as a mask, for a captured graph: no shape depends on a value, and the host does not wait for a device.

The same as `kernels.eligible` finds; as nobody looks at what is asked, it is checked before it goes to a device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prerank.kernels import triton
from prerank.kernels.eligible import WORD, num_words


def eligible_mask(bitmaps: Tensor, chosen: Tensor, starts: Tensor, inverted: Tensor, num_items: int) -> Tensor:
    """Whether each row is eligible, bool [num_items].

    As `eligible_rows`, but that there may be more of `chosen` int32 [C] than groups have: what is past the last of
    `starts` counts for nothing, so that requests of different lengths have one shape. Bitmaps that are not there, or
    starts that fall, are the end of the process on a GPU.
    """
    _check(bitmaps, chosen, starts, inverted, num_items)
    if triton.serves(bitmaps.device):
        return by_triton(bitmaps, chosen, starts, inverted, num_items)
    return reference(bitmaps, chosen, starts, inverted, num_items)


def reference(bitmaps: Tensor, chosen: Tensor, starts: Tensor, inverted: Tensor, num_items: int) -> Tensor:
    """`eligible_mask` in plain torch, on the device of `bitmaps`."""
    places = torch.arange(len(chosen), device=bitmaps.device)
    is_own = (places >= starts[:-1, None]) & (places < starts[1:, None])
    any_of = bitmaps.new_zeros(len(inverted), bitmaps.shape[1])
    for place, own in enumerate(is_own.unbind(1)):
        # all ones keep a bitmap, zero leaves it out
        any_of |= bitmaps.index_select(0, chosen[place : place + 1]) & -own.long()[:, None]
    words = bitmaps.new_full(bitmaps.shape[1:], -1)
    for group in any_of ^ -inverted.long()[:, None]:
        words &= group
    bits = words.unsqueeze(1) >> torch.arange(WORD, device=bitmaps.device) & 1
    return bits.flatten()[:num_items].bool()


def by_triton(bitmaps: Tensor, chosen: Tensor, starts: Tensor, inverted: Tensor, num_items: int) -> Tensor:
    """`eligible_mask` by the Triton kernel: on a GPU, or anywhere in Triton's interpreter."""
    from prerank.kernels.triton.eligible_mask import mask_of  # where there is no GPU there need be no triton

    return mask_of(bitmaps, chosen, starts, inverted, num_items)


def _check(bitmaps: Tensor, chosen: Tensor, starts: Tensor, inverted: Tensor, num_items: int) -> None:
    assert bitmaps.dtype == torch.int64
    assert bitmaps.shape[1:] == (num_words(num_items),), f"{list(bitmaps.shape)} for {num_items} items"
    assert (chosen.dtype, chosen.dim()) == (torch.int32, 1)
    assert (starts.dtype, starts.shape) == (torch.int64, (len(inverted) + 1,))
    assert (inverted.dtype, inverted.dim()) == (torch.bool, 1)
