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


class Diversity(nn.Module):
    """G rules over I items, in the state_dict: codes int32 [I, G], negative for no group; at_most int64 [G].

    `values` are each rule's distinct values, of which the codes are the places; only `codes_of` reads them.
    Raises BundleError for other shapes or types and for a bound below 1.
    """

    codes: Tensor
    at_most: Tensor

    def __init__(self, codes: Tensor, at_most: Tensor, values: Mapping[str, pa.Array] | None = None) -> None:
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
        self.values = dict(values or {})
        self._places: list[dict[object, int]] = []

    @classmethod
    def build(cls, rules: Mapping[str, DiversityRule], items: pa.Table, slack: int = 0) -> Self:
        """From the raw items, in row order: a rule's groups are the values of the column it is named after.

        A null is no group, and the `slack` rows after the items have none. Raises DataError for a column that is
        missing or whose values are no identities.
        """
        encoded = {name: _encoded(items, name) for name in rules}
        codes = [one.indices.fill_null(-1).to_numpy(zero_copy_only=False) for one in encoded.values()]
        whole = np.full((items.num_rows + slack, len(codes)), -1, np.int32)
        whole[: items.num_rows] = np.stack(codes, axis=1)
        bounds = torch.tensor([rule.at_most for rule in rules.values()], dtype=torch.int64)
        return cls(torch.from_numpy(whole), bounds, {name: one.dictionary for name, one in encoded.items()})

    def codes_of(self, items: pa.Table) -> Tensor:
        """Raw items [n] -> int32 [n, G]; a value that no item had before is a new group.

        Raises DataError as `build`, and for values of another type than those published.
        """
        if not self._places:
            self._places = [{one: at for at, one in enumerate(known.to_pylist())} for known in self.values.values()]
        found = []
        for (name, known), places in zip(self.values.items(), self._places, strict=True):
            if name in items.column_names and pa.types.is_null(items.column(name).type):
                found.append([-1] * items.num_rows)
                continue
            own = _encoded(items, name).dictionary_decode()
            try:
                own = own.cast(known.type)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                raise DataError(
                    f"diversity: expected {known.type} in the items' column {name!r}, found {own.type}"
                ) from None
            found.append([-1 if one is None else places.setdefault(one, len(places)) for one in own.to_pylist()])
        return torch.tensor(found, dtype=torch.int32).reshape(len(found), items.num_rows).T

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


def _encoded(items: pa.Table, name: str) -> pa.DictionaryArray:
    """One code for each value, exactly, in the order of their first rows; null for null."""
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
    return pa.concat_arrays(column.chunks or [pa.array([], kind)]).dictionary_encode()


def _is_identity(kind: pa.DataType) -> bool:
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return bool(text or pa.types.is_integer(kind) or pa.types.is_boolean(kind))


def _said(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}".removeprefix("torch.")
