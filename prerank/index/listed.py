"""Items that somebody chose: a list in the funnel file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import pyarrow as pa
import torch
from torch import Tensor

from prerank.config import Config, GeneratorConfig
from prerank.errors import BundleError
from prerank.index.generator import Generator, RowsOf
from prerank.types import Features


class Listed(Generator):
    """item_ids int64 [M], as listed; where they are is asked at every request, for items come and leave."""

    item_ids: Tensor

    def __init__(self, item_ids: Tensor) -> None:
        super().__init__()
        self.register_buffer("item_ids", item_ids)

    @classmethod
    def build(cls, options: GeneratorConfig, config: Config, features: Features, raw: pa.Table, num_rows: int) -> Self:
        """See `Generator.build`."""
        return cls(torch.tensor(options.items, dtype=torch.int64))

    @classmethod
    def restore(cls, options: GeneratorConfig, config: Config, tensors: Mapping[str, Tensor], num_rows: int) -> Self:
        """See `Generator.restore`."""
        if set(tensors) != {"item_ids"} or tensors["item_ids"].tolist() != list(options.items):
            raise BundleError(f"a generator's list: expected {list(options.items)}, found {sorted(tensors)}")
        return cls(tensors["item_ids"])

    def find(self, user: Features, quota: int, rows_of: RowsOf) -> Tensor:
        """Those that are here, in the order of the list."""
        rows = rows_of(self.item_ids)
        return rows[rows >= 0]
