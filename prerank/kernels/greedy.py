"""The k best in order, at most so many of one group: greedy, exact, and the same on every device.

Candidates by falling utility; one is skipped where a rule's group of its is full. Several rules at once are not their
masks one after the other: a candidate that one rule turns away leaves its place in the groups of the others.
"""

from __future__ import annotations

import ctypes
from collections import Counter

import torch
from torch import Tensor

from prerank.kernels import native, ranges, triton
from prerank.kernels.shapes import check_shapes
from prerank.kernels.work import Work

_MOST = 1 << 32


def greedy_top_k(utility: Tensor, rows: Tensor, valid: Tensor, groups: Tensor, at_most: Tensor, k: int) -> Tensor:
    """The positions int64 [B, k] of the winners of B requests, best first, -1 past the last.

    utility float32 [B, N], rows int64 [B, N], valid bool [B, N]; groups int32 [B, G, N] of any strides, the group of
    each candidate under each of G rules, negative for none, which is never full; at_most int64 [G]. Only valid
    candidates of finite utility win. Equal utilities, 0.0 and -0.0 too, are ordered by row, then by position. With
    G = 0 it is the exact top k. Raises ValueError for a negative k and tensors of other shapes, types or devices.
    """
    if torch.compiler.is_compiling():
        found: Tensor = _operation(utility, rows, valid, groups, at_most, k)
        return found
    # the first call of a custom operation imports the whole compiler, over a second: nobody but it needs that
    return _here(utility, rows, valid, groups, at_most, k)


def _here(utility: Tensor, rows: Tensor, valid: Tensor, groups: Tensor, at_most: Tensor, k: int) -> Tensor:
    if triton.serves(utility.device):
        return by_triton(utility, rows, valid, groups, at_most, k)
    _check(utility, rows, valid, groups, at_most, k)
    if utility.device.type == "cpu" and native.library() is not None:
        return _native(utility, rows, valid, groups, at_most, k)
    return reference(utility, rows, valid, groups, at_most, k)


@torch.library.custom_op("prerank::greedy_top_k", mutates_args=())
def _operation(utility: Tensor, rows: Tensor, valid: Tensor, groups: Tensor, at_most: Tensor, k: int) -> Tensor:
    return _here(utility, rows, valid, groups, at_most, k)


@_operation.register_fake
def _(utility: Tensor, rows: Tensor, valid: Tensor, groups: Tensor, at_most: Tensor, k: int) -> Tensor:
    return rows.new_empty((utility.shape[0], k))


def reference(utility: Tensor, rows: Tensor, valid: Tensor, groups: Tensor, at_most: Tensor, k: int) -> Tensor:
    """The same of tensors on any device: the order by torch, the groups one candidate after another in Python."""
    order, can_win = _falling(utility, rows, valid)
    order = order.masked_fill(~can_win, -1)
    if groups.shape[1]:
        won = [_greedy(o, g, at_most.tolist(), k) for o, g in zip(order.tolist(), groups.tolist(), strict=True)]
        return torch.tensor(won, dtype=torch.int64, device=order.device).reshape(len(order), k)
    return _first(order, k)


def by_triton(utility: Tensor, rows: Tensor, valid: Tensor, groups: Tensor, at_most: Tensor, k: int) -> Tensor:
    """The same with the groups walked by a Triton kernel: on a GPU, or anywhere in Triton's interpreter."""
    _check(utility, rows, valid, groups, at_most, k)
    order, can_win = _falling(utility, rows, valid)
    if not groups.shape[1]:
        return _first(order.masked_fill(~can_win, -1), k)
    from prerank.kernels.triton.greedy import walk_down  # where there is no GPU there need be no triton

    return walk_down(order, can_win.sum(1), groups, at_most, k)


def _falling(utility: Tensor, rows: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """The positions of all candidates, best first, and whether each of them can win: those who can are in front."""
    can_win = valid & utility.isfinite()
    # stable sorts, the last key first: by row, then by falling utility, minus infinity for who cannot win
    order = rows.argsort(dim=1, stable=True)
    # + 0.0 as a sort by bits would put -0.0 below 0.0
    worth = (utility + 0.0).masked_fill(~can_win, -torch.inf)
    order = order.gather(1, worth.gather(1, order).argsort(dim=1, descending=True, stable=True))
    return order, can_win.gather(1, order)


def _first(order: Tensor, k: int) -> Tensor:
    kept = order[:, :k]
    return torch.nn.functional.pad(kept, (0, k - kept.shape[1]), value=-1)


def _greedy(order: list[int], groups: list[list[int]], at_most: list[int], k: int) -> list[int]:
    held: list[Counter[int]] = [Counter() for _ in groups]
    won: list[int] = []
    for position in order:
        if position < 0 or len(won) == k:
            break
        own = [(count, codes[position], most) for count, codes, most in zip(held, groups, at_most, strict=True)]
        if all(group < 0 or count[group] < most for count, group, most in own):
            won.append(position)
            for count, group, _ in own:
                count[group] += 1
    return won + [-1] * (k - len(won))


def _native(utility: Tensor, rows: Tensor, valid: Tensor, groups: Tensor, at_most: Tensor, k: int) -> Tensor:
    library = native.library()
    assert library is not None
    (num_requests, num), num_rules = utility.shape, groups.shape[1]
    utility, rows, valid, at_most = utility.contiguous(), rows.contiguous(), valid.contiguous(), at_most.contiguous()
    positions = torch.empty((num_requests, k), dtype=torch.int64)
    request_step, rule_step, candidate_step = groups.stride()
    call = library.prerank_greedy_top_k
    call.restype = None
    read, written = num_requests * num * (4 + 8 + 1), num_requests * k * 8  # utility, rows, valid; positions
    with ranges.kernel("native greedy", lambda: Work(num_bytes=read + written)):
        call(
            native.pointer(utility, torch.float32, num_requests, num),
            native.pointer(rows, torch.int64, num_requests, num),
            native.pointer(valid, torch.bool, num_requests, num),
            ctypes.c_void_p(groups.data_ptr()),
            native.pointer(at_most, torch.int64, num_rules),
            *map(ctypes.c_int64, (num_requests, num, num_rules, request_step, rule_step, candidate_step, k)),
            native.pointer(positions, torch.int64, num_requests, k),
        )
    return positions


def _check(utility: Tensor, rows: Tensor, valid: Tensor, groups: Tensor, at_most: Tensor, k: int) -> None:
    expected = {
        "utility": (utility, torch.float32, "BN"),
        "rows": (rows, torch.int64, "BN"),
        "valid": (valid, torch.bool, "BN"),
        "groups": (groups, torch.int32, "BGN"),
        "at_most": (at_most, torch.int64, "G"),
    }
    check_shapes("greedy_top_k", expected)
    if k < 0:
        raise ValueError(f"greedy_top_k: expected k of 0 or more, got {k}")
    assert utility.shape[1] < _MOST, "the native positions are of 32 bits"
