"""Rates of earlier days, against three lines of numpy."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from prerank.features.rates import GroupRates, rates


@given(st.integers(0, 1_000_000))
def test_a_rate_is_the_log_odds_of_the_days_before_drawn_towards_everybodys(seed):
    rng = np.random.default_rng(seed)
    shown = rng.integers(0, 30, (4, 6)).astype(float)
    happened = np.floor(shown * rng.random(shown.shape))
    group = rng.integers(0, 3, 6)
    found = rates(shown, happened, group, prior=5.0)
    for day in range(5):
        n, h = shown[:day].sum(0), happened[:day].sum(0)
        rate = h.sum() / max(n.sum(), 1)
        for item in range(6):
            same = group == group[item]
            if not 0 < rate < 1:
                assert found[day, item] == 0
                continue
            p = (h[same].sum() + 5 * rate) / (n[same].sum() + 5)
            assert np.isclose(found[day, item], np.log(p / (1 - p)) - np.log(rate / (1 - rate)), atol=1e-5)


@given(st.integers(0, 1_000_000))
def test_what_is_older_counts_as_a_day_before_the_first(seed):
    rng = np.random.default_rng(seed)
    shown = rng.integers(0, 30, (4, 6)).astype(float)
    happened = np.floor(shown * rng.random(shown.shape))
    group = rng.integers(0, 3, 6)
    found = rates(shown[1:], happened[1:], group, 5.0, before=(shown[0], happened[0]))
    np.testing.assert_array_equal(found, rates(shown, happened, group, 5.0)[1:])


def test_a_day_changes_nothing_of_itself_or_before():
    shown, happened = np.full((3, 2), 10.0), np.full((3, 2), 4.0)
    before = rates(shown, happened, np.arange(2), 1.0)
    happened[2, 0] = 10.0
    after = rates(shown, happened, np.arange(2), 1.0)
    assert np.array_equal(before[:3], after[:3])
    assert after[3, 0] > after[3, 1]


def test_a_group_has_the_rate_of_its_items_and_one_without_items_that_of_all():
    found = GroupRates(np.array([7, 2, 7, 5]), np.array([0.5, -1.0, 0.5, 0.25], np.float32))
    assert found.of(np.array([2, 3, 7, 5, 9, 0])).tolist() == [-1.0, 0.0, 0.5, 0.25, 0.0, 0.0]
    assert found.of(np.array([], np.int64)).shape == (0,)
