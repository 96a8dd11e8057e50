"""Retrieval of later days' relevant items over the whole catalogue, beside floors that anyone can compute.

One question a user: everything known at the start of the first day ranks every item, those the user had found relevant
before left out; recall@k is the share of the days' new relevant items among the first k, averaged over users.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeAlias
from zoneinfo import ZoneInfo

import numpy as np
import torch
from torch import Tensor

from prerank.config import Config
from prerank.errors import DataError
from prerank.metrics.ranking import recall_per_query
from prerank.models.towers import TwoTower
from prerank.train.examples import UserExamples, item_tensors
from prerank.train.prepare import Prepared
from prerank.train.retrieval import ItemPopularity
from prerank.types import Array, day_number

KS = (20, 50, 100, 200)
EASE_LAMBDA = 300.0
EASE_MOST_ITEMS = 20_000
MOST_SCORED = 1 << 26  # similarities held at once

Score: TypeAlias = Callable[[Array], Tensor]
"""Questions int64 [B] (positions) -> one number for every item, float32 [B, I]; a larger one ranks higher."""


@dataclass(frozen=True, slots=True)
class Questions:
    """Q users with something new to find, each with all it had found relevant before the days began.

    user int64 [Q] position in Prepared; event int64 [Q] the user's first event of the days (its context is the
    request's); relevant, seen: (question, item) pairs int64 [P, 2], in order of question.
    """

    first_day: str
    start_ms: int
    user: Array
    event: Array
    relevant: Array
    seen: Array

    @classmethod
    def of(cls, prepared: Prepared, config: Config, days: Sequence[str], most: int | None = None) -> Questions:
        """The questions of ISO `days`; with `most`, that many of them drawn with the funnel's seed.

        Raises DataError where no user has anything new to find.
        """
        log, num_items = prepared.events, len(prepared.item_ids)
        in_days = prepared.of_days(days)
        start_ms = day_start_ms(days[0], config.data.timezone)
        relevant = prepared.happened(config.retrieval.relevant)
        pair = np.asarray(log["user"], dtype=np.int64) * num_items + log["item"]
        seen = np.unique(pair[relevant & (np.asarray(log["time_ms"]) < start_ms)])
        wanted = np.setdiff1d(pair[relevant & in_days], seen)
        users = np.unique(wanted // num_items)
        if not len(users):
            raise DataError(f"{days[0]}..{days[-1]}: no user has a new {config.retrieval.relevant} there to retrieve")
        if most is not None and most < len(users):
            users = np.sort(np.random.default_rng(config.seed).choice(users, most, replace=False))
        rows = np.flatnonzero(in_days)
        first = rows[np.searchsorted(log["user"][rows], users)]
        pairs = [_pairs(known, users, num_items) for known in (wanted, seen)]
        return cls(days[0], start_ms, users, first, *pairs)

    def __len__(self) -> int:
        return len(self.user)


def _pairs(known: Array, users: Array, num_items: int) -> Array:
    owner = known // num_items
    place = np.searchsorted(users, owner).clip(max=len(users) - 1)
    kept = users[place] == owner
    return np.stack([place[kept], known[kept] % num_items], axis=1)


def day_start_ms(iso_day: str, timezone: str) -> int:
    """The UTC milliseconds at which a local day begins."""
    return int(datetime.fromisoformat(iso_day).replace(tzinfo=ZoneInfo(timezone)).timestamp() * 1000)


@torch.inference_mode()
def recalls(questions: Questions, score: Score, num_items: int, ks: Sequence[int] = KS) -> Array:
    """recall@k of every question -> float64 [Q, len(ks)]."""
    found = np.zeros((len(questions), len(ks)))
    most = min(max(ks), num_items)
    step = max(1, MOST_SCORED // num_items)
    for begin in range(0, len(questions), step):
        chosen = np.arange(begin, min(begin + step, len(questions)))
        similarity = score(chosen).clone()
        similarity[_within(questions.seen, chosen)] = -torch.inf
        top = similarity.topk(most).indices.numpy()
        row, item = (column.numpy() for column in _within(questions.relevant, chosen))
        offsets = np.searchsorted(row, np.arange(len(chosen) + 1))
        found[chosen] = np.stack([recall_per_query(top, offsets, item, min(k, most)) for k in ks], axis=1)
    return found


def _within(pairs: Array, chosen: Array) -> tuple[Tensor, Tensor]:
    begin, end = np.searchsorted(pairs[:, 0], [chosen[0], chosen[-1] + 1])
    return torch.from_numpy(pairs[begin:end, 0] - chosen[0]), torch.from_numpy(pairs[begin:end, 1].copy())


def tower_score(towers: TwoTower, prepared: Prepared, config: Config, questions: Questions) -> Score:
    """Two towers frozen as they are, users and popularity as known at the start of the questions' first day."""
    towers.eval()
    users = UserExamples(prepared, config.features)
    with torch.inference_mode():
        popularity = ItemPopularity(prepared, config).at(questions.first_day)
        item_ID = towers.item_side(item_tensors(prepared), popularity)

    def score(chosen: Array) -> Tensor:
        start = np.full(len(chosen), questions.start_ms)
        return towers.user_side(users.at(questions.event[chosen], start)) @ item_ID.T

    return score


def popularity_score(prepared: Prepared, config: Config, questions: Questions) -> Score:
    """The floor that knows no user: how often each item was relevant since the training days began."""
    log = prepared.events
    day = np.asarray(log["day"])
    since = (day >= day_number(config.data.train[0])) & (day < day_number(questions.first_day))
    rows = np.flatnonzero(prepared.happened(config.retrieval.relevant) & since)
    counts = torch.from_numpy(np.bincount(log["item"][rows], minlength=len(prepared.item_ids))).float()
    return lambda chosen: counts.expand(len(chosen), -1)


def ease_score(prepared: Prepared, config: Config, questions: Questions) -> Score | None:
    """EASE (Steck 2019, eq. 8) on who found what relevant before the first day; None over EASE_MOST_ITEMS items.

    A linear item-to-item model without hidden units; lambda is EASE_LAMBDA.
    """
    num_items = len(prepared.item_ids)
    if num_items > EASE_MOST_ITEMS:
        return None
    log = prepared.events
    rows = np.flatnonzero(prepared.happened(config.retrieval.relevant) & (log["time_ms"] < questions.start_ms))
    pair = np.unique(np.asarray(log["user"], dtype=np.int64)[rows] * num_items + log["item"][rows])
    user, item = pair // num_items, pair % num_items
    gram = _cooccurrence(user, item, num_items)
    gram.diagonal().add_(EASE_LAMBDA)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    weights = -inverse / inverse.diagonal()
    weights.fill_diagonal_(0.0)

    def score(chosen: Array) -> Tensor:
        row, seen = _within(questions.seen, chosen)
        start = torch.searchsorted(row, torch.arange(len(chosen)))
        return torch.nn.functional.embedding_bag(seen, weights, start, mode="sum")

    return score


def _cooccurrence(user: Array, item: Array, num_items: int) -> Tensor:
    """How many users had both items, float32 [I, I], from distinct (user, item) pairs ordered by user."""
    counts = np.zeros(num_items * num_items, dtype=np.float32)
    apart = 1
    while (together := user[apart:] == user[:-apart]).any():
        np.add.at(counts, item[apart:][together] * num_items + item[:-apart][together], 1.0)
        apart += 1
    above = torch.from_numpy(counts).view(num_items, num_items)
    gram = above + above.T
    gram.diagonal().add_(torch.from_numpy(np.bincount(item, minlength=num_items)).float())
    return gram


@dataclass(frozen=True, slots=True)
class RetrievalQuality:
    """recall@k by method, averaged over `num_questions` users, on the days from `first_day`."""

    first_day: str
    num_questions: int
    ks: tuple[int, ...]
    recall: dict[str, tuple[float, ...]]

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> RetrievalQuality:
        """What `dataclasses.asdict` and JSON made of one."""
        recall = {method: tuple(values) for method, values in plain["recall"].items()}
        return cls(plain["first_day"], plain["num_questions"], tuple(plain["ks"]), recall)

    def at(self, method: str, k: int) -> float:
        """recall@k of one method."""
        return self.recall[method][self.ks.index(k)]


FLOORS: Mapping[str, Callable[[Prepared, Config, Questions], Score | None]] = {
    "popularity": popularity_score,
    "EASE": ease_score,
}


def evaluate_retrieval(
    towers: TwoTower,
    prepared: Prepared,
    config: Config,
    days: Sequence[str],
    floors: Sequence[str] = (),
    most: int | None = None,
) -> RetrievalQuality:
    """recall@k of the towers and of the `floors` named, on the same questions (`most` of them, or all)."""
    questions = Questions.of(prepared, config, days, most)
    scores: dict[str, Score | None] = {"two towers": tower_score(towers, prepared, config, questions)}
    scores |= {name: FLOORS[name](prepared, config, questions) for name in floors}
    num_items = len(prepared.item_ids)
    found = {name: recalls(questions, one, num_items).mean(0) for name, one in scores.items() if one is not None}
    recall = {name: tuple(round(float(r), 6) for r in means) for name, means in found.items()}
    return RetrievalQuality(questions.first_day, len(questions), KS, recall)
