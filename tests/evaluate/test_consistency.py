"""On candidates: a student that is its teacher keeps everything, one in reversed order nothing."""

from dataclasses import replace

import numpy as np
import pytest

from prerank.errors import DataError, SchemaMismatch
from prerank.evaluate.consistency import Candidates, candidate_draws
from prerank.evaluate.estimates import estimate
from prerank.metrics.divergence import bernoulli_kl
from tests.evaluate.world import FEW, SEGMENTS, arrays


def told(model, candidates, teacher, how=FEW):
    draws = candidate_draws({"model": model}, candidates, teacher, how)["model"]
    return {key[1:]: estimate(drawn, how.level) for key, drawn in draws.items()}


def test_a_student_equal_to_its_teacher_has_kl_0_overlap_1_and_ndcg_1():
    world = arrays(candidates=150)
    teacher = world.model().candidates
    found = told(teacher, world.candidates, teacher)
    for segment in ("all", *SEGMENTS):
        for metric in ("overlap@10", "overlap@100", "top10_in_20", "top10_in_100", "ndcg@10", "ndcg@100"):
            one = found["click", segment, metric]
            assert (one.value, one.low, one.high) == (1, 1, 1), metric
        assert found["click", segment, "kl"].value == 0
        assert found["click", segment, "calibration_ratio"].value == 1


def test_a_student_in_reversed_order_keeps_nothing_of_the_top():
    world = arrays()
    teacher = world.model().candidates
    found = told(1 - teacher, world.candidates, teacher)
    assert found["click", "all", "overlap@10"].value == 0
    assert found["click", "all", "top10_in_20"].value == 0
    assert found["click", "all", "ndcg@10"].value < 0.5
    best = told(teacher, world.candidates, teacher)["click", "all", "user_auc"].value
    assert found["click", "all", "user_auc"].value == pytest.approx(1 - best)


def test_an_order_by_chance_keeps_k_of_n_and_no_order_keeps_retrievals():
    world = arrays(questions=400, candidates=102)
    teacher = world.model().candidates
    chance = told(np.random.default_rng(0).random(teacher.shape), world.candidates, teacher)[
        "click", "all", "top10_in_50"
    ]
    assert chance.value == pytest.approx(0.5, abs=0.03)
    assert chance.low < 0.5 < chance.high
    flat = told(np.full(teacher.shape, 0.3), world.candidates, teacher)["click", "all", "overlap@10"].value
    by_hand = np.mean([(np.argsort(-row[:100], kind="stable")[:10] < 10).mean() for row in teacher[..., 0]])
    assert flat == pytest.approx(by_hand)


def test_sums_over_candidates_are_over_the_valid_ones():
    world = arrays()
    teacher, model = world.model().candidates, world.model(noise=0.7).candidates.copy()
    model[~world.candidates.valid] = np.nan  # what is not valid may hold anything
    found = told(model, world.candidates, teacher)
    valid = world.candidates.valid
    t, p = teacher[valid][:, 1], model[valid][:, 1]
    assert found["like", "all", "kl"].value == pytest.approx(bernoulli_kl(t, p).mean())
    loss = -(t * np.log(p) + (1 - t) * np.log1p(-p)).mean()
    assert found["like", "all", "log_loss"].value == pytest.approx(loss)
    rate = t.mean()
    background = -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate))
    assert found["like", "all", "normalised_entropy"].value == pytest.approx(loss / background)
    assert found["like", "all", "calibration_ratio"].value == pytest.approx(p.sum() / t.sum())
    assert found["like", "all", "mean_prob"].value == pytest.approx(p.mean())
    assert found["like", "all", "mean_teacher"].value == pytest.approx(rate)
    assert found["like", "all", "kl"].rows == valid.sum()
    assert found["like", "all", "overlap@10"].rows == len(valid)


def test_segments_are_of_questions():
    world = arrays()
    teacher, model = world.model().candidates, world.model(noise=0.7).candidates
    mine = world.candidates.segment == 1
    alone = replace(
        world.candidates, valid=world.candidates.valid[mine], user=world.candidates.user[mine],
        segment=np.zeros(mine.sum(), int), segments=(),
    )  # fmt: skip
    expected, found = told(model[mine], alone, teacher[mine]), told(model, world.candidates, teacher)
    for (task, _, metric), one in expected.items():
        other = found[task, "search", metric]
        assert (other.rows, other.users) == (one.rows, one.users)
        assert (other.value, other.low, other.high) == pytest.approx((one.value, one.low, one.high))


def test_tops_and_cuts_that_all_candidates_would_pass_are_left_out():
    world = arrays(candidates=40)
    metrics = {metric for _, _, metric in told(world.model().candidates, world.candidates, world.model().candidates)}
    assert {"overlap@10", "top10_in_20", "ndcg@10"} <= metrics
    assert not {"top10_in_50", "overlap@100", "ndcg@100"} & metrics


def test_a_question_without_candidates_counts_nowhere():
    world = arrays()
    valid = world.candidates.valid.copy()
    valid[5] = False
    teacher, model = world.model().candidates, world.model(noise=0.7).candidates
    kept = np.arange(len(valid)) != 5
    some = replace(world.candidates, valid=valid)
    without = replace(world.candidates, valid=valid[kept], user=some.user[kept], segment=some.segment[kept])
    mine, expected = told(model, some, teacher), told(model[kept], without, teacher[kept])
    for metric in ("kl", "overlap@10", "ndcg@10", "user_auc"):
        assert mine["click", "all", metric].value == pytest.approx(expected["click", "all", metric].value)


def test_few_users_have_a_reason():
    world = arrays(questions=19)
    found = told(world.model().candidates, world.candidates, world.model().candidates)
    assert found["click", "all", "kl"].why == "19 users here, expected at least 20"
    assert found["click", "all", "overlap@10"].value is None


def test_candidates_and_predictions_that_do_not_fit_are_refused_by_name():
    world = arrays()
    valid, user, segment = world.candidates.valid, world.candidates.user, world.candidates.segment
    for bad in (valid[0], np.zeros_like(valid), valid.astype(int)):
        with pytest.raises(DataError, match=r"candidates: expected valid bool \[Q, N\] with at least one True, found"):
            Candidates(("click",), bad, user, segment)
    with pytest.raises(DataError, match="candidates: expected a user for each of 60 questions, found 59"):
        Candidates(("click",), valid, user[1:], segment)
    teacher = world.model().candidates
    with pytest.raises(SchemaMismatch, match="light on candidates: expected 2 tasks, click, like; found 1"):
        candidate_draws({"light": teacher[..., :1]}, world.candidates, teacher)
    with pytest.raises(
        DataError, match=r"teacher on candidates: expected the shape \[60, 40, 2\], found \[60, 39, 2\]"
    ):
        candidate_draws({"light": teacher}, world.candidates, teacher[:, 1:])
    wrong = teacher.copy()
    wrong[3, 4, 0] = np.nan
    said = "light on candidates, click: expected probabilities from 0 to 1, found nan in row 3, 4; 1 of 4800 are none"
    with pytest.raises(DataError, match=said):
        candidate_draws({"light": wrong}, world.candidates, teacher)
