"""Numbers on winners are the metrics' own, by task and segment; what cannot be measured says why."""

from dataclasses import replace

import numpy as np
import pytest

from prerank.errors import DataError, SchemaMismatch
from prerank.evaluate.estimates import Key, Resampling, difference, estimate
from prerank.evaluate.winners import Winners, calibration_curves, winner_draws
from prerank.metrics import classification as by_hand
from prerank.metrics.bootstrap import mean_interval
from prerank.metrics.divergence import bernoulli_kl
from tests.evaluate.world import FEW, SEGMENTS, arrays


def told(model, winners, teacher=None, how=FEW):
    draws = winner_draws({"model": model}, winners, teacher, how)["model"]
    return {key[1:]: estimate(drawn, how.level) for key, drawn in draws.items()}


def test_numbers_are_those_of_the_metrics_on_each_segment():
    world = arrays()
    model, teacher = world.model(noise=0.5).winners, world.model().winners
    found, winners = told(model, world.winners, teacher), world.winners
    for number, task in enumerate(winners.tasks):
        for place, segment in enumerate(("all", *SEGMENTS)):
            rows = np.ones(len(model), bool) if segment == "all" else winners.segment == place - 1
            label, prob, user = winners.label[rows, number], model[rows, number], winners.user[rows]
            expected = {
                "auc": by_hand.auc(label, prob),
                "user_auc": by_hand.group_auc(label, prob, user),
                "log_loss": by_hand.log_loss(label, prob),
                "normalised_entropy": by_hand.normalised_entropy(label, prob),
                "calibration_ratio": by_hand.calibration_ratio(label, prob),
                "calibration_error": by_hand.expected_calibration_error(label, prob, 10),
                "kl": bernoulli_kl(teacher[rows, number], prob).mean(),
                "mean_prob": prob.mean(),
                "mean_label": label.mean(),
            }
            assert {metric for t, s, metric in found if (t, s) == (task, segment)} == set(expected)
            for metric, value in expected.items():
                assert found[task, segment, metric].value == pytest.approx(value, rel=1e-9), metric
            assert found[task, segment, "auc"].rows == rows.sum()
            assert found[task, segment, "auc"].users == len(np.unique(user))


def test_intervals_are_those_of_whole_users_and_hold_the_number():
    world = arrays()
    found = told(world.model(noise=0.5).winners, world.winners)
    for key, one in found.items():
        assert one.low < one.high, key
        assert one.low <= one.value <= one.high or key[2] == "calibration_error", key
    loss = by_hand.log_loss(world.winners.label[:, 0], np.full(1500, 0.5))
    flat = told(np.full((1500, 2), 0.5), world.winners)["click", "all", "log_loss"]
    assert (flat.value, flat.low, flat.high) == pytest.approx((loss, loss, loss))


def test_a_mean_over_rows_has_the_interval_of_mean_interval():
    world = arrays()
    label, prob = world.winners.label[:, 0], world.model(noise=0.5).winners[:, 0]
    losses = -np.where(label > 0, np.log(prob), np.log1p(-prob))
    expected = mean_interval(losses, world.winners.user, seed=FEW.seed, draws=FEW.draws, level=FEW.level)
    one = told(world.model(noise=0.5).winners, world.winners)["click", "all", "log_loss"]
    assert (one.value, one.low, one.high) == pytest.approx((expected.mean, expected.low, expected.high))


def test_a_student_equal_to_its_teacher_has_no_divergence():
    world = arrays()
    teacher = world.model().winners
    one = told(teacher, world.winners, teacher)["click", "all", "kl"]
    assert (one.value, one.low, one.high) == (0, 0, 0)


def test_user_auc_counts_only_users_with_both_classes():
    world = arrays()
    label = world.winners.label.copy()
    label[world.winners.user < 60] = 0
    winners = replace(world.winners, label=label)
    mixed = [u for u in range(60, 120) if len(np.unique(label[winners.user == u, 0])) == 2]
    one = told(world.model(noise=1.0).winners, winners)["click", "all", "user_auc"]
    assert one.users == len(mixed)
    assert one.rows == np.isin(winners.user, mixed).sum()


def test_a_segment_of_one_class_has_a_reason_and_the_rest_still_numbers():
    world = arrays()
    label = world.winners.label.copy()
    label[world.winners.segment == 1, 0] = 0
    found = told(world.model(noise=0.5).winners, replace(world.winners, label=label))
    one = found["click", "search", "auc"]
    assert (one.value, one.low, one.high, one.why) == (
        None,
        None,
        None,
        "it needs a row with label 1 and one with label 0",
    )
    assert found["click", "search", "user_auc"].why == "it needs a user with a row of label 1 and one of label 0"
    assert found["click", "search", "calibration_ratio"].why == "it needs a row with label 1"
    assert found["click", "search", "log_loss"].value > 0
    assert found["click", "feed", "auc"].value > 0.5


def test_a_segment_of_few_users_has_a_reason_for_every_number():
    world = arrays()
    segment = np.where(world.winners.user < 19, 1, 0)
    found = told(world.model().winners, replace(world.winners, segment=segment))
    small = [one for (_, where, _), one in found.items() if where == "search"]
    assert {one.why for one in small} == {"19 users here, expected at least 20"}
    assert all(one.value is None for one in small)
    assert found["click", "feed", "auc"].value is not None


def test_a_number_that_many_resamples_lack_is_not_told():
    world = arrays()
    label = np.zeros_like(world.winners.label)
    label[0] = 1  # one user alone has a positive: more than a third of resamples leave it out
    one = told(world.model().winners, replace(world.winners, label=label))["click", "all", "auc"]
    assert one.value is None
    assert one.why.startswith("too rare to say how sure: it needs a row with label 1 and one with label 0, which ")
    assert one.why.endswith(" of 60 resamples lack")


def test_one_segment_is_all_and_not_told_twice():
    world = arrays()
    winners = replace(world.winners, segment=np.zeros(1500, int), segments=("feed",))
    assert {segment for _, segment, _ in told(world.model().winners, winners)} == {"all"}


def test_a_paired_difference_is_surer_than_either_number():
    world = arrays()
    models = {"better": world.model(noise=0.3).winners, "worse": world.model(noise=0.35, seed=1).winners}
    draws = winner_draws(models, world.winners, None, Resampling(draws=200))
    for metric in ("auc", "log_loss"):
        key = Key("winners", "click", "all", metric)
        ours, theirs = draws["better"][key], draws["worse"][key]
        gap, own = estimate(difference(ours, theirs), 0.95), estimate(ours, 0.95)
        assert gap.value == pytest.approx(ours.values[0] - theirs.values[0])
        assert gap.high - gap.low < (own.high - own.low) / 3


def test_the_difference_of_what_is_not_defined_says_why():
    world = arrays()
    winners = replace(world.winners, label=np.zeros_like(world.winners.label))
    draws = winner_draws({"a": world.model().winners, "b": world.model().winners}, winners, None, FEW)
    key = Key("winners", "click", "all", "auc")
    assert difference(draws["a"][key], draws["b"][key]).why == "it needs a row with label 1 and one with label 0"


def test_a_right_model_is_calibrated_in_each_decile_and_one_too_sure_is_not():
    world = arrays(rows=6000, users=600)
    models = {"right": world.model().winners, "too sure": world.model(scale=2.5).winners}
    right, sure = (c for c in calibration_curves(models, world.winners, FEW) if c.task == "click")
    assert sum(right.rows) == 6000
    assert right.rows == (600,) * 10
    held = [low <= p <= high for low, p, high in zip(right.low, right.mean_prob, right.high, strict=True)]
    assert sum(held) >= 8
    assert sure.mean_prob[0] < sure.low[0]
    assert sure.mean_prob[-1] > sure.high[-1]


def test_too_few_users_have_no_curve():
    world = arrays(rows=50, users=5)
    assert calibration_curves({"model": world.model().winners}, world.winners, FEW) == []


def test_per_user_auc_of_a_running_click_rate_is_far_below_half_on_shuffled_labels():
    """The caution of the report: where no order is better than another, a feature of the same day's labels is worse."""
    rng = np.random.default_rng(0)
    user, label = np.repeat(np.arange(400), 8), rng.permuted(np.tile([0, 0, 0, 0, 0, 0, 1, 1], (400, 1)), axis=1)
    before = np.cumsum(label, axis=1) - label
    rate = (before + 0.25) / (np.arange(8) + 1)
    winners = Winners(("click",), label.reshape(-1, 1), user, np.zeros(3200, int))
    assert told(rate.reshape(-1, 1), winners)["click", "all", "user_auc"].high < 0.4


def test_labels_and_users_and_segments_that_do_not_fit_are_refused():
    label, user, segment = np.zeros((4, 2)), np.zeros(4, int), np.zeros(4, int)
    for bad, found in ((2, "2.0"), (0.5, "0.5"), (np.nan, "nan")):
        wrong = label.copy()
        wrong[3, 1] = bad
        with pytest.raises(DataError, match=f"winners, like: expected labels 0 and 1, found {found} in row 3"):
            Winners(("click", "like"), wrong, user, segment)
    with pytest.raises(DataError, match=r"winners: expected labels \[P, T\] of at least one row, found \[0, 2\]"):
        Winners(("click", "like"), label[:0], user[:0], segment[:0])
    with pytest.raises(SchemaMismatch, match="winners, labels: expected 1 tasks, click; found 2"):
        Winners(("click",), label, user, segment)
    with pytest.raises(DataError, match="winners: expected a user for each of 4 rows, found 3"):
        Winners(("click", "like"), label, user[:3], segment)
    with pytest.raises(DataError, match=r"winners: expected a segment for each of 4 rows, found shape \[3\]"):
        Winners(("click", "like"), label, user, segment[:3])
    with pytest.raises(DataError, match=r"expected segments from 0 to 1, places in \['a', 'b'\], found 2 in row 1"):
        Winners(("click", "like"), label, user, np.array([0, 2, 1, 1]), ("a", "b"))
    for names in (("a", "a"), ("all", "b")):
        with pytest.raises(DataError, match='expected segment names that are distinct and not "all"'):
            Winners(("click", "like"), label, user, segment, names)


def test_predictions_that_do_not_fit_are_refused_by_name():
    world = arrays()
    good = world.model().winners
    with pytest.raises(SchemaMismatch, match="light on winners: expected 2 tasks, click, like; found 1"):
        winner_draws({"light": good[:, :1]}, world.winners)
    with pytest.raises(DataError, match=r"light on winners: expected the shape \[1500, 2\], found \[1499, 2\]"):
        winner_draws({"light": good[1:]}, world.winners)
    for bad, found in ((np.nan, "nan"), (1.5, "1.5"), (-1.0, "-1.0")):
        wrong = good.copy()
        wrong[7, 1] = bad
        said = f"on winners, like: expected probabilities from 0 to 1, found {found} in row 7; 1 of 3000 are none"
        with pytest.raises(DataError, match=f"light {said}"):
            winner_draws({"light": wrong}, world.winners)
        with pytest.raises(DataError, match=f"teacher {said}"):
            winner_draws({"light": good}, world.winners, wrong)
