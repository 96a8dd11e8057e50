"""Greedy top-k with several caps: torch sorts and numbers the groups, then one program a request walks down the order.

A block of candidates is decided together, exactly: of those still open, one that fits even if all open ones before it
win has won, and one that does not even if none of them does has lost. The first open one is always one or the other.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from prerank.kernels.triton import launching_on

_BLOCK = 64  # candidates a step, of which every pair is compared; not tuned


def walk_down(order: Tensor, counts: Tensor, groups: Tensor, at_most: Tensor, k: int) -> Tensor:
    """The winners, positions int64 [B, k], -1 past the last.

    order int64 [B, N]: positions by falling utility, of which the first counts[b] (int64 [B]) can win; groups int32
    [B, G, N] and at_most int64 [G] as `kernels.greedy.greedy_top_k` has them, all on one device.
    """
    num_requests, num = order.shape
    won = torch.full((num_requests, k), -1, dtype=torch.int64, device=order.device)
    if not won.numel() or not num:
        return won
    assert num < 1 << 31, "a group's winners are counted in 32 bits"
    numbers = _numbered(groups).gather(2, order.unsqueeze(1).expand(groups.shape)).contiguous()
    held = torch.zeros_like(numbers)
    with launching_on(order):
        walk[(num_requests,)](
            order.contiguous(), counts, numbers, at_most.contiguous(), held, won, num, groups.shape[1], k, BLOCK=_BLOCK
        )
    return won


def _numbered(groups: Tensor) -> Tensor:
    """The same groups as numbers below N, [B, G, N], so that a count a number is all the room they take."""
    codes, places = groups.sort(dim=2)
    is_next = codes[..., 1:] != codes[..., :-1]
    numbers = torch.nn.functional.pad(is_next.cumsum(2, dtype=torch.int32), (1, 0))
    return torch.empty_like(numbers).scatter_(2, places, numbers).masked_fill_(groups < 0, -1)


@triton.jit
def walk(
    order: tl.tensor,
    counts: tl.tensor,
    numbers: tl.tensor,
    at_most: tl.tensor,
    held: tl.tensor,
    won: tl.tensor,
    num: tl.tensor,
    num_rules: tl.tensor,
    k: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """A request: numbers int32 [B, G, N] of its candidates in order; held int32 [B, G, N], zeros, counts winners."""
    request = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    is_before = lanes[None, :] < lanes[:, None]
    end = tl.load(counts + request)
    start, taken = end * 0, end * 0
    while (start < end) & (taken < k):
        places = start + lanes
        inside = places < end
        is_open = inside
        rule = 0
        while rule < num_rules:
            at = (request * num_rules + rule) * num
            own = tl.load(numbers + at + places, mask=inside, other=-1)
            # .cg: another thread counted, and its count is in the second cache
            full = tl.load(held + at + own, mask=own >= 0, other=0, cache_modifier=".cg") >= tl.load(at_most + rule)
            is_open = is_open & ((own < 0) | (full == 0))
            rule += 1
        has_won = lanes < 0
        while tl.max(is_open.to(tl.int32), 0) > 0:
            fits, lost = is_open, lanes < 0
            rule = 0
            while rule < num_rules:
                at = (request * num_rules + rule) * num
                own = tl.load(numbers + at + places, mask=inside, other=-1)
                grouped = own >= 0
                room = tl.load(at_most + rule) - tl.load(held + at + own, mask=grouped, other=0, cache_modifier=".cg")
                rivals = (own[:, None] == own[None, :]) & is_before
                least = tl.sum((rivals & has_won[None, :]).to(tl.int32), 1)
                most = least + tl.sum((rivals & is_open[None, :]).to(tl.int32), 1)
                fits = fits & ((grouped == 0) | (most < room))
                lost = lost | (grouped & (least >= room))
                rule += 1
            has_won = has_won | fits
            is_open = is_open & (fits == 0) & (lost == 0)
        winners = has_won.to(tl.int32)
        ranks = taken + tl.cumsum(winners, 0) - winners
        tl.store(
            won + request * k + ranks, tl.load(order + request * num + places, mask=has_won), mask=has_won & (ranks < k)
        )
        # every thread has read the counts before any changes them, and reads them changed after that
        tl.debug_barrier()
        rule = 0
        while rule < num_rules:
            at = (request * num_rules + rule) * num
            own = tl.load(numbers + at + places, mask=has_won, other=-1)
            tl.atomic_add(held + at + own, 1, mask=own >= 0)
            rule += 1
        tl.debug_barrier()
        taken += tl.sum(winners, 0)
        start += BLOCK
