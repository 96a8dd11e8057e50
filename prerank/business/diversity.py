"""At most so many of one group among the winners: the group of every item under each rule, and the bounds.

`at_most = 1` on what makes two items the same to whoever looks at them is dedup. What the rules do to an order is
`kernels.greedy`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from prerank.config import DiversityRule
from prerank.errors import BundleError, DataError
from prerank.types import Array


class Diversity(nn.Module):
    """G rules over I items, in the state_dict: codes int32 [I, G], negative for no group; at_most int64 [G].

    Raises BundleError for other shapes or types and for a bound below 1.
    """

    codes: Tensor
    at_most: Tensor

    def __init__(self, codes: Tensor, at_most: Tensor) -> None:
        super().__init__()
        found = codes.dtype, codes.dim(), at_most.dtype, at_most.shape
        if found != (torch.int32, 2, torch.int64, codes.shape[1:]):
            raise BundleError(
                "diversity: expected codes int32 [I, G] and at_most int64 [G], "
                f"found {_said(codes)} and {_said(at_most)}"
            )
        if bool((at_most < 1).any()):
            raise BundleError(f"diversity: expected at_most of 1 or more, found {at_most.tolist()}")
        self.register_buffer("codes", codes)
        self.register_buffer("at_most", at_most)

    @classmethod
    def build(cls, rules: Mapping[str, DiversityRule], items: pa.Table) -> Self:
        """From the raw items [I], in row order: a rule's groups are the values of the column it is named after.

        A null is no group. Raises DataError for a column that is missing or whose values are no identities.
        """
        codes = np.stack([_codes(items, name) for name in rules], axis=1)
        bounds = torch.tensor([rule.at_most for rule in rules.values()], dtype=torch.int64)
        return cls(torch.from_numpy(codes), bounds)

    def forward(self, rows: Tensor) -> Tensor:
        """Rows int64 [B, N] -> the group of each under each rule, int32 [B, G, N]."""
        codes = self.codes.index_select(0, rows.reshape(-1))
        return codes.reshape(*rows.shape, codes.shape[1]).permute(0, 2, 1)


def groups_of(diversity: Diversity | None, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The groups int32 [B, G, N] of rows int64 [B, N] under each rule and its bound int64 [G], as greedy reads them.

    No `diversity` is no rule, G = 0.
    """
    if diversity is not None:
        return diversity(rows), diversity.at_most
    return rows.new_zeros((rows.shape[0], 0, rows.shape[1]), dtype=torch.int32), rows.new_zeros(0)


def _codes(items: pa.Table, name: str) -> Array:
    """int32 [I]: one number for each value, exactly, in the order of their first rows; -1 for null."""
    if name not in items.column_names:
        raise DataError(f"diversity: expected the items' column {name!r}, found {items.column_names}")
    column = items.column(name)
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not _is_identity(kind):
        raise DataError(
            f"diversity: expected integers, strings or booleans in the items' column {name!r}, found {kind}"
        )
    if column.type != kind:
        column = column.cast(kind)
    encoded = pa.concat_arrays(column.chunks or [pa.array([], kind)]).dictionary_encode()
    return np.asarray(encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False), dtype=np.int32)


def _is_identity(kind: pa.DataType) -> bool:
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return bool(text or pa.types.is_integer(kind) or pa.types.is_boolean(kind))


def _said(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}".removeprefix("torch.")
