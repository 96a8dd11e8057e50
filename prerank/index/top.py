"""The items with the largest numbers of a column: the popular, the recent, whatever a column can say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from prerank.config import Config, GeneratorConfig
from prerank.errors import BundleError, DataError
from prerank.index.generator import Generator, RowsOf
from prerank.types import Features

_SPARE = 64
"""How many times the quota is kept: those who may not see most items still find some."""


class Top(Generator):
    """rows int64 [M] and numbers float64 [M] of the items with the largest numbers, falling; ties by smaller row."""

    rows: Tensor
    numbers: Tensor

    def __init__(self, options: GeneratorConfig, rows: Tensor, numbers: Tensor) -> None:
        super().__init__()
        self._by, self._most = options.by, _SPARE * options.quota
        self.register_buffer("rows", rows)
        self.register_buffer("numbers", numbers)

    @classmethod
    def build(cls, options: GeneratorConfig, config: Config, features: Features, raw: pa.Table, num_rows: int) -> Self:
        """See `Generator.build`; an item whose number is null is found by nobody here."""
        numbers = _numbers(raw, options.by)
        return cls(options, *_best(torch.arange(len(numbers)), numbers, _SPARE * options.quota))

    @classmethod
    def restore(cls, options: GeneratorConfig, config: Config, tensors: Mapping[str, Tensor], num_rows: int) -> Self:
        """See `Generator.restore`."""
        said = {name: (t.dtype, t.dim()) for name, t in tensors.items()}
        if said != {"rows": (torch.int64, 1), "numbers": (torch.float64, 1)} or not _are_rows(
            tensors["rows"], num_rows
        ):
            raise BundleError(f"generator {options.by!r}: expected rows int64 and numbers float64 [M], found {said}")
        return cls(options, tensors["rows"], tensors["numbers"])

    def find(self, user: Features, quota: int, rows_of: RowsOf) -> Tensor:
        """All that are kept, whoever asks."""
        return self.rows

    def put(self, rows: Tensor, features: Features, raw: pa.Table) -> None:
        """See `Generator.put`."""
        stay = ~torch.isin(self.rows, rows)
        numbers = torch.cat([self.numbers[stay], _numbers(raw, self._by)])
        self.rows, self.numbers = _best(torch.cat([self.rows[stay], rows]), numbers, self._most)


def _best(rows: Tensor, numbers: Tensor, most: int) -> tuple[Tensor, Tensor]:
    known = ~numbers.isnan()
    rows, numbers = rows[known], numbers[known]
    order = numbers.argsort(descending=True, stable=True)[:most]
    return rows[order], numbers[order]


def _numbers(raw: pa.Table, column: str) -> Tensor:
    """float64 [n], NaN where there is none."""
    if column not in raw.column_names:
        raise DataError(f"generators: expected the items' column {column!r}, found {raw.column_names}")
    found = raw.column(column)
    kind = found.type
    if pa.types.is_timestamp(kind) or pa.types.is_date64(kind):
        found = found.cast(pa.int64())
    elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)):
        raise DataError(f"generators: expected numbers or times in the items' column {column!r}, found {kind}")
    return torch.from_numpy(np.array(pc.fill_null(found.cast(pa.float64()), np.nan).to_numpy()))


def _are_rows(rows: Tensor, num_rows: int) -> bool:
    return not len(rows) or bool(rows.min() >= 0 and rows.max() < num_rows)
