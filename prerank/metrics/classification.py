"""How well a probability of a 0/1 label is ordered and how well it is known.

Arguments everywhere: label [R], 0 or 1 (or boolean), and prob float [R], what was predicted for each. Whatever
cannot be measured (no rows, one class only, a prediction that is not finite) is a DataError, never a number.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log, log1p

import numpy as np

from prerank.errors import DataError
from prerank.metrics.calibration import equal_mass_bins
from prerank.types import Array

_EPS = float(np.finfo(np.float64).eps)


def auc(label: Array, prob: Array) -> float:
    """The probability that a positive is placed above a negative, ties counting half.

    `prob` may be anything that orders (a logit, a similarity). From ranks (Mann & Whitney 1947), exact with ties.
    """
    _check(label, prob, "AUC")
    _, per_group, _ = auc_per_group(label, prob, np.zeros(len(label), dtype=np.int64))
    if np.isnan(per_group[0]):
        raise DataError(_one_class(label, "AUC"))
    return float(per_group[0])


def auc_per_group(label: Array, prob: Array, group: Array) -> tuple[Array, Array, Array]:
    """`auc` within each group -> the groups ascending [G], AUC float64 [G], rows int64 [G].

    group int [R] (a user, a request). NaN where a group has one class only.
    """
    _check(label, prob, "AUC")
    groups, member = np.unique(group, return_inverse=True)
    order = np.lexsort((prob, member))
    member, ordered, positive = member[order], prob[order], label[order].astype(np.int64)
    size = np.bincount(member)
    start = np.cumsum(size) - size
    fresh = np.ones(len(order), dtype=bool)  # the first row of each run of equal predictions in one group
    fresh[1:] = (member[1:] != member[:-1]) | (ordered[1:] != ordered[:-1])
    first = np.flatnonzero(fresh)
    run = np.cumsum(fresh) - 1
    last = np.append(first[1:], len(order)) - 1
    twice_rank = first[run] + last[run] - 2 * start[member] + 2  # whole numbers, so that ties are exact
    num_positive = np.bincount(member, positive).astype(np.int64)
    rank_sum = np.add.reduceat(twice_rank * positive, start)
    wins = rank_sum - num_positive * (num_positive + 1)
    pairs = 2 * num_positive * (size - num_positive)
    return groups, np.divide(wins, pairs, out=np.full(len(groups), np.nan), where=pairs > 0), size


def group_auc(label: Array, prob: Array, group: Array) -> float:
    """AUC within groups, averaged by their rows (Zhou et al. 2018, Deep Interest Network, equation 7).

    Groups with one class only are left out; a DataError where all are.
    """
    _, per_group, size = auc_per_group(label, prob, group)
    defined = ~np.isnan(per_group)
    if not defined.any():
        raise DataError(f"group AUC: none of {len(per_group)} groups has both a positive and a negative label")
    return float(np.average(per_group[defined], weights=size[defined]))


@dataclass(frozen=True, slots=True)
class SortedLabels:
    """Rows sorted once by their prediction, so that the AUC under many weightings costs no further sort.

    order int64 [R]; positive float64 [R], in that order; first int64, where each run of equal predictions begins.
    """

    order: Array
    positive: Array
    first: Array

    @classmethod
    def of(cls, label: Array, prob: Array) -> SortedLabels:
        """By prob, which may be anything that orders. Raises DataError as `auc` does, but for labels of one class."""
        _check(label, prob, "AUC")
        order = np.argsort(prob, kind="stable")
        ordered = prob[order]
        fresh = np.append(True, ordered[1:] != ordered[:-1])
        return cls(order, label[order].astype(np.float64), np.flatnonzero(fresh))

    def auc(self, weight: Array) -> float:
        """`auc` with row r counted weight[r] >= 0 times; NaN where either class has no weight.

        Exact where weights are whole numbers (of less than 2^53 pairs together).
        """
        weighed = weight[self.order].astype(np.float64)
        positive = weighed * self.positive
        if len(self.first) < len(self.order):
            positive, weighed = (np.add.reduceat(column, self.first) for column in (positive, weighed))
        negative = weighed - positive
        below = np.cumsum(negative)
        pairs = positive.sum() * below[-1]
        # no dot product: its threads cost more than it, once a resample on busy cores
        return float((positive * (below - negative / 2)).sum() / pairs) if pairs > 0 else float("nan")


def weighted_auc(label: Array, prob: Array, weight: Array) -> float:
    """`auc` with row r counted weight[r] >= 0 times; raises DataError also where either class has no weight."""
    found = SortedLabels.of(label, prob).auc(weight)
    if np.isnan(found):
        raise DataError("AUC: the rows of one class have no weight; it needs both a positive and a negative")
    return found


def log_loss(label: Array, prob: Array) -> float:
    """Mean cross-entropy in nats; a prob is kept 2.2e-16 away from 0 and 1, as scikit-learn does for float64."""
    _check_prob(label, prob, "log loss")
    kept = np.clip(prob.astype(np.float64), _EPS, 1 - _EPS)
    return float(-np.where(label.astype(bool), np.log(kept), np.log1p(-kept)).mean())


def normalised_entropy(label: Array, prob: Array) -> float:
    """Log loss over that of always predicting the mean label (He et al. 2014, equation 1); below 1 is of use."""
    loss = log_loss(label, prob)
    rate = float(label.astype(np.float64).mean())
    if not 0 < rate < 1:
        raise DataError(_one_class(label, "normalised entropy"))
    return loss / -(rate * log(rate) + (1 - rate) * log1p(-rate))


def calibration_ratio(label: Array, prob: Array) -> float:
    """Predicted over observed positives (He et al. 2014, section 3); 1 is calibrated, above it too sure."""
    _check_prob(label, prob, "calibration")
    num_positive = int(label.sum())
    if not num_positive:
        raise DataError(_one_class(label, "calibration"))
    return float(prob.sum(dtype=np.float64)) / num_positive


def expected_calibration_error(label: Array, prob: Array, num_bins: int) -> float:
    """How far mean prob is from mean label in each bin, averaged by rows.

    Bins hold equally many rows (deciles: 10), cut at quantiles of prob; equal probs are never parted, so with many
    ties there are fewer. Naeini et al. 2015 with equal-mass instead of equal-width bins, which rare labels leave empty.
    """
    _check_prob(label, prob, "calibration error")
    wide = prob.astype(np.float64)
    bins = equal_mass_bins(wide, num_bins)
    gap = np.bincount(bins, wide - label.astype(np.float64), num_bins)
    return float(np.abs(gap).sum() / len(wide))


def _check(label: Array, prob: Array, what: str) -> None:
    assert label.shape == prob.shape
    assert label.ndim == 1
    if not len(label):
        raise DataError(f"{what}: no rows to measure on; check the days measured")
    if not ((label == 0) | (label == 1)).all():
        raise DataError(f"{what}: expected labels 0 and 1, found {label[(label != 0) & (label != 1)][0]}")
    finite = np.isfinite(prob)
    if not finite.all():
        raise DataError(f"{what}: {int((~finite).sum())} of {len(prob)} predictions are not finite numbers")


def _check_prob(label: Array, prob: Array, what: str) -> None:
    _check(label, prob, what)
    outside = (prob < 0) | (prob > 1)
    if outside.any():
        raise DataError(f"{what}: expected probabilities from 0 to 1, found {prob[outside][0]}; is it a logit?")


def _one_class(label: Array, what: str) -> str:
    return f"{what}: all {len(label)} labels are {int(label[0])}; it needs both a positive and a negative"
