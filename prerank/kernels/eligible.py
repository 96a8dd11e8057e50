"""Eligible rows from packed bitmaps: for every group of a request, the OR of its bitmaps; of all groups, the AND.

On CPUs it runs natively, on GPUs in Triton, and in torch where either is missing.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from prerank.kernels import native, ranges, triton
from prerank.kernels.work import Work

WORD = 64
"""Rows in one word of a bitmap."""


def num_words(num_items: int) -> int:
    """W, the int64 words that `num_items` bits take."""
    return -(-num_items // WORD)


def pack_rows(rows: Tensor, num_items: int) -> Tensor:
    """rows int64 [n] in any order, each once -> the bitmap int64 [W] that has their bits and no other.

    Raises IndexError for a row that is not from 0 to num_items - 1.
    """
    _check_range("rows", rows, num_items)
    words = torch.zeros(num_words(num_items), dtype=torch.int64, device=rows.device)
    # distinct bits of a word add up to their OR; the sign bit is one of them
    return words.index_add_(0, rows // WORD, torch.ones_like(rows) << rows % WORD)


def eligible_rows(bitmaps: Tensor, chosen: Tensor, starts: Tensor, inverted: Tensor, num_items: int) -> Tensor:
    """The rows that are eligible, int64 [n], ascending.

    bitmaps int64 [R, W], W = ceil(num_items / 64): bit i of word j is row 64 j + i; bits past num_items count for
    nothing. Group g of a request has the bitmaps chosen[starts[g]:starts[g + 1]]: chosen int32 [C] and starts int64
    [G + 1]. A row is eligible if for every group one of its bitmaps has the row's bit or, where inverted bool [G], none
    has. So an empty group lets nobody through, an empty inverted one everybody, and no groups everybody.
    Raises IndexError for a bitmap there is not, ValueError for starts that do not split `chosen`.
    """
    if torch.compiler.is_compiling():
        found: Tensor = _operation(bitmaps, chosen, starts, inverted, num_items)
        return found
    # the first call of a custom operation imports the whole compiler, over a second: nobody but it needs that
    return _here(bitmaps, chosen, starts, inverted, num_items)


def _here(bitmaps: Tensor, chosen: Tensor, starts: Tensor, inverted: Tensor, num_items: int) -> Tensor:
    if triton.serves(bitmaps.device):
        return by_triton(bitmaps, chosen, starts, inverted, num_items)
    if bitmaps.device.type != "cpu" or native.library() is None:
        return reference(bitmaps, chosen, starts, inverted, num_items)
    return natively(bitmaps, chosen, starts, inverted, num_items)


@torch.library.custom_op("prerank::eligible_rows", mutates_args=())
def _operation(bitmaps: Tensor, chosen: Tensor, starts: Tensor, inverted: Tensor, num_items: int) -> Tensor:
    return _here(bitmaps, chosen, starts, inverted, num_items)


@_operation.register_fake
def _(bitmaps: Tensor, chosen: Tensor, starts: Tensor, inverted: Tensor, num_items: int) -> Tensor:
    return bitmaps.new_empty(torch.library.get_ctx().new_dynamic_size())


def reference(bitmaps: Tensor, chosen: Tensor, starts: Tensor, inverted: Tensor, num_items: int) -> Tensor:
    """`eligible_rows` in plain torch, on the device of `bitmaps`."""
    _check(bitmaps, chosen, starts, inverted, num_items)
    words = torch.full((num_words(num_items),), -1, dtype=torch.int64, device=bitmaps.device)
    bounds = starts.tolist()
    for start, end, is_inverted in zip(bounds, bounds[1:], inverted.tolist(), strict=False):
        group = torch.zeros_like(words)
        for row in chosen[start:end].tolist():
            group |= bitmaps[row]
        words &= ~group if is_inverted else group
    bits = words.unsqueeze(1) >> torch.arange(WORD, device=bitmaps.device) & 1
    return bits.flatten()[:num_items].nonzero().flatten()


def natively(
    bitmaps: Tensor, chosen: Tensor, starts: Tensor, inverted: Tensor, num_items: int, level: str | None = None
) -> Tensor:
    """`eligible_rows` by the native library, which must be there; everything contiguous and on the CPU.

    `level` is one of `native.LEVELS` that this processor has, its best unless given.
    """
    _check(bitmaps, chosen, starts, inverted, num_items)
    library, width, count = native.library(), num_words(num_items), len(inverted)
    assert library is not None
    best = library.prerank_level()
    instructions = ctypes.c_int64(best if level is None else native.LEVELS.index(level))
    assert instructions.value <= best
    words = torch.empty(width, dtype=torch.int64)
    with ranges.kernel("native eligible", lambda: Work(num_bytes=(len(chosen) * width + found) * 8)):
        library.prerank_eligible_words.restype = ctypes.c_int64
        found = library.prerank_eligible_words(
            native.pointer(bitmaps, torch.int64, len(bitmaps), width),
            ctypes.c_int64(width),
            ctypes.c_int64(num_items),
            native.pointer(chosen, torch.int32, len(chosen)),
            native.pointer(starts, torch.int64, count + 1),
            native.pointer(inverted, torch.bool, count),
            ctypes.c_int64(count),
            native.pointer(words, torch.int64, width),
            instructions,
        )
        rows = torch.empty(found, dtype=torch.int64)
        library.prerank_rows_of_words.restype = None
        library.prerank_rows_of_words(
            native.pointer(words, torch.int64, width),
            ctypes.c_int64(width),
            native.pointer(rows, torch.int64, found),
            ctypes.c_int64(found),
            instructions,
        )
    return rows


def by_triton(bitmaps: Tensor, chosen: Tensor, starts: Tensor, inverted: Tensor, num_items: int) -> Tensor:
    """`eligible_rows` by the Triton kernels: on a GPU, or anywhere in Triton's interpreter."""
    _check(bitmaps, chosen, starts, inverted, num_items)
    from prerank.kernels.triton.eligible import rows_of  # where there is no GPU there need be no triton

    return rows_of(bitmaps, chosen, starts, inverted, num_items)


def _check(bitmaps: Tensor, chosen: Tensor, starts: Tensor, inverted: Tensor, num_items: int) -> None:
    """Kernels believe what they are told, and every version is told the same."""
    assert num_items >= 0
    assert bitmaps.shape[1:] == (num_words(num_items),), f"{list(bitmaps.shape)} for {num_items} items"
    for name, tensor, dtype in (
        ("bitmaps", bitmaps, torch.int64),
        ("chosen", chosen, torch.int32),
        ("starts", starts, torch.int64),
        ("inverted", inverted, torch.bool),
    ):
        assert tensor.dtype == dtype, f"{name}: expected {dtype}, got {tensor.dtype}"
        assert name == "bitmaps" or tensor.dim() == 1
    bounds = starts.tolist()
    if len(bounds) != len(inverted) + 1 or bounds != sorted(bounds) or bounds[0] != 0 or bounds[-1] != len(chosen):
        raise ValueError(f"expected starts that split {len(chosen)} bitmaps into {len(inverted)} groups, got {bounds}")
    _check_range("chosen", chosen, len(bitmaps))


def _check_range(name: str, rows: Tensor, size: int) -> None:
    if not rows.numel():
        return
    low, high = torch.stack(rows.aminmax()).tolist()  # one wait for a GPU, not two
    if low < 0 or high >= size:
        raise IndexError(f"{name}: expected 0 to {size - 1}, got {low} to {high}")
