"""Named models on the same winners and candidates: what `prerank evaluate` reports, and any model can be given to.

`compare` is the one way in: it takes arrays, so a model of any make can be judged; `judge` makes the arrays of rankers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from prerank.errors import DataError, SchemaMismatch
from prerank.evaluate.consistency import Candidates, candidate_draws
from prerank.evaluate.distributions import Histogram, histograms
from prerank.evaluate.estimates import ALL, Drawn, Draws, Estimate, Key, Resampling, Where, difference, estimate
from prerank.evaluate.winners import CalibrationCurve, Winners, calibration_curves, winner_draws
from prerank.types import Array

TEACHER = "teacher"
COMPARED = ("auc", "user_auc", "log_loss", "kl", "overlap@10", "overlap@100", "ndcg@10", "ndcg@100")
"""The metrics whose differences between models are told."""


@dataclass(frozen=True, slots=True)
class Predictions:
    """One model's probabilities: winners float [P, T], candidates float [Q, N, T] (None: not measured there)."""

    tasks: tuple[str, ...]
    winners: Array
    candidates: Array | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    """The numbers of one model, task and segment, on winners or on candidates, by metric."""

    model: str
    where: Where
    task: str
    segment: str
    metrics: Mapping[str, Estimate]


@dataclass(frozen=True, slots=True)
class Difference:
    """What the numbers of `model` are more than those of `against`, resample by resample, by metric."""

    model: str
    against: str
    where: Where
    task: str
    segment: str
    metrics: Mapping[str, Estimate]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Everything a report says, in plain values: `dataclasses.asdict` makes JSON of it.

    `models` in the order given, the teacher before them where there is one. `about` is the caller's: what was measured.
    """

    about: Mapping[str, str]
    tasks: tuple[str, ...]
    models: tuple[str, ...]
    has_teacher: bool
    segments: tuple[str, ...]
    how: Resampling
    num_impressions: int
    num_users: int
    num_questions: int
    num_candidates: int
    measured: tuple[Measured, ...]
    differences: tuple[Difference, ...]
    curves: tuple[CalibrationCurve, ...]
    histograms: tuple[Histogram, ...]
    cautions: tuple[str, ...] = field(default=())

    def metrics(self, model: str, where: Where, task: str, segment: str = ALL) -> Mapping[str, Estimate]:
        """One model's numbers by metric; empty where it was not measured."""
        wanted = (model, where, task, segment)
        return next((m.metrics for m in self.measured if (m.model, m.where, m.task, m.segment) == wanted), {})


def compare(
    models: Mapping[str, Predictions],
    winners: Winners,
    candidates: Candidates | None = None,
    teacher: Predictions | None = None,
    *,
    against: str | None = None,
    how: Resampling | None = None,
    about: Mapping[str, str] | None = None,
) -> Comparison:
    """Every model's numbers, and the differences of each to the model `against` (the first, unless named).

    With a teacher, it is a row of its own named "teacher", and every model is measured against it too. Candidates need
    one: nobody was shown them. Raises DataError or SchemaMismatch where arrays, names or tasks do not fit.
    """
    how = how or Resampling()
    base = _checked(models, winners, candidates, teacher, against)
    named = {**({} if teacher is None else {TEACHER: teacher}), **models}
    on_winners = {name: one.winners for name, one in named.items()}
    draws = winner_draws(on_winners, winners, None if teacher is None else teacher.winners, how)
    on_candidates: dict[str, Array] = {}
    if candidates is not None:
        assert teacher is not None
        assert teacher.candidates is not None
        on_candidates = {name: one.candidates for name, one in named.items() if one.candidates is not None}
        for name, more in candidate_draws(on_candidates, candidates, teacher.candidates, how).items():
            draws[name] = {**draws[name], **more}
    return Comparison(
        about=dict(about or {}),
        tasks=winners.tasks,
        models=tuple(named),
        has_teacher=teacher is not None,
        segments=winners.segments if len(winners.segments) > 1 else (),
        how=how,
        num_impressions=len(winners.label),
        num_users=len(set(winners.user.tolist())),
        num_questions=0 if candidates is None else len(candidates.valid),
        num_candidates=0 if candidates is None else candidates.valid.shape[1],
        measured=tuple(_measured(draws, how.level)),
        differences=tuple(_differences({name: draws[name] for name in models}, base, how.level)),
        curves=tuple(calibration_curves(on_winners, winners, how)),
        histograms=tuple(histograms(on_winners, on_candidates, winners, candidates)),
        cautions=tuple(_cautions(teacher is not None, candidates is not None)),
    )


def _checked(
    models: Mapping[str, Predictions],
    winners: Winners,
    candidates: Candidates | None,
    teacher: Predictions | None,
    against: str | None,
) -> str:
    if not models or TEACHER in models:
        raise DataError(f'expected at least one model and none named "{TEACHER}", found {list(models)}')
    base = next(iter(models)) if against is None else against
    if base not in models:
        raise DataError(f"against: expected one of {list(models)}, found {base!r}")
    if candidates is not None and (teacher is None or teacher.candidates is None):
        raise DataError("candidates: expected a teacher's predictions of them, for they have no labels; found none")
    for name, one in {**models, **({} if teacher is None else {TEACHER: teacher})}.items():
        check_tasks(name, one.tasks, winners.tasks)
    if candidates is not None:
        check_tasks("candidates", candidates.tasks, winners.tasks)
    return base


def check_tasks(what: str, found: Sequence[str], expected: Sequence[str]) -> None:
    """Raises SchemaMismatch naming the first difference, unless both are the same tasks in the same order."""
    if tuple(found) != tuple(expected):
        place = next((n for n, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), None)
        at = min(len(found), len(expected)) if place is None else place
        mine, theirs = (repr(names[at]) if at < len(names) else "none" for names in (found, expected))
        raise SchemaMismatch(
            f"{what}: expected the winners' tasks {list(expected)}, found {list(found)}; the first difference is "
            f"task {at}: {theirs} expected, {mine} found"
        )


def _measured(draws: Mapping[str, Draws], level: float) -> list[Measured]:
    return [
        Measured(name, *place, {metric: estimate(drawn, level) for metric, drawn in mine.items()})
        for name, own in draws.items()
        for place, mine in _by_place(own).items()
    ]


def _differences(draws: Mapping[str, Draws], base: str, level: float) -> list[Difference]:
    theirs = draws[base]
    found = []
    for name, own in draws.items():
        if name == base:
            continue
        for place, mine in _by_place(own).items():
            keys = {metric: Key(*place, metric) for metric in COMPARED if metric in mine}
            told = {m: estimate(difference(own[k], theirs[k]), level) for m, k in keys.items() if k in theirs}
            found += [Difference(name, base, *place, told)] if told else []
    return found


def _by_place(draws: Draws) -> dict[tuple[Where, str, str], dict[str, Drawn]]:
    """The same by (where, task, segment), then by metric."""
    found: dict[tuple[Where, str, str], dict[str, Drawn]] = {}
    for key, drawn in draws.items():
        found.setdefault((key.where, key.task, key.segment), {})[key.metric] = drawn
    return found


def _cautions(has_teacher: bool, has_candidates: bool) -> list[str]:
    told = [_CAUTIONS["user_auc"], _CAUTIONS["calibration_error"], _CAUTIONS["intervals"]]
    told += [_CAUTIONS["teacher"]] if has_teacher else []
    return told + ([_CAUTIONS["candidates"]] if has_candidates else [])


_CAUTIONS = {
    "user_auc": "Per-user AUC misleads for a model that sees what its user did earlier the same day. A user's rows "
    "hold a fixed number of clicks, so each one already seen leaves fewer to come: with labels shuffled within each "
    "user, where no order is better than another, a running click rate scores far below 0.5. Compare it only between "
    "models that see the same of the day, and trust log loss and AUC before it.",
    "calibration_error": "Calibration error is a mean of absolute gaps, which noise alone makes larger: with few rows "
    "it is above 0 for a perfect model, and its interval lies high.",
    "intervals": "Intervals say how far the choice of users moves a number, not the seed of a training or the choice "
    "of days. Many numbers are told: at a level of 95 % one in twenty lies outside its interval by chance.",
    "teacher": "KL, overlap and NDCG say how near a model is to its teacher, not that the teacher is right.",
    "candidates": "Candidates have no labels, for nobody saw them. There log loss, normalised entropy, calibration and "
    "per-user AUC take the teacher's probability for the label; equal predictions keep retrieval's order.",
}
