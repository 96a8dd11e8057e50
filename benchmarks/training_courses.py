"""What a ranker may learn from, for ours and for a plain loop: logged impressions, or the heavy ranker's lessons.

What the models read is what lasts: counters and rates would need a plain version too. The towers that retrieve the
lessons' candidates are trained one pass, the heavy ranker is as drawn: what it says costs the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from benchmarks.machine import REPOSITORY
from benchmarks.training_rows import PairRows, Rows
from prerank.config import Config, HeavyRankerConfig, RankerConfig, load_config
from prerank.data.logs import open_tables
from prerank.market.generate import generate_market
from prerank.models.ranker import Ranker
from prerank.models.rankers import build_ranker
from prerank.models.towers import ItemTower, TwoTower, adopt_tables
from prerank.train.distill import Taught, TaughtBatch
from prerank.train.items import item_sides
from prerank.train.lessons import learn
from prerank.train.losses import bernoulli_kl
from prerank.train.prepare import prepare
from prerank.train.ranking import Batch, Impressions, RankerExamples
from prerank.train.retrieval import train_retrieval
from prerank.train.teacher import build_heavy
from prerank.types import Array

KUAIRAND_FUNNEL = REPOSITORY / "examples" / "kuairand" / "funnel.toml"
MARKET_FUNNEL = REPOSITORY / "funnel.toml"


@dataclass(frozen=True, slots=True)
class Course:
    """One ranker and what it learns from.

    `many` are the examples of a turn of ours, of `pairs` pairs of a user and an item each; `rows` are those of `few`
    for the plain loop, a pair each, and `plain_loss` is the loss of some of them collated. `towers` are those whose
    tables the ranker takes and leaves as they are.
    """

    config: Config
    sizes: Mapping[str, int]
    many: RankerExamples
    few: RankerExamples
    rows: Dataset[dict[str, object]]
    pairs: int
    plain_loss: Callable[[Ranker, Mapping[str, Any]], Tensor]
    towers: TwoTower | None = None

    @property
    def batch(self) -> int:
        """Ours, in examples."""
        return self.config.ranker.batch

    def ranker(self, tables: Mapping[str, int] | None = None) -> nn.Module:
        """As drawn; `tables` are rows of some that differ from the prepared ones'."""
        torch.manual_seed(self.config.seed)
        ranker = build_ranker(self.config, {**self.sizes, **(tables or {})})
        assert isinstance(ranker, nn.Module)
        if self.towers is not None:
            for tower in (module for module in ranker.modules() if isinstance(module, ItemTower)):
                adopt_tables(tower, self.towers.item_tower)
        return ranker


class World:
    """One prepared log: KuaiRand's in `data`, or of a market made in `folder`."""

    def __init__(self, data: Path | None, folder: Path, market_ads: int) -> None:
        config = load_config(KUAIRAND_FUNNEL if data else MARKET_FUNNEL)
        self.config = replace(config, features=config.features.lasting())
        self.folder = folder
        if data is None:
            data = folder / "market"
            if not data.exists():
                generate_market(data, num_ads=market_ads, num_impressions=10 * market_ads)
        self.prepared = prepare(self.config, open_tables(self.config, data, folder / "work"), folder / "work")
        self.events = np.flatnonzero(self.prepared.of_days(config.data.days("train")))

    def impressions(self, ours: int, plain: int) -> Course:
        """mmoe_dcn from logged impressions and their labels, so many of them; -1 is all."""
        config = replace(self.config, ranker=RankerConfig(model="mmoe_dcn"))
        many, few = (Impressions(self.prepared, config, _some(self.events, count)) for count in (ours, plain))
        return Course(config, self.prepared.transforms.sizes(), many, few, Rows(few), 1, of_impressions)

    def lessons(self, ours: int, plain: int) -> dict[str, Course]:
        """mmoe_dcn, and the funnel's own ranker, from so many lessons, by the ranker's name."""
        config = replace(self.config, heavy_ranker=self.config.heavy_ranker or HeavyRankerConfig())
        once = replace(config, retrieval=replace(config.retrieval, epochs=1))
        towers, _ = train_retrieval(self.prepared, once, self.folder / "towers", "throughput")
        sizes = self.prepared.transforms.sizes()
        teacher = build_heavy(config, sizes, towers).eval()
        events, path = _some(self.events, ours), self.folder / "lessons.safetensors"
        lessons = learn(self.prepared, config, events, towers, teacher, [], path, "throughput")
        found: dict[str, Course] = {}
        for ranker in (RankerConfig(model="mmoe_dcn"), config.ranker):
            many = Taught(self.prepared, replace(config, ranker=ranker), lessons)
            few = many.of(_some(np.arange(len(events)), plain))
            pairs, adopted = 1 + lessons.rows.shape[1], towers if ranker.tables == "retrieval" else None
            found[ranker.model] = Course(many.config, sizes, many, few, PairRows(few), pairs, of_pairs, adopted)
        return found


def of_impressions(ranker: Ranker, row: Mapping[str, Any]) -> Tensor:
    return Batch(row["user"], row["item"], row["labels"]).loss(ranker)


def of_pairs(ranker: Ranker, row: Mapping[str, Any]) -> Tensor:
    weight: Tensor = row["weight"]
    kl = bernoulli_kl(Batch(row["user"], row["item"], row["teacher"]).logits(ranker), row["teacher"])
    return (kl.mean(-1) * weight).mean()


class _UsersApart(TaughtBatch):
    """Lessons whose user's features are there again for each pair."""

    def logits(self, ranker: Ranker) -> Tensor:
        item_side = item_sides(ranker, self.items, self.place.view(-1, 1))
        return ranker(ranker.user_side(self.user), item_side).view(self.teacher.shape).float()


def users_apart(batch: TaughtBatch) -> TaughtBatch:
    """A user's side made for each of its pairs, as a loop over pairs makes it."""
    user = {name: column.repeat_interleave(batch.place.shape[1], 0) for name, column in batch.user.items()}
    return _UsersApart(user, batch.items, batch.place, batch.teacher, batch.valid, batch.labels, batch.options)


def items_apart(batch: TaughtBatch) -> TaughtBatch:
    """An item's side made for each of its pairs."""
    items = {name: column[batch.place.flatten()] for name, column in batch.items.items()}
    return replace(batch, items=items, place=torch.arange(batch.place.numel()).view(batch.place.shape))


def _some(events: Array, count: int) -> Array:
    """`count` of them, ascending, drawn so that they are as far apart as all are; all where it is -1."""
    if count < 0 or count >= len(events):
        return events
    return np.sort(np.random.default_rng(0).choice(events, count, replace=False))
