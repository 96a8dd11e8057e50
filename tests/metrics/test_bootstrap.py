"""Intervals over users: as wide as theory says, whole users at a time, and the same for the same seed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from prerank.errors import DataError
from prerank.metrics.bootstrap import Resamples, difference_interval, interval_of, mean_interval
from prerank.metrics.classification import SortedLabels


def test_the_interval_of_independent_users_is_the_normal_one():
    values = np.random.default_rng(0).normal(3, 2, 4000)
    interval = mean_interval(values, np.arange(4000), seed=1)
    half = 1.96 * values.std() / np.sqrt(4000)
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_a_users_rows_move_together():
    per_user = np.random.default_rng(0).normal(size=300)
    once = mean_interval(per_user, np.arange(300), seed=1)
    ten_times = mean_interval(np.repeat(per_user, 10), np.repeat(np.arange(300), 10), seed=1)
    assert ten_times.low == pytest.approx(once.low)
    assert ten_times.high == pytest.approx(once.high)


def test_the_mean_is_over_rows_and_nan_rows_are_left_out():
    values = np.array([1.0, 1.0, 4.0, np.nan])
    assert mean_interval(values, np.array([7, 7, 8, 9]), seed=0).mean == 2.0


def test_the_same_seed_gives_the_same_interval_and_a_wider_level_a_wider_one():
    values, users = np.random.default_rng(0).normal(size=50), np.arange(50)
    assert mean_interval(values, users, seed=3) == mean_interval(values, users, seed=3)
    assert mean_interval(values, users, seed=3) != mean_interval(values, users, seed=4)
    wide, narrow = (mean_interval(values, users, seed=3, level=level) for level in (0.99, 0.5))
    assert wide.low < narrow.low < narrow.high < wide.high


def test_pairing_cancels_what_both_find_hard():
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 10, 500)
    ours, theirs = hard + 0.2 + rng.normal(0, 0.1, 500), hard.copy()
    ours[0] = theirs[1] = np.nan
    interval = difference_interval(ours, theirs, np.arange(500), seed=1)
    assert 0.15 < interval.low < interval.mean < interval.high < 0.25


def test_one_user_says_nothing_of_how_users_differ():
    with pytest.raises(DataError, match="expected values of at least 2 users, found 1"):
        mean_interval(np.array([1.0, 2.0, np.nan]), np.array([5, 5, 6]), seed=0)


def test_the_first_resample_is_the_users_as_they_are_and_each_other_takes_as_many():
    resamples = Resamples.of(np.array([9, 4, 9, 7]), seed=0, draws=50)
    assert resamples.times.shape == (51, 3)
    assert (resamples.times[0] == 1).all()
    assert (resamples.times.sum(1) == 3).all()
    assert next(resamples.weights()).tolist() == [1, 1, 1, 1]


@given(st.integers(0, 2**32))
def test_sums_are_those_of_the_rows_weighed_by_their_users_draws(seed):
    rng = np.random.default_rng(seed)
    users, columns, group = rng.integers(0, 9, 40), rng.normal(size=(40, 3)), rng.integers(0, 4, 40)
    users[:2] = 0, 1
    resamples = Resamples.of(users, seed=seed, draws=7)
    sums, by_group = resamples.sums(columns), resamples.sums_by_group(group, 4, columns[:, 0])
    for drawn, weight in enumerate(resamples.weights()):
        np.testing.assert_allclose(sums[drawn], weight @ columns, atol=1e-9)
        expected = [(weight * columns[:, 0])[group == g].sum() for g in range(4)]
        np.testing.assert_allclose(by_group[drawn], expected, atol=1e-9)


def test_many_users_are_summed_some_resamples_at_a_time(monkeypatch):
    users, values = np.arange(50), np.random.default_rng(0).normal(size=(50, 1))
    resamples = Resamples.of(users, seed=0, draws=20)
    together = resamples.sums(values)
    monkeypatch.setattr("prerank.metrics.bootstrap._AT_ONCE", 110)
    np.testing.assert_allclose(resamples.sums(values), together)


def test_the_interval_of_an_auc_holds_the_truth_as_often_as_it_says():
    """AUC of two shifted normals is known: Phi(shift / sqrt 2)."""
    rng, truth, held = np.random.default_rng(0), norm.cdf(1 / np.sqrt(2)), 0
    for world in range(100):
        label = rng.integers(0, 2, 200)
        rows = SortedLabels.of(label, rng.normal(size=200) + label)
        resamples = Resamples.of(np.arange(200), seed=world, draws=200)
        interval = interval_of(np.array([rows.auc(weight) for weight in resamples.weights()]))
        held += interval.low <= truth <= interval.high
    assert 88 <= held <= 100  # 95 expected; a fair coin of .95 is below 88 once in a thousand


def test_undefined_resamples_are_left_out_of_an_interval():
    interval = interval_of(np.array([1.0, np.nan, 0.5, 1.5]), level=0.5)
    assert (interval.mean, interval.low, interval.high) == (1.0, 0.75, 1.25)
