"""What a rule of [rules] promises: a module that changes what candidates are worth, or says which of them may win."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Self

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from prerank.config import Rules
from prerank.errors import DataError


class Rule(nn.Module, ABC):
    """One rule. It has `build`, `adjust` or `may_win`, and `put` if it keeps anything of the items.

    Its buffers are all it knows: they are stored with a version and come back with it. Loading builds the rule anew and
    fills it, so their shapes and types must follow from what `build` is given; what is of the items is [num_rows, ...]
    and written by `put` alone. A rule sees nothing of the request but what the ranker made of it.

    `why` follows "candidates were" in an answer's notes, of those that the rule kept from winning.
    """

    why: ClassVar[str]

    @classmethod
    @abstractmethod
    def build(cls, tasks: Sequence[str], rules: Rules, num_rows: int) -> Self | None:
        """As [rules] says it, or None where it does not ask for this rule; of the items nothing is known yet.

        `tasks` are the ranker's, in its order. A row that is never put may stay as it is built: no item is in it.
        """

    def adjust(self, probs: Tensor, utility: Tensor, rows: Tensor) -> Tensor:
        """probs [B, N, T], utility float32 [B, N] and rows int64 [B, N] -> the utility that counts, float32 [B, N].

        The utility is what the rules before this one left. What comes out not finite cannot win.
        """
        return utility

    def may_win(self, probs: Tensor, utility: Tensor, rows: Tensor) -> Tensor:
        """The same, with the utility that all rules left -> bool [B, N]."""
        return torch.ones_like(utility, dtype=torch.bool)

    def put(self, rows: Tensor, items: pa.Table) -> None:
        """Keep what the rule reads of the raw `items` [n] as that of rows int64 [n]; other rows stay as they are.

        Where requests are ranked meanwhile, the caller keeps them apart from this. Raises DataError where a column is
        missing or not as it must be, and then nothing was written.
        """


def item_numbers(items: pa.Table, column: str, key: str) -> Tensor:
    """The numbers of a column of the raw items [n], float64 [n], a null as NaN and true as 1.

    Raises DataError naming the `key` that asks for the column, where it is missing or holds anything else.
    """
    where = f"{key}: expected numbers in the items' column {column!r}"
    if column not in items.column_names:
        raise DataError(f"{where}, found the columns {items.column_names}")
    kind = items.schema.field(column).type
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    tests = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_boolean)
    if not any(is_such(plain) for is_such in tests):
        raise DataError(f"{where}, found {kind}")
    given = items.column(column).cast(plain).cast(pa.float64(), safe=False)
    numbers = given.to_numpy()
    wrong = np.flatnonzero(~np.isfinite(numbers) & given.is_valid().to_numpy())
    if len(wrong):
        found = f"{numbers[wrong[0]]} in row {wrong[0]}"
        raise DataError(f"{where}, found {found}; write null where it is not known")
    return torch.from_numpy(np.array(numbers))
