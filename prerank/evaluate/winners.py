"""Any model's probabilities on winners (logged impressions) against what happened, and against a teacher's.

Every number is computed on all users and again on each resample of them; see `estimates.Drawn`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from prerank.errors import DataError
from prerank.evaluate.estimates import (
    Drawn,
    Draws,
    Key,
    Resampling,
    check_prob,
    check_segments,
    check_shape,
    parts,
    too_few,
)
from prerank.metrics.bootstrap import Resamples
from prerank.metrics.calibration import equal_mass_bins
from prerank.metrics.classification import SortedLabels, auc_per_group
from prerank.metrics.divergence import bernoulli_kl
from prerank.types import Array

NUM_BINS = 10
NEEDS: Mapping[str, str] = {
    "auc": "a row with label 1 and one with label 0",
    "user_auc": "a user with a row of label 1 and one of label 0",
    "normalised_entropy": "a row with label 1 and one with label 0",
    "calibration_ratio": "a row with label 1",
}
"""What a metric needs to be defined; every other needs rows alone."""
_EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True, slots=True)
class Winners:
    """P logged impressions. label [P, T] 0 or 1 of `tasks`; user int [P]; segment int [P], places in `segments`.

    Raises DataError for arrays that do not meet, or a label that is neither 0 nor 1.
    """

    tasks: tuple[str, ...]
    label: Array
    user: Array
    segment: Array
    segments: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.label.ndim != 2 or not len(self.label):
            raise DataError(f"winners: expected labels [P, T] of at least one row, found {list(self.label.shape)}")
        check_shape("winners, labels", self.label, (len(self.label),), self.tasks)
        strange = (self.label != 0) & (self.label != 1)
        if strange.any():
            row, task = np.argwhere(strange)[0]
            raise DataError(
                f"winners, {self.tasks[task]}: expected labels 0 and 1, found {self.label[row, task]} in row {row}"
            )
        if self.user.shape != (len(self.label),):
            raise DataError(f"winners: expected a user for each of {len(self.label)} rows, found {self.user.shape[0]}")
        check_segments("winners", self.segment, self.segments, len(self.label))

    def check(self, what: str, prob: Array) -> None:
        """Refuse prob that is not [P, T] of probabilities; `what` names it in the DataError or SchemaMismatch."""
        check_prob(f"{what} on winners", prob, (len(self.label),), self.tasks)


def winner_draws(
    models: Mapping[str, Array], winners: Winners, teacher: Array | None = None, how: Resampling | None = None
) -> dict[str, Draws]:
    """Every number of every model, by task and segment. models: prob float [P, T] by name; teacher float [P, T].

    auc, user_auc (`group_auc`), log_loss, normalised_entropy, calibration_ratio, calibration_error (deciles of the
    segment), mean_prob, mean_label, and with a teacher kl (KL(teacher || model)). All models are measured on the same
    resamples. Raises DataError or SchemaMismatch for predictions that do not fit `winners`.
    """
    how = how or Resampling()
    named = dict(models) if teacher is None else {**models, "teacher": teacher}
    for name, prob in named.items():
        winners.check(name, prob)
    found: dict[str, dict[Key, Drawn]] = {name: {} for name in models}
    for part in parts(winners.segment, winners.segments):
        user = winners.user[part.rows]
        num_users = len(np.unique(user))
        few = too_few(num_users)
        resamples = None if few else Resamples.of(user, how.seed, how.draws)
        for number, task in enumerate(winners.tasks):
            label = winners.label[part.rows, number]
            of_teacher = None if teacher is None else teacher[part.rows, number]
            for name, prob in models.items():
                mine = prob[part.rows, number]
                for metric, drawn in _numbers(label, mine, of_teacher, resamples, few, num_users).items():
                    found[name][Key("winners", task, part.segment, metric)] = drawn
    return dict(found)


def _numbers(
    label: Array, prob: Array, teacher: Array | None, resamples: Resamples | None, few: str, num_users: int
) -> dict[str, Drawn]:
    names = ["auc", "user_auc", "log_loss", "normalised_entropy", "calibration_ratio", "calibration_error"]
    names += [*([] if teacher is None else ["kl"]), "mean_prob", "mean_label"]
    if resamples is None:
        return {name: Drawn(np.empty(0), len(label), num_users, few) for name in names}
    values = _sums(label, prob, teacher, resamples)
    drawn = {name: Drawn.of(values[name], len(label), num_users, NEEDS.get(name, "rows")) for name in values}
    sorted_labels = SortedLabels.of(label, prob)
    aucs = np.array([sorted_labels.auc(weight) for weight in resamples.weights()])
    drawn["auc"] = Drawn.of(aucs, len(label), num_users, NEEDS["auc"])
    drawn["user_auc"] = _user_auc(label, prob, resamples)
    return {name: drawn[name] for name in names}


def _sums(label: Array, prob: Array, teacher: Array | None, resamples: Resamples) -> dict[str, Array]:
    """Every number that is a function of sums over rows -> float64 [D + 1] each."""
    y, p = label.astype(np.float64), prob.astype(np.float64)
    kept = p.clip(_EPS, 1 - _EPS)
    columns = [np.ones(len(y)), y, p, -np.where(y > 0, np.log(kept), np.log1p(-kept))]
    columns += [] if teacher is None else [bernoulli_kl(teacher, prob)]
    rows, positives, predicted, loss, *kl = resamples.sums(np.stack(columns, axis=1)).T
    gaps = resamples.sums_by_group(equal_mass_bins(p, NUM_BINS), NUM_BINS, p - y)
    rate = positives / rows
    with np.errstate(divide="ignore", invalid="ignore"):
        background = -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate))
        ratio = np.where(positives > 0, predicted / positives, np.nan)
    return {
        "log_loss": loss / rows,
        "normalised_entropy": loss / rows / np.where(background > 0, background, np.nan),
        "calibration_ratio": ratio,
        "calibration_error": np.abs(gaps).sum(1) / rows,
        **({"kl": kl[0] / rows} if kl else {}),
        "mean_prob": predicted / rows,
        "mean_label": rate,
    }


def _user_auc(label: Array, prob: Array, resamples: Resamples) -> Drawn:
    _, per_user, size = auc_per_group(label, prob, resamples.member)
    defined = ~np.isnan(per_user)
    own = np.stack([np.where(defined, per_user, 0) * size, np.where(defined, size, 0)], axis=1)
    total, rows = resamples.sums_of_users(own).T
    values = np.divide(total, rows, out=np.full(len(rows), np.nan), where=rows > 0)
    return Drawn.of(values, int(size[defined].sum()), int(defined.sum()), NEEDS["user_auc"])


@dataclass(frozen=True, slots=True)
class CalibrationCurve:
    """Of one model and task, bin by bin: mean prediction, mean label with its interval over users, rows."""

    model: str
    task: str
    mean_prob: tuple[float, ...]
    mean_label: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    rows: tuple[int, ...]


def calibration_curves(models: Mapping[str, Array], winners: Winners, how: Resampling) -> list[CalibrationCurve]:
    """By decile of each model's prediction, over all winners; none where users are too few.

    The bins are those of all users; a resample in which a bin is empty says nothing of it.
    """
    if too_few(len(np.unique(winners.user))):
        return []
    resamples = Resamples.of(winners.user, how.seed, how.draws)
    tails = [(1 - how.level) / 2, (1 + how.level) / 2]
    return [
        _curve(name, task, winners.label[:, number], prob[:, number], resamples, tails)
        for number, task in enumerate(winners.tasks)
        for name, prob in models.items()
    ]


def _curve(
    model: str, task: str, label: Array, prob: Array, resamples: Resamples, tails: Sequence[float]
) -> CalibrationCurve:
    p = prob.astype(np.float64)
    bins = equal_mass_bins(p, NUM_BINS)
    rows, labels, probs = (
        resamples.sums_by_group(bins, NUM_BINS, column) for column in (np.ones(len(p)), label.astype(np.float64), p)
    )
    some = rows[0] > 0
    rates = np.divide(labels, rows, out=np.full(rows.shape, np.nan), where=rows > 0)[:, some]
    low, high = np.nanquantile(rates[1:], tails, axis=0)
    mean_prob, mean_label, lows, highs = (
        tuple(float(x) for x in column) for column in (probs[0][some] / rows[0][some], rates[0], low, high)
    )
    return CalibrationCurve(model, task, mean_prob, mean_label, lows, highs, tuple(int(n) for n in rows[0][some]))
