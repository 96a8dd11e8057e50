"""What a candidate must bring to win: enough utility, and enough of each probability."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor

from prerank.business.rule import Rule
from prerank.config import Rules


class Reserve(Rule):
    """Who may win: a utility of at least reserve_micros, float32 [], and each task's probability at least its floor.

    floors float32 [F] are those of the tasks in `rules.floor`. Both are in the state_dict; no reserve is -infinity.
    """

    why: ClassVar[str] = "below the reserve or a floor"
    reserve_micros: Tensor
    floors: Tensor

    def __init__(self, tasks: Sequence[str], rules: Rules) -> None:
        super().__init__()
        assert set(rules.floor) <= set(tasks), "the configuration has checked these names"
        self.places = [list(tasks).index(task) for task in rules.floor]
        reserve = -torch.inf if rules.reserve_micros is None else rules.reserve_micros
        self.register_buffer("reserve_micros", torch.tensor(reserve, dtype=torch.float32))
        self.register_buffer("floors", torch.tensor(list(rules.floor.values()), dtype=torch.float32))

    @classmethod
    def build(cls, tasks: Sequence[str], rules: Rules, num_rows: int) -> Self | None:
        """As [rules] says it, or None where it asks for neither."""
        return cls(tasks, rules) if rules.floor or rules.reserve_micros is not None else None

    def may_win(self, probs: Tensor, utility: Tensor, rows: Tensor) -> Tensor:
        """probs [B, N, T] and utility float32 [B, N] -> bool [B, N]; a NaN is not enough."""
        is_enough = utility >= self.reserve_micros
        for n, place in enumerate(self.places):
            is_enough = is_enough & (probs[..., place].float() >= self.floors[n])
        return is_enough
