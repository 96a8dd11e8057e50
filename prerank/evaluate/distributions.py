"""How a model's probabilities are spread, on winners and on candidates, over bins they all share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from prerank.evaluate.consistency import Candidates
from prerank.evaluate.estimates import Where
from prerank.evaluate.winners import Winners
from prerank.types import Array

NUM_BINS = 40
_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class Histogram:
    """Shares of one model's probabilities between edges [K + 1], evenly spaced in log-odds; share [K].

    The outermost bins hold what lies beyond them.
    """

    model: str
    where: Where
    task: str
    edges: tuple[float, ...]
    share: tuple[float, ...]


def histograms(
    on_winners: Mapping[str, Array],
    on_candidates: Mapping[str, Array],
    winners: Winners,
    candidates: Candidates | None,
) -> Iterator[Histogram]:
    """Every model's, by task, on winners (prob [P, T]) and on the valid candidates (prob [Q, N, T])."""
    for number, task in enumerate(winners.tasks):
        told: list[tuple[Where, str, Array]] = [
            ("winners", name, log_odds(prob[:, number])) for name, prob in on_winners.items()
        ]
        if candidates is not None:
            told += [
                ("candidates", name, log_odds(prob[..., number][candidates.valid]))
                for name, prob in on_candidates.items()
            ]
        edges = _edges([one for _, _, one in told])
        for where, name, logits in told:
            counts, _ = np.histogram(logits.clip(edges[0], edges[-1]), edges)
            shares = tuple(float(x) for x in counts / len(logits))
            yield Histogram(name, where, task, tuple(float(x) for x in 1 / (1 + np.exp(-edges))), shares)


def log_odds(prob: Array) -> Array:
    """log(p / (1 - p)) of probabilities kept 1e-6 away from 0 and 1 -> float64 of the same shape."""
    kept = prob.astype(np.float64).clip(_EPS, 1 - _EPS)
    odds: Array = np.log(kept) - np.log1p(-kept)
    return odds


def _edges(logits: list[Array]) -> Array:
    """Around all but each model's outermost thousandths, and at least one wide."""
    low = min(float(np.quantile(one, 0.001)) for one in logits)
    high = max(float(np.quantile(one, 0.999)) for one in logits)
    spare = max(0.0, 1 - (high - low)) / 2
    return np.linspace(low - spare, high + spare, NUM_BINS + 1)
