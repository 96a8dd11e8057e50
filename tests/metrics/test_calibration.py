"""Deciles hold equally many rows, never part equal predictions, and their means are those of their rows."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from prerank.metrics.calibration import calibration_bins
from prerank.metrics.classification import expected_calibration_error


@given(st.integers(0, 2**32))
def test_bins_are_the_tenths_of_the_sorted_rows(seed):
    rng = np.random.default_rng(seed)
    prob = rng.permutation(np.linspace(0.01, 0.99, 200))
    label = (rng.random(200) < prob).astype(int)
    tenths = np.split(np.argsort(prob), 10)
    bins = calibration_bins(label, prob, 10)
    np.testing.assert_allclose(bins.mean_prob, [prob[rows].mean() for rows in tenths])
    np.testing.assert_allclose(bins.mean_label, [label[rows].mean() for rows in tenths])
    np.testing.assert_array_equal(bins.rows, 20)


@given(st.integers(0, 2**32), st.integers(1, 20))
def test_calibration_error_is_the_bins_gap_weighed_by_rows(seed, ties):
    rng = np.random.default_rng(seed)
    prob, label = rng.integers(0, ties + 1, 100) / ties, rng.integers(0, 2, 100)
    bins = calibration_bins(label, prob, 10)
    gap = (np.abs(bins.mean_prob - bins.mean_label) * bins.rows).sum() / 100
    np.testing.assert_allclose(expected_calibration_error(label, prob, 10), gap, atol=1e-12)


def test_equal_predictions_are_one_bin():
    bins = calibration_bins(np.array([0, 1, 1, 1]), np.full(4, 0.5), 10)
    assert (bins.mean_prob.tolist(), bins.mean_label.tolist(), bins.rows.tolist()) == ([0.5], [0.75], [4])
