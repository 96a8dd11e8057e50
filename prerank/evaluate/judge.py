"""Rankers on later days: the arrays that `compare` judges, made of trained rankers and of floors anyone can compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from prerank.config import Config
from prerank.errors import ConfigError, DataError
from prerank.evaluate.compare import Comparison, Predictions, compare
from prerank.evaluate.consistency import Candidates
from prerank.evaluate.estimates import Resampling
from prerank.evaluate.ranking import item_rates
from prerank.evaluate.winners import Winners
from prerank.models.ranker import Ranker
from prerank.models.towers import TwoTower
from prerank.schema import Category, Owner
from prerank.train.candidates import Retrieved, candidate_probs, one_event_a_user, retrieve_candidates
from prerank.train.prepare import Prepared
from prerank.train.ranking import Impressions
from prerank.types import Array

MOST_QUESTIONS = 1_000
MOST_CANDIDATES = 1_000
MOST_SEGMENTS = 8
_FEW_VALUES = 64  # of a context category taken for segments without being named
ITEM_RATE, TRAINING_RATE = "each item's rate", "the training rate"


def judge(
    rankers: Mapping[str, Ranker],
    prepared: Prepared,
    config: Config,
    days: Sequence[str],
    *,
    towers: TwoTower | None = None,
    teacher: Ranker | None = None,
    by: str | None = None,
    how: Resampling | None = None,
) -> Comparison:
    """The named rankers and the floors on all impressions of ISO `days` and, given towers and a teacher, on candidates.

    Candidates are the first `MOST_CANDIDATES` the towers retrieve at the first moment of each of `MOST_QUESTIONS` users
    of the days. Segments are the commonest values of `by` (`segment_feature`). Differences are to the first ranker.
    Raises DataError where the days have no impressions, ConfigError where `by` is no category of user or context.
    """
    how = how or Resampling(seed=config.seed)
    by = segment_feature(config, prepared) if by is None else by
    events = np.flatnonzero(prepared.of_days(days))
    if not len(events):
        raise DataError(f"{days[0]}..{days[-1]}: expected impressions there to measure on, found none")
    impressions = Impressions(prepared, config, events)
    segments = Segments.of(prepared, config, by, events)
    user = np.asarray(prepared.events["user"])
    tasks = tuple(config.tasks)
    winners = Winners(tasks, impressions.labels.numpy(), user[events], segments.at(events), segments.names)
    asked = None if towers is None or teacher is None else ask(towers, prepared, config, days)
    candidates = None
    if asked is not None:
        candidates = Candidates(tasks, asked.valid, user[asked.events], segments.at(asked.events), segments.names)
    models = {name: predict(one, impressions, asked) for name, one in rankers.items()}
    models |= _floors(prepared, config, impressions, asked)
    about = {"funnel": config.name, "days": f"{days[0]} to {days[-1]}", "segments": by or "none"}
    if asked is not None:
        about["candidates"] = f"the first {asked.rows.shape[1]} the towers retrieve at each user's first moment"
    told = None if teacher is None else predict(teacher, impressions, asked)
    return compare(models, winners, candidates, told, how=how, about=about)


def ask(towers: TwoTower, prepared: Prepared, config: Config, days: Sequence[str]) -> Retrieved:
    """The candidates that rankers are judged on: see `judge`."""
    events = one_event_a_user(prepared, days, MOST_QUESTIONS, config.seed)
    keep = min(MOST_CANDIDATES, config.retrieval.keep)
    return retrieve_candidates(towers, prepared, config, events, keep)


def predict(ranker: Ranker, impressions: Impressions, asked: Retrieved | None) -> Predictions:
    """A ranker's probabilities of the impressions and, where asked for, of candidates; items as of each day's start."""
    if isinstance(ranker, nn.Module):
        ranker.eval()
    on_candidates = None
    if asked is not None:
        on_candidates = np.empty((*asked.rows.shape, len(ranker.tasks)), dtype=np.float32)
        days = np.asarray(impressions.day[asked.events])
        for day in np.unique(days):
            today = np.flatnonzero(days == day)
            user, items = impressions.users.at(asked.events[today]), impressions.items.on(int(day))
            on_candidates[today] = candidate_probs(ranker, user, items, asked.rows[today])
    return Predictions(ranker.tasks, impressions.predict(ranker), on_candidates)


def _floors(
    prepared: Prepared, config: Config, impressions: Impressions, asked: Retrieved | None
) -> dict[str, Predictions]:
    """What needs no ranker: each item's smoothed rate in the training days, and one rate for all."""
    trained_on = prepared.of_days(config.data.days("train"))
    item = np.asarray(prepared.events["item"])
    happened = [prepared.happened(task.label)[trained_on] for task in config.tasks.values()]
    by_item = np.stack([item_rates(one, item[trained_on], len(prepared.item_ids)) for one in happened], axis=1)
    overall = np.broadcast_to(np.array([one.mean() for one in happened]), by_item.shape)
    shown = item[impressions.events]
    return {
        name: Predictions(tuple(config.tasks), rates[shown], None if asked is None else rates[asked.rows.clip(min=0)])
        for name, rates in ((ITEM_RATE, by_item), (TRAINING_RATE, overall))
    }


def segment_feature(config: Config, prepared: Prepared) -> str:
    """The ranker's domain, or the first context category of few values; empty where there is none."""
    if config.ranker.domain:
        return config.ranker.domain
    sizes = prepared.transforms.sizes()
    context = config.features.context
    few = [
        name for name, kind in context.items() if isinstance(kind, Category) and sizes[f"context.{name}"] <= _FEW_VALUES
    ]
    return few[0] if few else ""


@dataclass(frozen=True, slots=True)
class Segments:
    """Every event's place in `names`: place int64 [E]."""

    names: tuple[str, ...]
    place: Array

    @classmethod
    def of(cls, prepared: Prepared, config: Config, by: str, events: Array) -> Segments:
        """The commonest `MOST_SEGMENTS` values of the category `by` among events int64 [P], and "other".

        No `by`: one segment of all. Raises ConfigError where it is no category of [features.context] or .user.
        """
        if not by:
            return cls((), np.zeros(len(prepared.events["user"]), dtype=np.int64))
        context, profile = config.features.context, config.features.user
        kind = context.get(by, profile.get(by))
        if not isinstance(kind, Category):
            known = [name for name, one in {**context, **profile}.items() if isinstance(one, Category)]
            raise ConfigError(f"segments: expected a category of [features.context] or .user, {known}, found {by!r}")
        codes = prepared.events[by] if by in context else prepared.users[by][prepared.events["user"]]
        owner: Owner = "context" if by in context else "user"
        counts = np.bincount(codes[events], minlength=prepared.transforms.sizes()[f"{owner}.{by}"])
        common = np.argsort(-counts, kind="stable")[:MOST_SEGMENTS]
        common = common[counts[common] > 0]
        names = [_name(by, prepared.transforms.names(owner, by), int(code)) for code in common]
        names += ["other"] if (counts > 0).sum() > len(common) else []
        place = np.full(len(counts), len(names) - 1)
        place[common] = np.arange(len(common))
        return cls(tuple(names), place[np.asarray(codes)])

    def at(self, events: Array) -> Array:
        """int64 [R] of events int64 [R]."""
        found: Array = self.place[events]
        return found


def _name(by: str, values: Sequence[object] | None, code: int) -> str:
    if code == 0:
        return f"{by} unknown"
    return f"{by} {code if values is None else values[code - 1]}"
