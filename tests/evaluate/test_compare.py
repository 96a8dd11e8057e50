"""Models side by side: the better one is said to be better, the order of names is kept, mismatches are refused."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from prerank.errors import DataError, SchemaMismatch
from prerank.evaluate.compare import Predictions, compare
from tests.evaluate.world import FEW, TASKS, arrays


@pytest.fixture(scope="module")
def world():
    return arrays(candidates=150)


@pytest.fixture(scope="module")
def told(world):
    models = {"rough": world.model(noise=1.0), "near": world.model(noise=0.2)}
    return compare(models, world.winners, world.candidates, world.model(), how=FEW, about={"days": "one"})


def test_the_nearer_student_is_better_by_every_measure_and_surely_so(told):
    for one in told.differences:
        assert (one.model, one.against) == ("near", "rough")
    for where, metrics in (("winners", ("kl", "log_loss", "auc")), ("candidates", ("kl", "overlap@10", "overlap@100"))):
        found = next(d for d in told.differences if (d.where, d.task, d.segment) == (where, "click", "all")).metrics
        for metric in metrics:
            low, high = found[metric].low, found[metric].high
            assert high < 0 if metric in ("kl", "log_loss") else low > 0, metric


def test_a_difference_is_that_of_the_two_numbers(told):
    for one in told.differences:
        ours, theirs = (told.metrics(name, one.where, one.task, one.segment) for name in (one.model, one.against))
        for metric, gap in one.metrics.items():
            assert gap.value == pytest.approx(ours[metric].value - theirs[metric].value, abs=1e-12)


def test_the_teacher_is_a_row_of_its_own_before_the_others(told):
    assert told.models == ("teacher", "rough", "near")
    assert told.metrics("teacher", "candidates", "click")["overlap@10"].value == 1
    assert told.metrics("teacher", "winners", "click")["kl"].value == 0
    assert (
        told.metrics("teacher", "winners", "click")["auc"].value
        > told.metrics("rough", "winners", "click")["auc"].value
    )


def test_everything_is_plain_json(told):
    plain = json.loads(json.dumps(asdict(told), allow_nan=False))
    assert plain["about"] == {"days": "one"}
    assert plain["num_impressions"] == 1500
    assert (plain["num_questions"], plain["num_candidates"]) == (60, 150)
    assert {(m["where"], m["task"], m["segment"]) for m in plain["measured"]} == {
        (where, task, segment)
        for where in ("winners", "candidates")
        for task in TASKS
        for segment in ("all", "feed", "search")
    }


def test_histograms_share_out_every_row_over_common_edges(told):
    for task in TASKS:
        mine = [one for one in told.histograms if one.task == task]
        assert {(one.model, one.where) for one in mine} == {
            (m, w) for m in told.models for w in ("winners", "candidates")
        }
        assert len({one.edges for one in mine}) == 1
        for one in mine:
            assert sum(one.share) == pytest.approx(1)


def test_the_same_seed_gives_the_same_comparison(world, told):
    models = {"rough": world.model(noise=1.0), "near": world.model(noise=0.2)}
    assert compare(models, world.winners, world.candidates, world.model(), how=FEW, about={"days": "one"}) == told


def test_without_a_teacher_winners_alone_are_told(world):
    told = compare({"light": world.model()}, world.winners, how=FEW)
    assert (told.models, told.has_teacher, told.differences) == (("light",), False, ())
    assert "kl" not in told.metrics("light", "winners", "click")
    assert told.metrics("light", "candidates", "click") == {}


def test_a_model_not_measured_on_candidates_is_still_told_on_winners(world):
    floor = Predictions(TASKS, np.full((1500, 2), 0.3))
    told = compare({"light": world.model(), "floor": floor}, world.winners, world.candidates, world.model(), how=FEW)
    assert told.metrics("floor", "winners", "click")["kl"].value > 0
    assert told.metrics("floor", "candidates", "click") == {}
    assert {one.where for one in told.differences} == {"winners"}


def test_a_flat_model_is_no_error(world):
    told = compare({"flat": Predictions(TASKS, np.full((1500, 2), 0.3))}, world.winners, how=FEW)
    assert told.metrics("flat", "winners", "click")["auc"].value == 0.5
    assert told.curves[0].rows == (1500,)


def test_differences_are_to_the_model_named(world):
    models = {"a": world.model(noise=1.0), "b": world.model(noise=0.5), "c": world.model()}
    told = compare(models, world.winners, against="b", how=FEW)
    assert {(one.model, one.against) for one in told.differences} == {("a", "b"), ("c", "b")}


def test_cautions_are_of_what_is_told(world, told):
    assert any("Per-user AUC misleads" in text for text in told.cautions)
    assert any("Candidates have no labels" in text for text in told.cautions)
    alone = compare({"light": world.model()}, world.winners, how=FEW).cautions
    assert not any("teacher" in text for text in alone)


def test_names_and_tasks_that_do_not_meet_are_refused(world):
    light, winners = world.model(), world.winners
    with pytest.raises(DataError, match=r'at least one model and none named "teacher", found \[\]'):
        compare({}, winners)
    with pytest.raises(DataError, match='none named "teacher"'):
        compare({"teacher": light}, winners)
    with pytest.raises(DataError, match=r"against: expected one of \['light'\], found 'heavy'"):
        compare({"light": light}, winners, against="heavy")
    with pytest.raises(
        DataError, match="candidates: expected a teacher's predictions of them, for they have no labels"
    ):
        compare({"light": light}, winners, world.candidates)
    with pytest.raises(DataError, match="candidates: expected a teacher's predictions of them"):
        compare({"light": light}, winners, world.candidates, Predictions(TASKS, light.winners))
    other = replace(light, tasks=("click", "share"))
    said = (
        r"expected the winners' tasks \['click', 'like'\], found \['click', 'share'\]; the first difference is task 1"
    )
    with pytest.raises(SchemaMismatch, match=f"teacher: {said}: 'like' expected, 'share' found"):
        compare({"light": light}, winners, None, other)
    with pytest.raises(
        SchemaMismatch, match=r"light: expected the winners' tasks .* task 0: 'click' expected, 'like' found"
    ):
        compare({"light": replace(light, tasks=("like", "click"))}, winners)
    with pytest.raises(SchemaMismatch, match="task 1: 'like' expected, none found"):
        compare({"light": replace(light, tasks=("click",))}, winners)
    with pytest.raises(SchemaMismatch, match="candidates: expected the winners' tasks"):
        compare({"light": light}, winners, replace(world.candidates, tasks=("a", "b")), light)
