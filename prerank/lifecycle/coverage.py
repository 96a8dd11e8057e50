"""Which days the log has, and which features it fills: in training, on the newest day, and as they are served."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor

from prerank.config import Config
from prerank.data.calendar import iso_day
from prerank.schema import FeatureSchema, Value
from prerank.train.examples import UserExamples
from prerank.train.items import DailyItems
from prerank.train.prepare import Prepared
from prerank.types import Array, Features, day_number

COVERAGE = "coverage"
"""What a version's manifest calls the share of training impressions on which each feature was filled."""
MOST_EVENTS = 4_096
LEAST = 30
"""A feature that is to be filled on fewer rows than this is not asked about: chance alone would empty it."""


def filled(features: Features, schema: FeatureSchema) -> dict[str, float]:
    """The share of rows on which each feature says something: a known value, a number other than 0 (which a missing
    one is encoded as), a member of a bag or a history that is known, something counted."""
    kinds = {name: kind for _, name, kind in schema}
    return {name: _share(column, kinds.get(name)) for name, column in features.items()}


def _share(column: Tensor, kind: object) -> float:
    if not len(column):
        return 0.0
    if isinstance(kind, Value):
        says = column != kind.missing
    else:
        says = column > 0 if not column.is_floating_point() else column != 0
    return float(says.flatten(1).any(1).float().mean() if says.dim() > 1 else says.float().mean())


def log_coverage(prepared: Prepared, config: Config, events: Array) -> dict[str, float]:
    """The share of logged `events` int64 [B] on which each feature of user, context, item and both is filled."""
    items = DailyItems(prepared, config)
    rows = torch.from_numpy(np.asarray(prepared.events["item"][events], dtype=np.int64))
    found = UserExamples(prepared, config.features).at(events) | items.at(rows, prepared.events["day"][events])
    return filled(found, config.features)


def training_coverage(prepared: Prepared, config: Config) -> dict[str, float]:
    """The same of training impressions, MOST_EVENTS of them drawn with the funnel's seed."""
    rows = np.flatnonzero(prepared.of_days(config.data.days("train")))
    if len(rows) > MOST_EVENTS:
        rows = np.sort(np.random.default_rng(config.seed).choice(rows, MOST_EVENTS, replace=False))
    return log_coverage(prepared, config, rows)


@dataclass(frozen=True, slots=True)
class Coverage:
    """The share of `num_rows` rows, which are of `what`, on which each feature is filled."""

    what: str
    num_rows: int
    shares: Mapping[str, float]


def lowest_coverage(now: Sequence[Coverage], before: Sequence[Coverage]) -> tuple[float, str]:
    """The smallest share of what was filled `before` that is filled `now`, over features, and which it is.

    A feature that only one side has is not compared, nor one of which too few rows are expected; see LEAST.
    """
    worst, about = 1.0, ""
    for here, there in product(now, before):
        for name, share in there.shares.items():
            ours = here.shares.get(name)
            if ours is not None and share * here.num_rows >= LEAST and ours / share < worst:
                worst = ours / share
                about = f"{name} is filled on {ours:.1%} of {here.what}, and was on {share:.1%} of {there.what}"
    return worst, about


def complete_days(prepared: Prepared, first: str, last: str) -> tuple[float, str]:
    """The impressions of the poorest of ISO days `first` to `last`, as a share of the median day's; which it is."""
    start, end = day_number(first), day_number(last)
    day = np.asarray(prepared.events["day"])[np.asarray(prepared.events["logged"])]
    counts = np.bincount(day[(day >= start) & (day <= end)] - start, minlength=end - start + 1)
    median = float(np.median(counts))
    if not median:
        return 0.0, f"most days from {first} to {last} have no impression"
    poorest = int(counts.argmin())
    return float(counts[poorest]) / median, (
        f"{iso_day(start + poorest)} has {int(counts[poorest]):,} impressions, the median day {median:,.0f}"
    )
