"""All models of a funnel file: prepare, train the towers, the heavy ranker if one is asked for, and the ranker.

Every step keeps what it made under the funnel's `work` folder by a key of its inputs, so a second training does again
only what changed, and an interrupted one goes on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from prerank.config import Config
from prerank.data.logs import Tables
from prerank.errors import ConfigError
from prerank.evaluate.ranking import evaluate_ranking
from prerank.evaluate.retrieval import evaluate_retrieval
from prerank.models.heavy import HeavyRanker
from prerank.models.ranker import Ranker
from prerank.models.towers import TwoTower
from prerank.train.distill import Taught
from prerank.train.lessons import fold_of, learn
from prerank.train.prepare import Prepared, preparation_key, prepare
from prerank.train.ranking import WATCH, Impressions, RankerExamples, train_ranker
from prerank.train.retrieval import train_retrieval
from prerank.train.segments import own_codes, train_segments
from prerank.train.teacher import FILE, load_teacher, save_teacher, train_heavy
from prerank.train.warm import Part, WarmStart
from prerank.types import Array, Report, silent

_FORM = 2  # raise it when a change to the training code should train again

Measure = Callable[[Ranker], Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Trained:
    """Every trained model with what it was trained on, and one record an epoch of each; `heavy` where asked for.

    `fresh` says, by "towers" and "ranker", why a model did not begin with the weights it was to begin with.
    """

    config: Config
    prepared: Prepared
    towers: TwoTower
    ranker: Ranker
    run: str
    retrieval_epochs: list[dict[str, float]]
    ranker_epochs: list[dict[str, float]]
    heavy: HeavyRanker | None = None
    heavy_epochs: tuple[dict[str, float], ...] = ()
    fresh: Mapping[str, str] = field(default_factory=dict)


def train(
    config: Config,
    tables: Tables,
    home: Path,
    report: Report = silent,
    teacher: Path | None = None,
    warm: WarmStart | None = None,
) -> Trained:
    """The models of `config` on `tables`; `home` is the funnel's folder of the store.

    Towers and ranker begin with the weights of `warm` where those fit; `Trained.fresh` says why which did not. A heavy
    ranker always begins from nothing. `teacher` is the file of one trained before, for the same features and tasks, to
    be taken instead of training one. Raises ConfigError where it is given and the funnel file has no [heavy_ranker].
    """
    training = _Training(config, tables, home / "work", report, warm)
    towers, retrieval_epochs = training.retrieval()
    heavy: HeavyRanker | None = None
    heavy_epochs: list[dict[str, float]] = []
    examples: RankerExamples | None = None
    measure: Callable[[str], Measure] = training.log_losses
    if config.heavy_ranker is not None:
        heavy, heavy_epochs = training.heavy(towers, teacher)
        taught = {part: training.taught(part, towers, heavy) for part in ("train", "validate")}
        examples, measure = taught["train"], training.divergences(taught["validate"])
    elif teacher is not None:
        raise ConfigError(f"{teacher}: a teacher is given, and the funnel file has no [heavy_ranker] to take it")
    ranker, ranker_epochs = training.ranker(towers, examples, measure)
    run = _key(training.keys)
    return Trained(
        config,
        training.prepared,
        towers,
        ranker,
        run,
        retrieval_epochs,
        ranker_epochs,
        heavy,
        tuple(heavy_epochs),
        training.fresh,
    )


def train_teacher(
    config: Config, tables: Tables, home: Path, report: Report = silent
) -> tuple[HeavyRanker, list[dict[str, float]]]:
    """The heavy ranker alone, with the towers it may take its tables from; what is made of both `train` finds there."""
    training = _Training(config, tables, home / "work", report)
    return training.heavy(training.retrieval()[0], None)


class _Training:
    """The steps, in order; `keys` grows by each step's key, which depends on those of the steps it reads."""

    def __init__(
        self, config: Config, tables: Tables, work: Path, report: Report, warm: WarmStart | None = None
    ) -> None:
        self.config, self.work, self.report, self.warm = config, work, report, warm
        self.fresh: dict[str, str] = {}
        self.prepared = prepare(config, tables, work, report)
        self.data = preparation_key(config, tables)
        self.plain = config.to_dict()
        self.keys: dict[str, str] = {}
        self.days = config.data.days("validate")
        self.events = np.flatnonzero(self.prepared.of_days(config.data.days("train")))

    def retrieval(self) -> tuple[TwoTower, list[dict[str, float]]]:
        """The two towers."""
        config, prepared = self.config, self.prepared
        key = self.keys["retrieval"] = _key(self.data, config.seed, self.plain["retrieval"], *self._warmed())

        def recall(towers: TwoTower) -> Mapping[str, float]:
            quality = evaluate_retrieval(towers, prepared, config, self.days, most=1000)
            return {"recall@100": quality.at("two towers", 100)}

        begin = partial(self._begin, "towers")
        return train_retrieval(prepared, config, self.work / f"retrieval-{key}", key, recall, self.report, begin)

    def _warmed(self) -> list[str]:
        """What a training that begins with a version's weights depends on beside the rest."""
        return [] if self.warm is None else [self.warm.version]

    def _begin(self, part: Part, model: nn.Module) -> None:
        """Give a model the weights it is to begin with, if there are some and they fit."""
        if self.warm is not None:
            why = self.warm.give(part, model, self.config, self.prepared.transforms)
            if why:
                self.fresh[part] = why

    def heavy(self, towers: TwoTower, given: Path | None) -> tuple[HeavyRanker, list[dict[str, float]]]:
        """The heavy ranker: the one `given`, or one trained on all training impressions."""
        if given is not None:
            self.keys["heavy"] = _key(hashlib.sha256(given.read_bytes()).hexdigest() if given.is_file() else "")
            return load_teacher(given, self.config, self.prepared.transforms), []
        options = self.plain["heavy_ranker"]
        key = self.keys["heavy"] = _key(
            self.data, self.config.seed, options, self.plain["tasks"], self._tables("heavy")
        )
        ranker, records = self._heavy(towers, self.events, key, "train the heavy ranker")
        path = self.work / f"heavy-{key}" / FILE
        if not path.exists():
            save_teacher(path, ranker, self.config, self.prepared.transforms)
        return ranker, records

    def _heavy(
        self, towers: TwoTower, events: Array, key: str, what: str
    ) -> tuple[HeavyRanker, list[dict[str, float]]]:
        folder = self.work / f"heavy-{key}"
        return train_heavy(
            self.prepared, self.config, towers, events, folder, key, self.log_losses(""), self.report, what
        )

    def taught(self, part: str, towers: TwoTower, heavy: HeavyRanker) -> Taught:
        """The lessons of the train or the validate days. Those of training are cross-fitted, others have no need."""
        config = self.config
        events = self.events if part == "train" else np.flatnonzero(self.prepared.of_days(self.days))
        folded = self._folded(towers) if part == "train" else []
        taught = self.plain["distillation"]
        assert isinstance(taught, dict)
        rule = {name: taught[name] for name in ("candidates", "among")}
        key = _key(self.keys, rule, part, len(folded))
        path = self.work / f"lessons-{key}.safetensors"
        if part == "train":
            self.keys["lessons"] = key
        lessons = learn(self.prepared, config, events, towers, heavy, folded, path, key, self.report)
        return Taught(self.prepared, config, lessons)

    def _folded(self, towers: TwoTower) -> list[HeavyRanker]:
        """One heavy ranker a fold of the users, trained on all other users; none where there are fewer than 2 folds."""
        options = self.config.heavy_ranker
        assert options is not None
        if options.folds < 2:
            return []
        fold = fold_of(self.prepared.events["user"][self.events], options.folds, self.config.seed)
        found = []
        for number in range(options.folds):
            key = f"{self.keys['heavy']}-{number + 1}of{options.folds}"
            what = f"train the heavy ranker without fold {number + 1} of {options.folds}"
            found.append(self._heavy(towers, self.events[fold != number], key, what)[0])
        return found

    def ranker(
        self, towers: TwoTower, examples: RankerExamples | None, measure: Callable[[str], Measure]
    ) -> tuple[Ranker, list[dict[str, float]]]:
        """The lightweight ranker, of examples or of the training impressions' labels; with [segments], of several."""
        config, prepared = self.config, self.prepared
        said = [self.plain[name] for name in ("ranker", "tasks", "segments", "distillation")]
        key = _key(self.data, config.seed, *said, self.keys.get("lessons"), self._tables("ranker"), *self._warmed())
        self.keys["ranker"] = key
        folder = self.work / f"ranker-{key}"
        if config.segments is None:
            begin = partial(self._begin, "ranker")
            after, report = measure(""), self.report
            return train_ranker(
                prepared, config, folder, key, after, report, towers=towers, examples=examples, begin=begin
            )
        if self.warm is not None:
            self.fresh["ranker"] = "rankers of [segments] are trained from nothing"
        given = Impressions(prepared, config, self.events) if examples is None else examples
        return train_segments(prepared, config, folder, key, self.events, given, measure, self.report, towers)

    def _tables(self, section: str) -> str:
        """The key of the towers, where the section's model takes its tables from them."""
        options = self.plain["heavy_ranker" if section == "heavy" else "ranker"]
        assert isinstance(options, dict)
        return self.keys["retrieval"] if options["tables"] == "retrieval" else ""

    def log_losses(self, segment: str) -> Measure:
        """Measures the validate days' log loss by task, and their mean; of one segment's impressions, or all ("")."""
        prepared, config = self.prepared, self.config

        def measured(ranker: Ranker) -> Mapping[str, float]:
            quality = evaluate_ranking(ranker, prepared, config, self.days, self._within(segment))
            losses = {f"{task}.log_loss": numbers["log_loss"] for task, numbers in quality.tasks.items()}
            return losses | {WATCH: float(np.mean(list(losses.values())))}

        return measured

    def divergences(self, taught: Taught) -> Callable[[str], Measure]:
        """Measures KL to the heavy ranker on the validate days, of one segment or of all ("")."""

        def of(segment: str) -> Measure:
            within = self._within(segment)
            kept = taught if within is None else taught.of(np.flatnonzero(within[taught.lessons.events]))

            def measured(ranker: Ranker) -> Mapping[str, float]:
                found = kept.divergence(ranker)
                return {**found, WATCH: found["kl"]}

            return measured

        return of

    def _within(self, segment: str) -> Array | None:
        """bool [E]: the events of a segment; None for all."""
        if not segment or self.config.segments is None:
            return None
        code = own_codes(self.prepared, self.config.segments)[segment]
        within: Array = np.asarray(self.prepared.events[self.config.segments.by]) == code
        return within


def _key(*said: object) -> str:
    code = [_FORM, torch.__version__.partition("+")[0], *said]
    return hashlib.sha256(json.dumps(code, sort_keys=True).encode()).hexdigest()[:16]
