"""The k most similar eligible rows in one pass over vectors: targeting's mask, the dot products and the order fused.

The kernel writes each row's key (`kernels.top_k`) and the largest one of every BLOCK rows. As keys are distinct, the k
largest lie in the k blocks whose largest are, so only those are looked at again: exactly, and nothing waits for a
count.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from prerank.kernels.top_k import NONE, value_and_row
from prerank.kernels.triton import launching_on

_BLOCK = 64  # rows of a program, not tuned
_KEYS_AT_ONCE = 1 << 26  # half a gigabyte of them
_NONE = tl.constexpr(NONE)


def top_k(
    vectors: Tensor, scales: Tensor | None, query: Tensor, k: int, mask: Tensor | None, rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`kernels.scan.scan_top_k` of arguments that were checked; `mask` bool [I] or `rows` int64 [N] are eligible."""
    num = len(vectors) if rows is None else len(rows)
    step = max(1, _KEYS_AT_ONCE // max(1, num))
    pieces = [query[start : start + step] for start in range(0, len(query), step)]
    found = [_top_keys(vectors, scales, piece, k, mask, rows, num) for piece in pieces]
    return value_and_row(torch.cat(found) if found else torch.full((0, k), NONE, device=query.device))


def _top_keys(
    vectors: Tensor, scales: Tensor | None, query: Tensor, k: int, mask: Tensor | None, rows: Tensor | None, num: int
) -> Tensor:
    """int64 [B, k], falling."""
    (num_queries, dim), blocks = query.shape, triton.cdiv(num, _BLOCK)
    best = torch.full((num_queries, k), NONE, device=query.device)
    kept = min(k, num)
    if not num_queries or not kept:
        return best
    keys = torch.empty((num_queries, blocks, _BLOCK), dtype=torch.int64, device=query.device)
    largest = torch.empty((num_queries, blocks), dtype=torch.int64, device=query.device)
    with launching_on(vectors):
        scan[(blocks,)](
            vectors.contiguous(),
            vectors if scales is None else scales.contiguous(),
            query.contiguous(),
            vectors if mask is None else mask.contiguous(),
            vectors if rows is None else rows.contiguous(),
            keys,
            largest,
            num,
            num_queries,
            DIM=dim,
            PADDED=triton.next_power_of_2(max(1, dim)),
            BLOCK=_BLOCK,
            HAS_SCALES=scales is not None,
            HAS_MASK=mask is not None,
            HAS_ROWS=rows is not None,
        )
    if blocks > k:
        chosen = largest.topk(k).indices.unsqueeze(-1).expand(-1, -1, _BLOCK)
        keys = keys.gather(1, chosen)
    best[:, :kept] = keys.flatten(1).topk(kept).values
    return best


@triton.jit
def scan(
    vectors: tl.tensor,
    scales: tl.tensor,
    query: tl.tensor,
    mask: tl.tensor,
    rows: tl.tensor,
    keys: tl.tensor,
    largest: tl.tensor,
    num: tl.tensor,
    num_queries: tl.tensor,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_ROWS: tl.constexpr,
) -> None:
    """A block of rows for every query: keys int64 [B, blocks, BLOCK] and the largest of them, [B, blocks]."""
    block = tl.program_id(0).to(tl.int64)
    lanes, columns = tl.arange(0, BLOCK), tl.arange(0, PADDED)
    places = block * BLOCK + lanes
    may = places < num
    at = tl.load(rows + places, mask=may, other=0) if HAS_ROWS else places
    if HAS_MASK:
        # what may not be found is not read
        may = may & (tl.load(mask + at, mask=may, other=0) != 0)
    is_column = columns < DIM
    inside = may[:, None] & is_column[None, :]
    found = tl.load(vectors + at[:, None] * DIM + columns[None, :], mask=inside, other=0).to(tl.float32)
    scale = tl.load(scales + at, mask=may, other=0.0) if HAS_SCALES else 1.0
    number = num_queries * 0
    # `while`, as Triton 3.6 cannot interpret a `range` of a tensor with numpy 2.4
    while number < num_queries:
        asked = tl.load(query + number * DIM + columns, mask=is_column, other=0.0)
        # zero is one value: -0.0 + 0.0 is 0.0
        similarity = tl.sum(found * asked[None, :], 1) * scale + 0.0
        bits = similarity.to(tl.int32, bitcast=True)
        ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
        key = (ordered << 32) | (0xFFFFFFFF - at)
        key = tl.where(may & (tl.abs(similarity) < float("inf")), key, _NONE)
        out = number.to(tl.int64) * tl.num_programs(0) + block
        tl.store(keys + out * BLOCK + lanes, key)
        tl.store(largest + out, tl.max(key, 0))
        number += 1
