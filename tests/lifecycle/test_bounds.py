"""A gate holds within every bound, absolute or against live, and says by how much what is measured is not."""

from math import inf, nan
from typing import Any, cast

import numpy as np
import pytest
import torch

from prerank.config import Bound
from prerank.lifecycle import validate as validating
from prerank.lifecycle.coverage import LEAST, Coverage, filled, lowest_coverage
from prerank.schema import Category, FeatureSchema, History, Value


@pytest.mark.parametrize(
    ("bound", "value", "live", "off"),
    [
        (Bound(at_least=0.5), 0.5, None, 0.0),
        (Bound(at_least=0.5), 0.4, None, -0.1),
        (Bound(at_most=0.5), 0.5, None, 0.0),
        (Bound(at_most=0.5), 0.7, None, 0.2),
        (Bound(at_least=0.1, at_most=0.5), 0.3, None, 0.0),
        (Bound(not_below_live_by=0.1), 0.5, 0.6, 0.0),
        (Bound(not_below_live_by=0.1), 0.4, 0.6, -0.1),
        (Bound(not_above_live_by=0.1), 0.8, 0.6, 0.1),
        (Bound(not_above_live_by=0.0), 0.5, 0.6, 0.0),
        (Bound(at_most_of_live=1.5), 3.0, 2.0, 0.0),
        (Bound(at_most_of_live=1.5), 10.0, 2.0, 7.0),
        (Bound(at_least_of_live=0.9), 1.0, 2.0, -0.8),
        (Bound(at_least=0.5, not_below_live_by=0.1), 0.55, 0.9, -0.25),
        (Bound(at_least=0.5, not_below_live_by=0.1), 0.45, 0.2, -0.05),
        (Bound(not_below_live_by=0.1), 0.1, None, 0.0),
        (Bound(at_least=1.0), inf, None, 0.0),
    ],
)
def test_the_nearest_bound_counts(
    monkeypatch: pytest.MonkeyPatch, bound: Bound, value: float, live: float | None, off: float
) -> None:
    gate = judged(monkeypatch, bound, value, live)
    assert gate.off == pytest.approx(off)
    assert gate.holds == (off == 0)
    assert ("nothing is live" in gate.about) == (bound.is_against_live and live is None)


@pytest.mark.parametrize(("value", "live"), [(nan, None), (nan, 1.0), (1.0, nan)])
def test_what_is_no_number_does_not_hold(monkeypatch: pytest.MonkeyPatch, value: float, live: float | None) -> None:
    assert not judged(monkeypatch, Bound(at_most=2.0, not_above_live_by=1.0), value, live).holds


def judged(monkeypatch: pytest.MonkeyPatch, bound: Bound, value: float, live: float | None) -> validating.Gate:
    found = validating.Found(value, live)
    monkeypatch.setattr(validating, "MEASURES", {"latency_ms": lambda both, bound: found})
    return validating._gate(cast(Any, None), "latency_ms", bound)


def test_filled_is_known_counted_or_other_than_missing() -> None:
    item = {"kind": Category(), "bid": Value(missing=-1.0)}
    schema = FeatureSchema({"past": History(of="kind", length=3)}, {}, item)
    features = {
        "kind": torch.tensor([0, 2, 3, 0]),
        "bid": torch.tensor([-1, 0, 5, -1]),
        "past": torch.tensor([[-1, -1, -1], [-1, -1, 4], [-1, 0, 0], [1, 2, 3]]),
    }
    assert filled(features, schema) == {"kind": 0.5, "bid": 0.5, "past": 0.5}
    assert filled({"kind": torch.tensor(np.zeros(0, np.int64))}, schema) == {"kind": 0.0}


def test_the_feature_that_lost_most_is_named_and_rare_ones_are_not_asked_about() -> None:
    before = [Coverage("training", 0, {"a": 0.8, "b": 0.5, "rare": 0.02, "gone": 0.9})]
    now = [Coverage("today", 1000, {"a": 0.4, "b": 0.5, "rare": 0.0, "new": 0.1})]
    assert lowest_coverage(now, before) == (0.5, "a is filled on 40.0% of today, and was on 80.0% of training")
    more = [Coverage("today", 50 * LEAST, {"rare": 0.0})]
    assert lowest_coverage([*now, *more], before)[0] == 0
    assert lowest_coverage(now, []) == (1.0, "")
