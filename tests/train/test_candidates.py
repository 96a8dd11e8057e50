"""Candidates are what the towers would have returned at that moment; their probabilities are the ranker's own."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from prerank.errors import DataError
from prerank.models.rankers import RANKERS, build_ranker
from prerank.train.candidates import candidate_probs, one_event_a_user, retrieve_candidates
from prerank.train.examples import UserExamples, item_tensors
from prerank.train.ranking import Impressions
from prerank.train.retrieval import ItemPopularity


@pytest.fixture(scope="module")
def events(world, trained):
    """Of both evaluated days, so that popularity is not one table."""
    days = [*world.config.data.days("validate"), *world.config.data.days("test")]
    return np.flatnonzero(trained.prepared.of_days(days))[::29][:40]


def similarities(world, trained, events) -> np.ndarray:
    """Every item's with every event's user, one event at a time."""
    prepared, towers = trained.prepared, trained.towers
    users, popularity = UserExamples(prepared, world.config.features), ItemPopularity(prepared, world.config)
    found = []
    with torch.inference_mode():
        for event in events:
            day = popularity.table[popularity.place(prepared.events["day"][[event]])[0]]
            item = towers.item_side(item_tensors(prepared), day)
            found.append((towers.user_side(users.at(np.array([event]))) @ item.T)[0].numpy())
    return np.stack(found)


def test_candidates_are_the_most_similar_at_the_events_moment_and_day(world, trained, events):
    got = retrieve_candidates(trained.towers, trained.prepared, world.config, events, keep=30)
    assert (got.rows.shape, got.rows.dtype, got.valid.all()) == ((len(events), 30), np.int32, True)
    assert len(np.unique(trained.prepared.events["day"][events])) > 1
    exact = similarities(world, trained, events)
    picked = np.take_along_axis(exact, got.rows.astype(int), axis=1)
    np.testing.assert_allclose(picked, -np.sort(-exact, axis=1)[:, :30], atol=1e-5)


def test_an_events_own_item_can_be_left_out_and_nothing_else_is(world, trained, events):
    config, prepared, towers = world.config, trained.prepared, trained.towers
    num_items = len(prepared.item_ids)
    whole = retrieve_candidates(towers, prepared, config, events, keep=num_items)
    without = retrieve_candidates(towers, prepared, config, events, keep=num_items, leave_out_own=True)
    own = prepared.events["item"][events]
    for q, item in enumerate(own):
        assert without.rows[q, :-1].tolist() == [row for row in whole.rows[q].tolist() if row != item]
    assert (without.rows[:, -1] == -1).all()
    assert without.valid.sum() == without.valid.size - len(events)
    few = retrieve_candidates(towers, prepared, config, events, keep=20, leave_out_own=True)
    np.testing.assert_array_equal(few.rows, without.rows[:, :20])
    assert few.valid.all()


def test_users_are_looked_at_some_at_a_time_with_the_same_answer(world, trained, events, monkeypatch):
    whole = retrieve_candidates(trained.towers, trained.prepared, world.config, events, keep=10)
    monkeypatch.setattr("prerank.train.candidates._USERS_AT_ONCE", 7)
    monkeypatch.setattr("prerank.train.candidates._ITEMS_AT_ONCE", 60)
    parts = retrieve_candidates(trained.towers, trained.prepared, world.config, events, keep=10)
    assert (whole.rows == parts.rows).mean() > 0.99  # rounding differs with the width of a product


def test_candidates_see_nothing_of_their_moment_and_later(world, trained, events):
    prepared = trained.prepared
    first = events[:1]
    time_ms = int(prepared.events["time_ms"][first][0])
    changed = {name: np.array(column) for name, column in prepared.events.items()}
    late = (changed["time_ms"] >= time_ms) & (np.arange(len(changed["day"])) != first[0])
    changed["item"][late], changed["flags"][late] = 0, 1
    before, after = (
        retrieve_candidates(trained.towers, one, world.config, first, keep=50).rows
        for one in (prepared, replace(prepared, events=changed))
    )
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("model", RANKERS)
def test_probabilities_of_a_shown_item_are_those_of_its_impression_for_every_ranker(world, trained, events, model):
    prepared = trained.prepared
    config = replace(world.config, ranker=replace(world.config.ranker, model=model))
    torch.manual_seed(0)
    ranker = build_ranker(config, prepared.transforms.sizes())
    ranker.eval()
    impressions = Impressions(prepared, config, events)
    own = prepared.events["item"][events][:, None].astype(np.int32)
    user = UserExamples(prepared, config.features).at(events)
    probs = candidate_probs(ranker, user, item_tensors(prepared), own)
    assert (probs.shape, probs.dtype) == ((len(events), 1, len(config.tasks)), np.float32)
    np.testing.assert_allclose(probs[:, 0], impressions.predict(ranker), atol=1e-6)


def test_probabilities_do_not_depend_on_how_many_are_made_at_once_or_on_their_company(
    world, trained, events, monkeypatch
):
    prepared = trained.prepared
    rows = np.random.default_rng(0).integers(0, len(prepared.item_ids), (len(events), 12)).astype(np.int32)
    rows[3, 5] = -1
    user, items = UserExamples(prepared, world.config.features).at(events), item_tensors(prepared)
    together = candidate_probs(trained.ranker, user, items, rows)
    monkeypatch.setattr("prerank.train.candidates._GATHERED_BYTES", 1)
    monkeypatch.setattr("prerank.train.candidates._ITEMS_AT_ONCE", 64)
    alone = candidate_probs(trained.ranker, user, items, rows)
    shuffled = candidate_probs(trained.ranker, user, items, rows[:, ::-1])[:, ::-1]
    valid = rows >= 0
    np.testing.assert_allclose(alone[valid], together[valid], atol=1e-6)
    np.testing.assert_allclose(shuffled[valid], together[valid], atol=1e-6)


def test_one_event_a_user_is_its_first_of_the_days_and_some_users_are_drawn_by_the_seed(world, trained):
    prepared, days = trained.prepared, world.config.data.days("test")
    every = one_event_a_user(prepared, days, most=10**6, seed=1)
    log = prepared.events
    in_days = np.flatnonzero(prepared.of_days(days))
    assert log["user"][every].tolist() == np.unique(log["user"][in_days]).tolist()
    for event in every[:20]:
        mine = in_days[log["user"][in_days] == log["user"][event]]
        assert log["time_ms"][event] == log["time_ms"][mine].min()
    few = one_event_a_user(prepared, days, most=9, seed=1)
    assert len(few) == 9
    assert set(few) <= set(every)
    np.testing.assert_array_equal(few, one_event_a_user(prepared, days, most=9, seed=1))


def test_days_without_events_are_refused(trained):
    with pytest.raises(DataError, match=r"2031-01-01\.\.2031-01-01: expected logged events there to retrieve for"):
        one_event_a_user(trained.prepared, ["2031-01-01"], most=5, seed=0)
