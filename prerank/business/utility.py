"""Probabilities and bids to what one impression is expected to be worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from prerank.config import UtilityTerm
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
