"""KL of two probabilities: scipy's, never negative, 0 where equal, and finite where a student is certain and wrong."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import rel_entr
from scipy.stats import entropy

from prerank.errors import DataError
from prerank.metrics.classification import log_loss
from prerank.metrics.divergence import bernoulli_kl

PROBS = st.floats(1e-9, 1 - 1e-9)


@given(PROBS, PROBS)
def test_kl_equals_scipy(teacher, student):
    t, s = np.array([teacher]), np.array([student])
    theirs = rel_entr(t, s) + rel_entr(1 - t, 1 - s)
    np.testing.assert_allclose(bernoulli_kl(t, s), theirs, rtol=1e-9, atol=1e-15)
    pair = entropy([teacher, 1 - teacher], [student, 1 - student])
    np.testing.assert_allclose(bernoulli_kl(t, s)[0], pair, rtol=1e-6, atol=1e-15)


@given(PROBS, st.floats(-1e-6, 1e-6))
def test_of_near_probabilities_it_is_their_squared_distance_over_twice_the_variance(teacher, step):
    t = np.array([0.1 + 0.8 * teacher])
    s = t + step
    np.testing.assert_allclose(bernoulli_kl(t, s), (s - t) ** 2 / (2 * t * (1 - t)), rtol=1e-4, atol=1e-21)


@given(st.floats(0, 1), st.floats(0, 1))
def test_kl_is_finite_not_negative_and_zero_exactly_where_equal(teacher, student):
    t, s = np.array([teacher]), np.array([student])
    assert 0 <= bernoulli_kl(t, s)[0] < 40
    assert bernoulli_kl(t, t)[0] == 0


def test_of_a_certain_teacher_it_is_the_log_loss():
    label, prob = np.array([1.0, 0.0, 1.0, 0.0]), np.array([0.3, 0.2, 0.0, 1.0])
    assert bernoulli_kl(label, prob).mean() == pytest.approx(log_loss(label, prob), rel=1e-12)


def test_float32_is_widened_before_anything_is_subtracted():
    t, s = np.array([0.5, 1e-8], dtype=np.float32), np.array([0.5 + 2**-20, 2e-8], dtype=np.float32)
    expected = bernoulli_kl(t.astype(np.float64), s.astype(np.float64))
    assert bernoulli_kl(t, s).dtype == np.float64
    np.testing.assert_array_equal(bernoulli_kl(t, s), expected)


@pytest.mark.parametrize("bad", [1.5, -0.1, np.nan, np.inf])
def test_what_is_no_probability_is_refused_by_whose_it_is(bad):
    good, wrong = np.array([0.5, 0.5]), np.array([0.5, bad])
    with pytest.raises(DataError, match=rf"probabilities from 0 to 1 of the teacher, found {bad}; is it a logit\?"):
        bernoulli_kl(wrong, good)
    with pytest.raises(DataError, match="of the student"):
        bernoulli_kl(good, wrong)
