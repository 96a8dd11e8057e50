"""The k best in order, at most so many of one group: greedy, exact, and the same on every device.

Candidates by falling utility; one is skipped where a rule's group of its is full. Several rules at once are not their
masks one after the other: a candidate that one rule turns away leaves its place in the groups of the others.
"""

from __future__ import annotations

import ctypes
from collections import Counter

import torch
from torch import Tensor

from prerank.kernels import native

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
    # stable sorts, the last key first: who cannot win is behind, then by falling utility, then by row
    can_win = valid & utility.isfinite()
    order = rows.argsort(dim=1, stable=True)
    order = order.gather(1, (utility + 0.0).gather(1, order).argsort(dim=1, descending=True, stable=True))
    order = order.gather(1, can_win.gather(1, order).to(torch.int8).argsort(dim=1, descending=True, stable=True))
    order = order.masked_fill(~can_win.gather(1, order), -1)
    if groups.shape[1]:
        won = [_greedy(o, g, at_most.tolist(), k) for o, g in zip(order.tolist(), groups.tolist(), strict=True)]
        return torch.tensor(won, dtype=torch.int64, device=order.device).reshape(len(order), k)
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
    """Native code believes what it is told."""
    expected = {
        "utility": (utility, torch.float32, ("B", "N")),
        "rows": (rows, torch.int64, ("B", "N")),
        "valid": (valid, torch.bool, ("B", "N")),
        "groups": (groups, torch.int32, ("B", "G", "N")),
        "at_most": (at_most, torch.int64, ("G",)),
    }
    sizes: dict[str, int] = {}
    for name, (tensor, dtype, letters) in expected.items():
        fits = tensor.dtype == dtype and tensor.dim() == len(letters) and tensor.device == utility.device
        if not fits or any(sizes.setdefault(a, size) != size for a, size in zip(letters, tensor.shape, strict=True)):
            wanted = ", ".join(f"{a}={sizes[a]}" if a in sizes else a for a in letters)
            raise ValueError(
                f"greedy_top_k: expected {name} {_name(dtype)} [{wanted}] on {utility.device}, got "
                f"{_name(tensor.dtype)} {list(tensor.shape)} on {tensor.device}"
            )
    if k < 0:
        raise ValueError(f"greedy_top_k: expected k of 0 or more, got {k}")
    assert utility.shape[1] < _MOST, "the native positions are of 32 bits"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
