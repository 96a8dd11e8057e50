"""A reserve of their own for items of low quality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self

import pyarrow as pa
import torch
from torch import Tensor

from prerank.business.rule import Rule, item_numbers
from prerank.config import LowQuality as Options
from prerank.config import Rules


class LowQuality(Rule):
    """Who may win: an item whose quality is below `below` only with a utility of at least reserve_micros.

    quality float32 [num_rows], NaN where it is not known, which is not low; below and reserve_micros float32 [].
    """

    why: ClassVar[str] = "of low quality and worth too little"
    quality: Tensor
    below: Tensor
    reserve_micros: Tensor

    def __init__(self, options: Options, num_rows: int) -> None:
        super().__init__()
        self.column = options.column
        self.register_buffer("quality", torch.full((num_rows,), torch.nan))
        self.register_buffer("below", torch.tensor(options.below))
        self.register_buffer("reserve_micros", torch.tensor(options.reserve_micros))

    @classmethod
    def build(cls, tasks: Sequence[str], rules: Rules, num_rows: int) -> Self | None:
        """As [rules] low_quality says it."""
        return None if rules.low_quality is None else cls(rules.low_quality, num_rows)

    def may_win(self, probs: Tensor, utility: Tensor, rows: Tensor) -> Tensor:
        """Utility float32 [B, N] and rows int64 [B, N] -> bool [B, N]."""
        is_low = self.quality[rows] < self.below
        return ~is_low | (utility >= self.reserve_micros)

    def put(self, rows: Tensor, items: pa.Table) -> None:
        """The quality of these items. Raises DataError where it is no number."""
        self.quality[rows] = item_numbers(items, self.column, "rules.low_quality.column").float()
