"""Probabilities and bids to what one impression is expected to be worth, and what it must be worth to win."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from prerank.config import Rules, UtilityTerm
from prerank.types import Features


class Utility(nn.Module):
    """utility = the sum over terms of prob[task] x worth, in micros per impression.

    `tasks` are the ranker's, in its order. A term's worth is the name of an item `value` feature, or a constant; a task
    in `given` is one that happens only after others, and its probability is multiplied by theirs. The factors of the
    terms, 1 before a feature, are a weight like any other: they are in the state_dict.
    """

    constants: Tensor

    def __init__(
        self,
        tasks: Sequence[str],
        terms: Mapping[str, str | float],
        given: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        super().__init__()
        given = given or {}
        assert terms
        assert set(terms) <= set(tasks), "the configuration has checked these names"
        self.places = [[list(tasks).index(name) for name in (task, *given.get(task, ()))] for task in terms]
        self.names = [worth if isinstance(worth, str) else None for worth in terms.values()]
        constants = [1.0 if isinstance(worth, str) else float(worth) for worth in terms.values()]
        self.register_buffer("constants", torch.tensor(constants, dtype=torch.float32))

    @classmethod
    def build(cls, tasks: Sequence[str], terms: Mapping[str, UtilityTerm]) -> Self:
        """As [utility] says it."""
        worths = {task: term.value for task, term in terms.items()}
        return cls(tasks, worths, {task: term.given for task, term in terms.items()})

    @property
    def values(self) -> tuple[str, ...]:
        """The item features read, each once."""
        return tuple(dict.fromkeys(name for name in self.names if name is not None))

    def forward(self, probs: Tensor, values: Features) -> Tensor:
        """probs [B, N, T] and each of `values` [B, N] -> float32 [B, N]."""
        total = torch.zeros(probs.shape[:-1], dtype=torch.float32, device=probs.device)
        for n, (places, name) in enumerate(zip(self.places, self.names, strict=True)):
            worth = self.constants[n] if name is None else self.constants[n] * values[name].float()
            prob = probs[..., places[0]].float()
            for place in places[1:]:
                prob = prob * probs[..., place].float()
            total = total + prob * worth
        return total


class Reserve(nn.Module):
    """Who may win: a utility of at least reserve_micros, float32 [], and each task's probability at least its floor.

    floors float32 [F] are those of the tasks in `rules.floor`. Both are in the state_dict; no reserve is -infinity.
    """

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
    def build(cls, tasks: Sequence[str], rules: Rules) -> Self | None:
        """As [rules] says it, or None where it asks for nothing."""
        return None if rules == Rules() else cls(tasks, rules)

    def forward(self, probs: Tensor, utility: Tensor) -> Tensor:
        """probs [B, N, T] and utility float32 [B, N] -> bool [B, N]; a NaN is not enough."""
        is_enough = utility >= self.reserve_micros
        for n, place in enumerate(self.places):
            is_enough = is_enough & (probs[..., place].float() >= self.floors[n])
        return is_enough
