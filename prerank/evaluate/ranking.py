"""A ranker's probabilities on later days' impressions, beside the floor of always predicting the training rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from prerank.config import Config
from prerank.metrics.classification import (
    auc,
    calibration_ratio,
    expected_calibration_error,
    log_loss,
    normalised_entropy,
)
from prerank.models.ranker import Ranker
from prerank.train.prepare import Prepared
from prerank.train.ranking import Impressions
from prerank.types import Array

NUM_BINS = 10


@dataclass(frozen=True, slots=True)
class RankingQuality:
    """Per task: auc, log_loss, normalised_entropy, calibration_ratio, calibration_error (deciles), and the floor's
    item_rate_auc (each item's smoothed training rate) and rate_log_loss (the training rate for all)."""

    first_day: str
    num_impressions: int
    tasks: Mapping[str, Mapping[str, float]]


def evaluate_ranking(
    ranker: Ranker, prepared: Prepared, config: Config, days: Sequence[str], within: Array | None = None
) -> RankingQuality:
    """Every task's numbers on the impressions of ISO `days`, or those of them marked in `within` bool [E].

    Raises DataError where a task has no positive, or nothing but positives, in those days.
    """
    wanted = prepared.of_days(days)
    impressions = Impressions(prepared, config, np.flatnonzero(wanted if within is None else wanted & within))
    probs = impressions.predict(ranker)
    labels = impressions.labels.numpy()
    trained_on = prepared.of_days(config.data.days("train"))
    found = {}
    for number, (task, options) in enumerate(config.tasks.items()):
        label, prob = labels[:, number], probs[:, number]
        before = prepared.happened(options.label)[trained_on]
        item_rate = item_rates(before, prepared.events["item"][trained_on], len(prepared.item_ids))
        found[task] = {
            "auc": auc(label, prob),
            "log_loss": log_loss(label, prob),
            "normalised_entropy": normalised_entropy(label, prob),
            "calibration_ratio": calibration_ratio(label, prob),
            "calibration_error": expected_calibration_error(label, prob, NUM_BINS),
            "item_rate_auc": auc(label, item_rate[prepared.events["item"][impressions.events]]),
            "rate_log_loss": log_loss(label, np.full(len(label), before.mean())),
        }
    rounded = {task: {name: round(value, 6) for name, value in numbers.items()} for task, numbers in found.items()}
    return RankingQuality(days[0], len(impressions.events), rounded)


def item_rates(happened: Array, item: Array, num_items: int, prior: float = 20.0) -> Array:
    """Each item's rate, drawn towards the mean by `prior` impressions -> float64 [I].

    happened bool [E] and item int [E], below num_items: whose events these are.
    """
    shown = np.bincount(item, minlength=num_items)
    hits = np.bincount(item, weights=happened, minlength=num_items)
    rates: Array = (hits + prior * happened.mean()) / (shown + prior)
    return rates
