"""Winners and candidates whose teacher is right by construction: labels are drawn from its probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prerank.evaluate.compare import Predictions
from prerank.evaluate.consistency import Candidates
from prerank.evaluate.estimates import Resampling
from prerank.evaluate.winners import Winners

TASKS = ("click", "like")
SEGMENTS = ("feed", "search")
FEW = Resampling(draws=60, seed=3)


def sigmoid(logit: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logit))


@dataclass(frozen=True)
class Arrays:
    """Logits of the teacher: winners [P, T], candidates [Q, N, T]."""

    winners: Winners
    candidates: Candidates
    on_winners: np.ndarray
    on_candidates: np.ndarray

    def model(self, noise: float = 0.0, seed: int = 1, scale: float = 1.0) -> Predictions:
        """The teacher's logits, blurred and scaled; 0 and 1 give the teacher itself."""
        rng = np.random.default_rng(seed)
        blurred = [
            sigmoid(scale * (one + noise * rng.normal(size=one.shape))) for one in (self.on_winners, self.on_candidates)
        ]
        return Predictions(TASKS, *blurred)


def arrays(rows: int = 1500, users: int = 120, questions: int = 60, candidates: int = 40, seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    on_winners = rng.normal(size=(rows, 2)) + np.array([0.0, -1.5])
    label = (rng.random(on_winners.shape) < sigmoid(on_winners)).astype(np.float32)
    winners = Winners(TASKS, label, rng.integers(0, users, rows), rng.integers(0, 2, rows), SEGMENTS)
    on_candidates = rng.normal(size=(questions, candidates, 2)) + np.array([0.0, -1.5])
    valid = np.ones((questions, candidates), dtype=bool)
    valid[:, -2:] = False
    asked = Candidates(TASKS, valid, np.arange(questions), rng.integers(0, 2, questions), SEGMENTS)
    return Arrays(winners, asked, on_winners, on_candidates)
