"""The gates a version must hold before it may serve: each a bound, what was measured, and whether it holds.

Measured with the published files, not with the models still in memory, on the validate days of the version's own
funnel file, which are the newest that it was not trained on; the live version, where a bound is against it, on the
same days of the same log. What was found is written to validation.json, and `Registry.promote` reads it there.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import isfinite, isnan, nan
from pathlib import Path

from prerank.bundle.load import Bundle, load
from prerank.bundle.manifest import read_manifest
from prerank.bundle.registry import Gate, Registry
from prerank.config import Bound
from prerank.data.logs import Tables
from prerank.errors import BundleError, PrerankError
from prerank.evaluate.retrieval import RetrievalQuality
from prerank.lifecycle.beside import embedding_drift, latencies_ms
from prerank.lifecycle.coverage import (
    COVERAGE,
    MOST_EVENTS,
    Coverage,
    complete_days,
    log_coverage,
    lowest_coverage,
    training_coverage,
)
from prerank.lifecycle.measured import Measured, of_live, tasks_of
from prerank.lifecycle.served import Served, bf16_difference, parity, serve_again, served_coverage
from prerank.lifecycle.user_shelves import has_users
from prerank.models.heavy import HeavyRanker
from prerank.train.distill import Taught
from prerank.train.lessons import learn
from prerank.train.prepare import Prepared
from prerank.types import Report, silent

LESSONS = 2_000
DEFAULTS: Mapping[str, Bound] = {
    "golden": Bound(at_least=1.0),
    "finite_weights": Bound(at_least=1.0),
    "index_recall": Bound(at_least=0.9),
    "complete_days": Bound(at_least=0.1),
    "feature_coverage": Bound(at_least=0.1),
    "served_parity": Bound(at_most=0.001),
}
"""The gates of every version, whether or not its funnel file names them; one that it names is as it says."""


def validate(
    home: Path,
    version: str,
    prepared: Prepared,
    tables: Tables,
    teacher: HeavyRanker | None = None,
    report: Report = silent,
    users: str | None = None,
) -> list[Gate]:
    """Every gate of the version's own funnel file and of DEFAULTS, measured and written to its validation.json.

    `prepared` is the log as the version's transforms encode it, `tables` the same unencoded; `teacher` is asked for
    `kl_loss`. A version that cannot be loaded fails `golden` and is measured no further; a gate that cannot be measured
    fails, and says why. `served_parity` needs the user store, at the url `users` or in the folder: it is asked where
    there is one or the file names it.
    """
    registry = Registry(home)
    path = registry.path(version)
    try:
        bundle = load(path)
    except BundleError as error:
        gates = [Gate("golden", "at least 1", 0.0, False, off=-1.0, about=str(error))]
    else:
        days = tuple(bundle.config.data.days("validate"))
        ours = Measured(bundle, prepared, bundle.config, days, home)
        both = _Both(ours, tables, registry, teacher, report, users)
        bounds = {name: bound for name, bound in DEFAULTS.items() if name != "served_parity" or both.has_users}
        wanted = {**bundle.config.validate, **{n: b for n, b in bounds.items() if n not in bundle.config.validate}}
        gates = [_gate(both, name, bound) for name, bound in wanted.items()]
    registry.write_validation(version, gates)
    return gates


@dataclass(frozen=True, slots=True)
class Found:
    """What was measured of the version, of the live one where it was asked, and what on."""

    value: float
    live: float | None = None
    about: str = ""


@dataclass(frozen=True)  # no slots: what is measured is kept after the first gate that asks
class _Both:
    """The version that is validated, and what is needed to ask the live one the same."""

    ours: Measured
    tables: Tables
    registry: Registry
    teacher: HeavyRanker | None
    report: Report
    users: str | None

    @property
    def has_users(self) -> bool:
        """Whether there is a user store."""
        return has_users(self.ours.home, self.users)

    @cached_property
    def live(self) -> Measured | None:
        """The live version on the same days; None where nothing is live, or it is this one. Raises what keeps it."""
        version = self.registry.live()
        if version is None or version == self.ours.bundle.version:
            return None
        try:
            bundle = load(self.registry.path(version))
            return of_live(bundle, self.ours.config, self.ours.days, self.tables, self.ours.home, self.report)
        except PrerankError as error:
            raise BundleError(
                f"the live version {version} cannot be measured: {error}; roll back to one that can be, or bound this "
                "gate by absolute numbers alone"
            ) from None

    @cached_property
    def served(self) -> Served:
        """Impressions of the days, served again."""
        return serve_again(self.ours, self.tables, self.users)

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that are compared."""
        return tuple(self.ours.config.tasks)

    def worst(self, metric: str, bound: Bound) -> Found:
        """The largest number of a task; against live, of a task that both have."""
        live = self.live if bound.is_against_live else None
        if live is None:
            return Found(self.ours.worst(metric, self.tasks))
        tasks = tasks_of(self.ours, live)
        return Found(self.ours.worst(metric, tasks), live.worst(metric, tasks), f"tasks {', '.join(tasks)}")

    def kl(self, bound: Bound) -> Found:
        """KL to the teacher on impressions and candidates of the days, of both with the same teacher."""
        if self.teacher is None:
            raise BundleError("the heavy ranker that taught this version is not at hand; train and publish in one go")
        ours, config = self.ours, self.ours.config
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "lessons.safetensors"
            events = ours.events(LESSONS)
            lessons = learn(ours.prepared, config, events, ours.bundle.towers, self.teacher, [], path, "gate")
        value = Taught(ours.prepared, config, lessons).divergence(ours.bundle.scorer.ranker)["kl"]
        live = self.live if bound.is_against_live else None
        if live is None:
            return Found(value)
        if tuple(live.config.tasks) != tuple(config.tasks):
            raise BundleError(f"the live version predicts {list(live.config.tasks)}, the teacher {list(config.tasks)}")
        return Found(value, Taught(live.prepared, live.config, lessons).divergence(live.bundle.scorer.ranker)["kl"])

    def coverage(self) -> Found:
        """The newest day and what is served, against the training days, and against those of the live version."""
        ours = self.ours
        events = ours.events(MOST_EVENTS)
        today = log_coverage(ours.prepared, ours.config, events)
        now = [Coverage(f"the impressions of {ours.days[-1]}", len(events), today)]
        if self.has_users:
            served = self.served
            now.append(Coverage("requests as served", len(served.events), served_coverage(ours, served)))
        before = [Coverage("the training impressions", 0, training_coverage(ours.prepared, ours.config))]
        live = self.registry.live()
        if live is not None and live != ours.bundle.version:
            told = _told_coverage(self.registry.path(live))
            before.append(Coverage("the live version's training impressions", 0, told))
        return Found(*_with_about(lowest_coverage(now, before)))

    def latency(self, bound: Bound) -> Found:
        """Both in turns, in one go, for a machine's speed changes."""
        live = self.live if bound.is_against_live else None
        bundles: list[Bundle] = [one.bundle for one in (self.ours, live) if one is not None]
        times = latencies_ms(*bundles)
        return Found(times[0], times[1] if live is not None else None)

    def drift(self) -> Found:
        """Against live, always; nothing drifts from nothing."""
        live = self.live
        return Found(0.0, about="nothing is live") if live is None else Found(embedding_drift(self.ours, live))

    def each(self, of: Callable[[Measured], float], bound: Bound) -> Found:
        """The same number of both."""
        live = self.live if bound.is_against_live else None
        return Found(of(self.ours), None if live is None else of(live))


MEASURES: Mapping[str, Callable[[_Both, Bound], Found]] = {
    "retrieval_recall": lambda both, bound: both.each(lambda one: one.retrieval.at("two towers", 100), bound),
    "recall_over_popularity": lambda both, bound: both.each(lambda one: _ratio(one.retrieval), bound),
    "normalised_entropy": lambda both, bound: both.worst("normalised_entropy", bound),
    "calibration_error": lambda both, bound: both.worst("calibration_error", bound),
    "kl_loss": lambda both, bound: both.kl(bound),
    "index_recall": lambda both, bound: both.each(Measured.index_recall, bound),
    "latency_ms": lambda both, bound: both.latency(bound),
    "memory_mib": lambda both, bound: both.each(Measured.memory_mib, bound),
    "golden": lambda both, _: Found(1.0),  # `load` has just reproduced every answer, or there would be no bundle
    "finite_weights": lambda both, _: Found(*_with_about(both.ours.finite_share())),
    "complete_days": lambda both, _: Found(*_with_about(_days(both.ours))),
    "feature_coverage": lambda both, _: both.coverage(),
    "served_parity": lambda both, _: Found(*_with_about(parity(both.ours, both.served))),
    "bf16_difference": lambda both, _: Found(*_with_about(bf16_difference(both.ours))),
    "embedding_drift": lambda both, _: both.drift(),
}


def _with_about(found: tuple[float, str]) -> tuple[float, None, str]:
    return found[0], None, found[1]


def _days(ours: Measured) -> tuple[float, str]:
    return complete_days(ours.prepared, ours.config.data.train[0], ours.days[-1])


def _told_coverage(path: Path) -> dict[str, float]:
    """What a version's manifest says of its training; nothing where it was published before they said it."""
    metrics = read_manifest(path)["metrics"]
    told = metrics.get(COVERAGE, {}) if isinstance(metrics, Mapping) else {}
    return {str(name): float(share) for name, share in told.items()} if isinstance(told, Mapping) else {}


def _ratio(quality: RetrievalQuality) -> float:
    floor = quality.at("popularity", 100)
    return quality.at("two towers", 100) / floor if floor else float("inf")


def _gate(both: _Both, name: str, bound: Bound) -> Gate:
    try:
        found = MEASURES[name](both, bound)
    except PrerankError as error:
        return Gate(name, _words(bound), nan, False, about=str(error))
    least, most = _limits(bound, found.live)
    value, off = found.value, 0.0
    if least is not None and value < least:
        off = value - least
    elif most is not None and value > most:
        off = value - most
    about = found.about
    if bound.is_against_live and found.live is None:
        about = "; ".join(one for one in (about, "nothing is live to compare with") if one)
    is_known = not isnan(value) and not (found.live is not None and isnan(found.live))
    return Gate(name, _words(bound), value, is_known and not off, off, found.live, about)


def _limits(bound: Bound, live: float | None) -> tuple[float | None, float | None]:
    """The largest of the lower bounds and the smallest of the upper ones, absolute and against live."""
    least = [bound.at_least]
    most = [bound.at_most]
    if live is not None and isfinite(live):
        least += [_plus(live, bound.not_below_live_by, -1.0), _times(live, bound.at_least_of_live)]
        most += [_plus(live, bound.not_above_live_by, 1.0), _times(live, bound.at_most_of_live)]
    lows, highs = [one for one in least if one is not None], [one for one in most if one is not None]
    return max(lows, default=None), min(highs, default=None)


def _plus(live: float, by: float | None, sign: float) -> float | None:
    return None if by is None else live + sign * by


def _times(live: float, share: float | None) -> float | None:
    return None if share is None else live * share


_WORDS = {
    "at_least": "at least {:g}",
    "at_most": "at most {:g}",
    "not_below_live_by": "not below live by more than {:g}",
    "not_above_live_by": "not above live by more than {:g}",
    "at_least_of_live": "at least {:g} of live",
    "at_most_of_live": "at most {:g} of live",
}


def _words(bound: Bound) -> str:
    words = [said.format(number) for name, said in _WORDS.items() if (number := getattr(bound, name)) is not None]
    return ", ".join(words)
