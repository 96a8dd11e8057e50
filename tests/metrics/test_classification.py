"""AUC, log loss, normalised entropy and calibration, counted by hand and by scikit-learn."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as theirs

from prerank.errors import DataError
from prerank.metrics.classification import (
    SortedLabels,
    auc,
    auc_per_group,
    calibration_ratio,
    expected_calibration_error,
    group_auc,
    log_loss,
    normalised_entropy,
    weighted_auc,
)

EVERY = [
    auc,
    log_loss,
    normalised_entropy,
    calibration_ratio,
    lambda label, prob: expected_calibration_error(label, prob, 10),
    lambda label, prob: group_auc(label, prob, np.zeros(len(label), dtype=np.int64)),
    lambda label, prob: weighted_auc(label, prob, np.ones(len(label))),
]


def a_run(seed: int, rows: int = 200, ties: int = 30) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 2, rows)
    label[:2] = 0, 1
    return label, rng.integers(1, ties + 1, rows) / (ties + 1)


def test_auc_counts_pairs_and_a_tie_is_half():
    label, prob = np.array([0, 1, 0, 1]), np.array([0.1, 0.5, 0.5, 0.9])
    assert auc(label, prob) == (1 + 0.5 + 1 + 1) / 4


def test_auc_of_equal_predictions_is_exactly_half():
    assert auc(np.array([0, 1, 0]), np.full(3, 0.3)) == 0.5


@given(st.integers(0, 2**32), st.integers(1, 50))
def test_auc_log_loss_and_entropy_equal_scikit_learn(seed, ties):
    label, prob = a_run(seed, ties=ties)
    assert auc(label, prob) == pytest.approx(theirs.roc_auc_score(label, prob), rel=1e-12)
    assert auc(label.astype(bool), prob - 7) == pytest.approx(auc(label, prob))
    assert log_loss(label, prob) == pytest.approx(theirs.log_loss(label, prob), rel=1e-12)
    background = theirs.log_loss(label, np.full(len(label), label.mean()))
    assert normalised_entropy(label, prob) == pytest.approx(log_loss(label, prob) / background, rel=1e-12)


@given(st.integers(0, 2**32), st.integers(1, 300), st.booleans())
def test_weighted_auc_equals_scikit_learn(seed, ties, whole):
    label, prob = a_run(seed, ties=ties)
    rng = np.random.default_rng(seed)
    weight = rng.integers(0, 4, len(label)) if whole else rng.random(len(label))
    weight[:2] = 1
    assert weighted_auc(label, prob, weight) == pytest.approx(
        theirs.roc_auc_score(label, prob, sample_weight=weight), rel=1e-12
    )


@given(st.integers(0, 2**32), st.integers(1, 50))
def test_whole_weights_are_so_many_copies_of_a_row_and_exact(seed, ties):
    label, prob = a_run(seed, ties=ties)
    weight = np.random.default_rng(seed).integers(1, 4, len(label))
    rows = SortedLabels.of(label, prob)
    assert rows.auc(np.ones(len(label))) == auc(label, prob)
    assert rows.auc(weight) == auc(label.repeat(weight), prob.repeat(weight))


def test_a_class_without_weight_has_no_auc():
    label, prob, weight = np.array([0, 1, 0]), np.array([0.1, 0.2, 0.3]), np.array([1, 0, 2])
    assert np.isnan(SortedLabels.of(label, prob).auc(weight))
    with pytest.raises(DataError, match="the rows of one class have no weight; it needs both a positive and a negat"):
        weighted_auc(label, prob, weight)


@given(st.integers(0, 2**32))
def test_auc_per_group_is_the_auc_of_each_group(seed):
    label, prob = a_run(seed)
    group = np.random.default_rng(seed).integers(-3, 40, len(label))
    groups, per_group, size = auc_per_group(label, prob, group)
    for name, one, rows in zip(groups, per_group, size, strict=True):
        mine = group == name
        assert rows == mine.sum()
        if len(np.unique(label[mine])) == 2:
            assert one == pytest.approx(theirs.roc_auc_score(label[mine], prob[mine]), rel=1e-12)
        else:
            assert np.isnan(one)


def test_group_auc_weighs_groups_by_rows_and_leaves_out_those_of_one_class():
    label = np.array([0, 1, 0, 0, 1, 1, 1])
    prob = np.array([0.1, 0.2, 0.9, 0.8, 0.3, 0.5, 0.6])
    group = np.array([4, 4, 9, 9, 9, 2, 2])
    assert group_auc(label, prob, group) == (2 * 1.0 + 3 * 0.0) / 5


def test_predicting_the_rate_has_normalised_entropy_one():
    label = np.array([0, 0, 0, 1])
    assert normalised_entropy(label, np.full(4, 0.25)) == pytest.approx(1)


def test_a_certain_and_wrong_prediction_costs_much_but_not_infinity():
    assert log_loss(np.array([1]), np.array([0.0])) == pytest.approx(-np.log(np.finfo(float).eps))
    assert log_loss(np.array([1]), np.array([1.0])) == pytest.approx(0, abs=1e-15)


def test_calibration_ratio_is_predicted_over_observed():
    assert calibration_ratio(np.array([1, 0, 0, 1]), np.array([0.9, 0.6, 0.5, 1.0])) == pytest.approx(1.5)


@given(st.integers(0, 2**32))
def test_calibration_error_is_the_mean_gap_of_equal_bins(seed):
    rng = np.random.default_rng(seed)
    prob = rng.permutation(np.linspace(0.01, 0.99, 200))
    label = (rng.random(200) < prob).astype(int)
    tenths = np.split(np.argsort(prob), 10)
    expected = np.mean([abs(prob[rows].mean() - label[rows].mean()) for rows in tenths])
    assert expected_calibration_error(label, prob, 10) == pytest.approx(expected, rel=1e-9)


def test_equal_predictions_share_a_bin_so_their_order_means_nothing():
    label = np.array([1, 0] * 50)
    assert expected_calibration_error(label, np.full(100, 0.5), 10) == 0
    assert expected_calibration_error(np.sort(label), np.full(100, 0.5), 10) == 0


@pytest.mark.parametrize("measure", EVERY)
def test_no_rows_and_bad_labels_and_bad_predictions_are_refused(measure):
    with pytest.raises(DataError, match="no rows to measure on; check the days measured"):
        measure(np.array([], dtype=int), np.array([]))
    with pytest.raises(DataError, match="expected labels 0 and 1, found 2"):
        measure(np.array([0, 2]), np.array([0.1, 0.2]))
    with pytest.raises(DataError, match="1 of 2 predictions are not finite numbers"):
        measure(np.array([0, 1]), np.array([0.1, np.nan]))


@pytest.mark.parametrize("measure", [*EVERY[1:4], EVERY[4]])
def test_a_logit_is_not_a_probability(measure):
    with pytest.raises(DataError, match=r"expected probabilities from 0 to 1, found 1.5; is it a logit\?"):
        measure(np.array([0, 1]), np.array([0.1, 1.5]))


@pytest.mark.parametrize("measure", EVERY[:1] + EVERY[2:4])
def test_one_class_is_refused_where_the_measure_needs_two(measure):
    with pytest.raises(DataError, match="all 3 labels are 0; it needs both a positive and a negative"):
        measure(np.zeros(3, dtype=int), np.full(3, 0.2))


def test_group_auc_needs_one_group_with_both_classes():
    with pytest.raises(DataError, match="none of 2 groups has both a positive and a negative label"):
        group_auc(np.array([0, 1]), np.array([0.1, 0.2]), np.array([0, 1]))
