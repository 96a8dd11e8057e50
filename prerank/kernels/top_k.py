"""The k largest with ties broken by the smaller row, exactly: value and row in one integer, ordered as one number.

`topk` alone keeps an arbitrary one of several equal values at the k-th place, another on another device.
"""

from __future__ import annotations

import torch
from torch import Tensor

NONE = torch.iinfo(torch.int64).min
"""The key of what can never be kept: below every other."""

_LOW = 0xFFFFFFFF


def order_keys(values: Tensor, rows: Tensor, valid: Tensor | None) -> Tensor:
    """values float32 [B, N] and rows int64 [B, N] or [N], below 2^32 -> int64 [B, N].

    A larger key is a larger value or, of equal values, a smaller row; 0.0 and -0.0 are equal. NONE where `valid`
    (bool, as rows) is False or the value is not finite. A row given twice has the same key twice.
    """
    # the bits of floats order as integers, once those of the negative ones are turned around
    bits = (values.float() + 0.0).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = (ordered.long() << 32) | (_LOW - rows)
    kept = values.isfinite() if valid is None else values.isfinite() & valid
    return keys.masked_fill_(~kept, NONE)


def value_and_row(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The float32 values and int64 rows that made `keys`, both of its shape; -inf and -1 for NONE."""
    none = keys == NONE
    ordered = (keys >> 32).int()
    values = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return values.masked_fill(none, -torch.inf), (_LOW - (keys & _LOW)).masked_fill_(none, -1)
