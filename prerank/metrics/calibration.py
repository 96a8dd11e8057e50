"""Predicted against observed rates, bin by bin of the prediction."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prerank.types import Array


@dataclass(frozen=True, slots=True)
class CalibrationBins:
    """Bins by rising prediction, none empty: mean_prob and mean_label float64 [K], rows int64 [K]."""

    mean_prob: Array
    mean_label: Array
    rows: Array


def equal_mass_bins(prob: Array, num_bins: int) -> Array:
    """The bin of each of prob float64 [R] -> int64 [R], rising with prob; bins hold equally many rows (deciles: 10).

    Cut at quantiles of prob; equal probs are never parted, so with many ties some bins hold none.
    """
    cuts = np.quantile(prob, np.arange(1, num_bins) / num_bins)
    return np.searchsorted(cuts, prob, side="left")


def calibration_bins(label: Array, prob: Array, num_bins: int) -> CalibrationBins:
    """Mean prediction, mean label (0 or 1, [R]) and rows of each bin of `equal_mass_bins`, at most `num_bins`."""
    assert label.shape == prob.shape
    wide = prob.astype(np.float64)
    bins = equal_mass_bins(wide, num_bins)
    rows = np.bincount(bins, minlength=num_bins)
    some = rows > 0
    means = [np.bincount(bins, column, num_bins)[some] / rows[some] for column in (wide, label.astype(np.float64))]
    return CalibrationBins(means[0], means[1], rows[some])
