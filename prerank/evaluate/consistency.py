"""Does a light ranker let through what the teacher would have chosen? On candidates, which nobody was shown.

There are no labels here: the teacher's probability stands in their place, so every number says how near a model is to
the teacher, not how right either is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from prerank.errors import DataError
from prerank.evaluate.estimates import Drawn, Draws, Key, Resampling, check_prob, check_segments, parts, too_few
from prerank.metrics.bootstrap import Resamples
from prerank.metrics.divergence import bernoulli_kl, xlogx
from prerank.metrics.survival import falling_order, ndcg_of_order, soft_auc_per_query, survival_per_query
from prerank.types import Array

TOPS = (10, 100)
"""m: the teacher's top whose survival is told; one not below the number of candidates says nothing and is left out."""
KS = (10, 20, 50, 100, 200, 500)
"""k: how many the model lets through."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """Q questions of N candidates. valid bool [Q, N]; user int [Q]; segment int [Q], places in `segments`.

    Columns are best kept in retrieval's order: equal predictions are ordered by column.
    Raises DataError for arrays that do not meet, or where no candidate is valid.
    """

    tasks: tuple[str, ...]
    valid: Array
    user: Array
    segment: Array
    segments: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.valid.ndim != 2 or self.valid.dtype != bool or not self.valid.any():
            raise DataError(
                f"candidates: expected valid bool [Q, N] with at least one True, found {self.valid.dtype} "
                f"{list(self.valid.shape)} with {int((self.valid != 0).sum())}"
            )
        if self.user.shape != (len(self.valid),):
            raise DataError(
                f"candidates: expected a user for each of {len(self.valid)} questions, found {self.user.shape[0]}"
            )
        check_segments("candidates", self.segment, self.segments, len(self.valid))

    def check(self, what: str, prob: Array) -> None:
        """Refuse prob that is not [Q, N, T] of probabilities; `what` names it in the DataError or SchemaMismatch."""
        check_prob(f"{what} on candidates", prob, self.valid.shape, self.tasks, self.valid)


def survival_name(top: int, k: int) -> str:
    """The share of the teacher's first `top` among the model's first k: "overlap@10", "top10_in_50"."""
    return f"overlap@{top}" if top == k else f"top{top}_in_{k}"


def survivals(num_candidates: int) -> list[tuple[int, int]]:
    """Each (top, k) told of questions with that many candidates."""
    return [(top, k) for top in TOPS for k in KS if top <= k < num_candidates]


def candidate_draws(
    models: Mapping[str, Array], candidates: Candidates, teacher: Array, how: Resampling | None = None
) -> dict[str, Draws]:
    """Every number of every model, by task and segment. models: prob float [Q, N, T] by name; teacher float [Q, N, T].

    Over candidates: kl, log_loss (cross-entropy with the teacher's probability as the label), normalised_entropy (that
    over the entropy of the teacher's mean), calibration_ratio (predicted over the teacher's), mean_prob, mean_teacher.
    Over questions: user_auc (the expected AUC of a question if labels were drawn from the teacher), overlap@m,
    top<m>_in_<k> and ndcg@m (`metrics.survival`). All models are measured on the same resamples of users.
    Raises DataError or SchemaMismatch for predictions that do not fit `candidates`.
    """
    how = how or Resampling()
    for name, prob in {**models, "teacher": teacher}.items():
        candidates.check(name, prob)
    cut = [
        (part, *_resamples(candidates.user[part.rows], how)) for part in parts(candidates.segment, candidates.segments)
    ]
    found: dict[str, dict[Key, Drawn]] = {name: {} for name in models}
    for number, task in enumerate(candidates.tasks):
        truth = _Truth.of(teacher[..., number], candidates.valid)
        for name, prob in models.items():
            sums, shares = _per_question(truth, prob[..., number])
            for part, resamples, few in cut:
                rows = part.rows
                mine = {k: v[rows] for k, v in sums.items()}, {k: v[rows] for k, v in shares.items()}
                users = len(np.unique(candidates.user[rows]))
                for metric, drawn in _numbers(*mine, resamples, few, users).items():
                    found[name][Key("candidates", task, part.segment, metric)] = drawn
    return dict(found)


def _resamples(user: Array, how: Resampling) -> tuple[Resamples | None, str]:
    few = too_few(len(np.unique(user)))
    return (None if few else Resamples.of(user, how.seed, how.draws)), few


@dataclass(frozen=True, slots=True)
class _Truth:
    """One task's teacher [Q, N], made once for all models: its order, and each question's sum of entropies."""

    teacher: Array
    valid: Array
    num_valid: Array
    order: Array
    entropy: Array

    @classmethod
    def of(cls, teacher: Array, valid: Array) -> _Truth:
        t = np.where(valid, teacher, 0).astype(np.float64)
        entropy = -(xlogx(t) + xlogx(1 - t)).sum(1)
        return cls(teacher, valid, valid.sum(1), falling_order(teacher, valid), entropy)


def _per_question(truth: _Truth, prob: Array) -> tuple[dict[str, Array], dict[str, Array]]:
    """Sums over each question's candidates, and each question's shares (NaN where not defined); float64 [Q] each."""
    valid, num_candidates = truth.valid, truth.valid.shape[1]
    t = np.where(valid, truth.teacher, 0).astype(np.float64)
    p = np.where(valid, prob, 0).astype(np.float64)
    kl = bernoulli_kl(t, p).sum(1)  # 0 where not valid: equal
    loss = kl + truth.entropy  # cross-entropy is both
    sums = {"rows": truth.num_valid.astype(np.float64), "kl": kl, "loss": loss, "prob": p.sum(1), "teacher": t.sum(1)}
    order = falling_order(prob, valid)
    shares = {"user_auc": soft_auc_per_query(order, prob, truth.teacher, valid)}
    for top in TOPS:
        ks = [k for m, k in survivals(num_candidates) if m == top]
        if ks:
            kept_of = survival_per_query(truth.order, order, truth.num_valid, top, ks)
            shares |= {survival_name(top, k): kept_of[:, place] for place, k in enumerate(ks)}
    for top in TOPS:
        if top < num_candidates:
            shares[f"ndcg@{top}"] = ndcg_of_order(order, truth.teacher, valid, top)
    return sums, shares


def _numbers(
    sums: Mapping[str, Array], shares: Mapping[str, Array], resamples: Resamples | None, few: str, num_users: int
) -> dict[str, Drawn]:
    num_rows, num_questions = int(sums["rows"].sum()), len(sums["rows"])
    names = ["kl", "log_loss", "normalised_entropy", "calibration_ratio", "mean_prob", "mean_teacher", *shares]
    if resamples is None:
        return {name: Drawn(np.empty(0), num_rows, num_users, few) for name in names}
    rows, kl, loss, prob, teacher = resamples.sums(np.stack(list(sums.values()), axis=1)).T
    defined = np.stack([~np.isnan(column) for column in shares.values()], axis=1)
    filled = np.where(defined, np.stack(list(shares.values()), axis=1), 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        means = resamples.sums(filled) / resamples.sums(defined.astype(np.float64))
        rate = teacher / rows
        background = -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate))
        over_rows = {
            "kl": kl / rows,
            "log_loss": loss / rows,
            "normalised_entropy": loss / rows / np.where(background > 0, background, np.nan),
            "calibration_ratio": np.where(teacher > 0, prob / teacher, np.nan),
            "mean_prob": prob / rows,
            "mean_teacher": rate,
        }
    needs = "a candidate the teacher gives a probability above 0"
    drawn = {name: Drawn.of(values, num_rows, num_users, needs) for name, values in over_rows.items()}
    for place, name in enumerate(shares):
        drawn[name] = Drawn.of(means[:, place], num_questions, num_users, needs)
    return drawn
