"""Rankers of a trained funnel are judged on its days, beside floors, by segment, and against a teacher."""

from dataclasses import replace

import numpy as np
import pytest

from prerank.errors import ConfigError, DataError
from prerank.evaluate.estimates import Resampling
from prerank.evaluate.judge import ITEM_RATE, TRAINING_RATE, Segments, judge, segment_feature
from prerank.evaluate.ranking import evaluate_ranking
from prerank.evaluate.report import render_report

FEW = Resampling(draws=20)


@pytest.fixture(scope="module")
def told(world, trained):
    days = world.config.data.days("test")
    return judge({"two_tower": trained.ranker}, trained.prepared, world.config, days, towers=trained.towers, how=FEW)


def test_numbers_and_floors_are_those_of_evaluate_ranking(world, trained, told):
    expected = evaluate_ranking(trained.ranker, trained.prepared, world.config, world.config.data.days("test"))
    click = expected.tasks["click"]
    assert told.num_impressions == expected.num_impressions
    mine = told.metrics("two_tower", "winners", "click")
    for metric in ("auc", "log_loss", "normalised_entropy", "calibration_ratio", "calibration_error"):
        assert mine[metric].value == pytest.approx(click[metric], abs=1e-6)
    assert told.metrics(ITEM_RATE, "winners", "click")["auc"].value == pytest.approx(click["item_rate_auc"], abs=1e-6)
    flat = told.metrics(TRAINING_RATE, "winners", "click")
    assert flat["log_loss"].value == pytest.approx(click["rate_log_loss"], abs=1e-6)
    assert flat["auc"].value == 0.5


def test_without_a_teacher_nothing_is_said_of_candidates(told):
    assert (told.has_teacher, told.num_questions) == (False, 0)
    assert "candidates" not in told.about


def test_a_ranker_that_is_its_own_teacher_is_consistent_and_floors_are_less(world, trained):
    days = world.config.data.days("test")
    told = judge(
        {"student": trained.ranker}, trained.prepared, world.config, days,
        towers=trained.towers, teacher=trained.ranker, how=FEW,
    )  # fmt: skip
    assert (told.models, told.num_candidates) == (("teacher", "student", ITEM_RATE, TRAINING_RATE), 100)
    mine = told.metrics("student", "candidates", "click")
    assert (mine["kl"].value, mine["overlap@10"].value, mine["ndcg@10"].value) == (0, 1, 1)
    assert told.metrics(ITEM_RATE, "candidates", "click")["overlap@10"].value < 1
    assert "Survival" in render_report(told)


def test_segments_are_the_context_category_with_few_values_named_as_in_the_log(world, trained, told):
    assert segment_feature(world.config, trained.prepared) == "surface"
    assert told.about["segments"] == "surface"
    assert "surface feed" in told.segments
    rows = sum(told.metrics("two_tower", "winners", "click", s)["auc"].rows for s in told.segments)
    assert rows == told.num_impressions


def test_the_domain_of_the_ranker_comes_before_other_categories(world, trained):
    config = replace(world.config, ranker=replace(world.config.ranker, model="mtmd", domain="hour"))
    assert segment_feature(config, trained.prepared) == "hour"


def test_rare_values_are_one_other_segment_and_profiles_may_be_segments(world, trained):
    prepared, config = trained.prepared, world.config
    events = np.flatnonzero(prepared.of_days(config.data.days("test")))
    hours = Segments.of(prepared, config, "hour", events)
    assert len(hours.names) == 9
    assert hours.names[-1] == "other"
    counts = np.bincount(hours.at(events), minlength=9)
    assert (np.diff(counts[:8]) <= 0).all()
    countries = Segments.of(prepared, config, "country", events)
    user = prepared.events["user"][events]
    for one in np.unique(user)[:20]:
        assert len(np.unique(countries.at(events)[user == one])) == 1


def test_what_is_no_category_of_a_user_or_context_is_refused(world, trained):
    with pytest.raises(ConfigError, match=r"segments: expected a category of \[features.context\] or .user, .*surface"):
        judge({"a": trained.ranker}, trained.prepared, world.config, world.config.data.days("test"), by="clicks")


def test_days_without_impressions_are_refused(world, trained):
    with pytest.raises(DataError, match=r"2031-01-01 to 2031-01-01|2031-01-01\.\.2031-01-01: expected impressions"):
        judge({"a": trained.ranker}, trained.prepared, world.config, ["2031-01-01"])
