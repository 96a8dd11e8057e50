"""Recall answers the question it says, floors included, in worlds small enough to do by hand."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from prerank.errors import DataError
from prerank.evaluate.ranking import evaluate_ranking
from prerank.evaluate.retrieval import (
    EASE_LAMBDA,
    Questions,
    day_start_ms,
    ease_score,
    evaluate_retrieval,
    popularity_score,
    recalls,
    tower_score,
)
from prerank.types import day_number


def pairs_of(prepared, mask):
    return {(int(u), int(i)) for u, i in zip(prepared.events["user"][mask], prepared.events["item"][mask], strict=True)}


def test_questions_ask_for_what_is_new_in_the_days(world, trained):
    prepared, config = trained.prepared, world.config
    days = config.data.days("test")
    questions = Questions.of(prepared, config, days)
    clicked = prepared.happened("is_click")
    start = day_start_ms(days[0], "UTC")
    before = pairs_of(prepared, clicked & (prepared.events["time_ms"] < start))
    wanted = pairs_of(prepared, clicked & prepared.of_days(days)) - before
    asked = {(int(questions.user[q]), int(i)) for q, i in questions.relevant}
    assert asked == wanted
    assert {(int(questions.user[q]), int(i)) for q, i in questions.seen} == {
        pair for pair in before if pair[0] in set(questions.user.tolist())
    }
    first = questions.event
    assert (prepared.events["user"][first] == questions.user).all()
    assert prepared.of_days(days)[first].all()


def test_recall_leaves_out_what_was_seen_and_is_averaged_over_users(world, trained):
    prepared, config = trained.prepared, world.config
    questions = Questions.of(prepared, config, config.data.days("test"))
    num_items = len(prepared.item_ids)
    oracle = torch.zeros(len(questions), num_items)
    oracle[questions.relevant[:, 0], questions.relevant[:, 1]] = 1.0
    oracle[questions.seen[:, 0], questions.seen[:, 1]] = 2.0
    found = recalls(questions, lambda chosen: oracle[chosen], num_items, ks=(num_items // 2, num_items))
    assert (found == 1.0).all()
    worst = recalls(questions, lambda chosen: -oracle[chosen], num_items, ks=(1,))
    assert worst.max() == 0.0


def test_popularity_is_the_count_since_training_began(world, trained):
    prepared, config = trained.prepared, world.config
    questions = Questions.of(prepared, config, config.data.days("test"))
    log = prepared.events
    days = (log["day"] >= day_number(config.data.train[0])) & (log["day"] < day_number(config.data.test[0]))
    counts = np.bincount(log["item"][days & prepared.happened("is_click")], minlength=len(prepared.item_ids))
    np.testing.assert_array_equal(popularity_score(prepared, config, questions)(np.arange(2))[1], counts)


def test_ease_equals_its_formula_in_numpy(world, trained):
    prepared, config = trained.prepared, world.config
    questions = Questions.of(prepared, config, config.data.days("test"))
    clicked = prepared.happened("is_click") & (prepared.events["time_ms"] < questions.start_ms)
    x = np.zeros((len(prepared.user_ids), len(prepared.item_ids)))
    x[prepared.events["user"][clicked], prepared.events["item"][clicked]] = 1.0
    inverse = np.linalg.inv(x.T @ x + EASE_LAMBDA * np.eye(x.shape[1]))
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0.0)
    expected = x[questions.user] @ weights
    score = ease_score(prepared, config, questions)
    np.testing.assert_allclose(score(np.arange(len(questions))), expected, atol=2e-5)


def test_ease_steps_aside_where_the_catalogue_is_too_large(world, trained, monkeypatch):
    monkeypatch.setattr("prerank.evaluate.retrieval.EASE_MOST_ITEMS", 10)
    days = world.config.data.days("test")
    measured = evaluate_retrieval(trained.towers, trained.prepared, world.config, days, ("popularity", "EASE"))
    assert set(measured.recall) == {"two towers", "popularity"}


def test_evaluation_sees_nothing_of_the_days_it_measures(world, trained):
    """Scores are the same when every event of the measured days and later is another one."""
    prepared, config = trained.prepared, world.config
    questions = Questions.of(prepared, config, config.data.days("test"))
    late = prepared.events["time_ms"] >= questions.start_ms
    events = {name: np.array(column) for name, column in prepared.events.items()}
    events["item"][late] = 0
    events["flags"][late] = 1
    changed = replace(prepared, events=events)
    chosen = np.arange(min(40, len(questions)))
    for score in (partial(tower_score, trained.towers), popularity_score, ease_score):
        before, after = score(prepared, config, questions), score(changed, config, questions)
        with torch.inference_mode():
            assert torch.equal(before(chosen), after(chosen)), score


def test_no_question_is_an_error_with_the_days(world, trained):
    with pytest.raises(DataError, match=r"2031-01-01\.\.2031-01-01: no user has a new is_click there"):
        Questions.of(trained.prepared, world.config, ["2031-01-01"])


def test_a_day_begins_at_local_midnight():
    assert day_start_ms("2022-05-04", "Asia/Shanghai") == 1651593600000


def test_some_questions_are_drawn_by_the_seed(world, trained):
    days = world.config.data.days("test")
    few = [Questions.of(trained.prepared, world.config, days, most=5).user.tolist() for _ in range(2)]
    assert few[0] == few[1]
    assert len(few[0]) == 5


def test_ranking_numbers_are_those_of_the_metrics_on_the_days(world, trained):
    measured = evaluate_ranking(trained.ranker, trained.prepared, world.config, world.config.data.days("test"))
    click = measured.tasks["click"]
    assert measured.num_impressions == int(trained.prepared.of_days(world.config.data.days("test")).sum())
    assert 0 < click["log_loss"] < 1
    rate = trained.prepared.happened("is_click")[trained.prepared.of_days(world.config.data.days("train"))].mean()
    label = trained.prepared.happened("is_click")[trained.prepared.of_days(world.config.data.days("test"))]
    expected = -(label * np.log(rate) + (1 - label) * np.log(1 - rate)).mean()
    assert click["rate_log_loss"] == pytest.approx(expected, abs=1e-5)
