"""Intervals over users: as wide as theory says, whole users at a time, and the same for the same seed."""

import numpy as np
import pytest

from prerank.errors import DataError
from prerank.metrics.bootstrap import difference_interval, mean_interval


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
