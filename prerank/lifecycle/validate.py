"""The gates a version must hold before it may serve: each a bound, what was measured, and whether it holds.

Measured on the validate days with the published files, not with the models still in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from prerank.bundle.load import Bundle, load
from prerank.bundle.registry import Gate, Registry
from prerank.config import Bound, Config
from prerank.errors import BundleError
from prerank.evaluate.ranking import RankingQuality, evaluate_ranking
from prerank.evaluate.retrieval import RetrievalQuality, evaluate_retrieval
from prerank.train.prepare import Prepared

MOST_QUESTIONS = 5_000


def validate(home: Path, version: str, prepared: Prepared) -> list[Gate]:
    """Every gate of the version's own funnel file, measured and written to its validation.json.

    A version that cannot be loaded fails `golden` and is measured no further.
    """
    registry = Registry(home)
    path = registry.path(version)
    try:
        bundle = load(path)
    except BundleError as error:
        gates = [Gate("golden", f"at least 1 ({error})", 0.0, False)]
    else:
        measured = Measured(bundle, prepared)
        gates = [_gate(name, bound, MEASURES[name](measured)) for name, bound in bundle.config.validate.items()]
    registry.write_validation(version, gates)
    return gates


@dataclass(frozen=True)  # no slots: what is measured is kept after the first gate that asks
class Measured:
    """One loaded version on the validate days; each quality is measured once, when first asked for."""

    bundle: Bundle
    prepared: Prepared

    @property
    def config(self) -> Config:
        """The version's own funnel file."""
        return self.bundle.config

    @cached_property
    def retrieval(self) -> RetrievalQuality:
        """Recall of the published towers."""
        days = self.config.data.days("validate")
        return evaluate_retrieval(self.bundle.towers, self.prepared, self.config, days, ("popularity",), MOST_QUESTIONS)

    @cached_property
    def ranking(self) -> RankingQuality:
        """Errors of the published ranker."""
        return evaluate_ranking(
            self.bundle.scorer.ranker, self.prepared, self.config, self.config.data.days("validate")
        )


MEASURES: Mapping[str, Callable[[Measured], float]] = {
    "retrieval_recall": lambda m: m.retrieval.at("two towers", 100),
    "recall_over_popularity": lambda m: _ratio(m.retrieval),
    "normalised_entropy": lambda m: max(task["normalised_entropy"] for task in m.ranking.tasks.values()),
    "calibration_error": lambda m: max(task["calibration_error"] for task in m.ranking.tasks.values()),
    "golden": lambda _: 1.0,  # `load` has just reproduced every golden answer, or there would be no bundle
}


def _ratio(quality: RetrievalQuality) -> float:
    floor = quality.at("popularity", 100)
    return quality.at("two towers", 100) / floor if floor else float("inf")


def _gate(name: str, bound: Bound, measured: float) -> Gate:
    lowest = bound.at_least is None or measured >= bound.at_least
    highest = bound.at_most is None or measured <= bound.at_most
    words = [f"at least {bound.at_least:g}" if bound.at_least is not None else ""]
    words += [f"at most {bound.at_most:g}" if bound.at_most is not None else ""]
    return Gate(name, ", ".join(w for w in words if w), measured, lowest and highest)
