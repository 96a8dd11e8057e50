"""Two towers from what users went on to want: an example is a user at a moment, its positives the next events."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from prerank.config import Config
from prerank.features.histories import Timeline
from prerank.features.popularity import popularity
from prerank.models.towers import TwoTower, build_towers
from prerank.train.examples import UserExamples, item_tensors
from prerank.train.items import Calendar
from prerank.train.loop import run
from prerank.train.losses import Positives, sampled_softmax_loss, softmax_loss
from prerank.train.negatives import Presence, VectorCache, examples_with, uniform_items
from prerank.train.optimisers import lookup_tables
from prerank.train.plan import Plan
from prerank.train.prepare import Prepared
from prerank.types import Array, Features, Report, day_number, silent

EXCLUDED = 50
"""How many of a user's own latest relevant items are kept out of its negatives."""
WARM_UP = 0.25
"""The share of all steps before vectors of earlier batches are negatives: the first of the usual four epochs."""


@dataclass(frozen=True, slots=True)
class Groups:
    """The examples G: events [start, end) of `events` int64 [P] are one example's positives, `weight` float32 [P]."""

    events: Array
    weight: Array
    start: Array
    end: Array

    @classmethod
    def build(cls, prepared: Prepared, config: Config) -> Groups:
        """Target events of the training days and of what came before them, in runs of one user and one day.

        An event on an item the user had found relevant before is no target: retrieval leaves such items out.
        """
        log = prepared.events
        weight = np.zeros(len(log["day"]), dtype=np.float32)
        for event, value in config.retrieval.targets.items():
            np.maximum(weight, np.where(prepared.happened(event), np.float32(value), 0), out=weight)
        wanted = (weight > 0) & (np.asarray(log["day"]) <= day_number(config.data.train[1]))
        events = np.flatnonzero(wanted & ~_relevant_before(prepared, config.retrieval.relevant))
        user, day = log["user"][events], log["day"][events]
        fresh = np.ones(len(events), dtype=bool)
        fresh[1:] = (user[1:] != user[:-1]) | (day[1:] != day[:-1])
        run_start = np.maximum.accumulate(np.where(fresh, np.arange(len(events)), 0))
        start = np.flatnonzero((np.arange(len(events)) - run_start) % config.retrieval.group == 0)
        return cls(events, weight[events], start, np.append(start[1:], len(events)))

    def __len__(self) -> int:
        return len(self.start)

    def positives(self, examples: Array, item: Array) -> Positives:
        """The positives of examples int64 [B]; `item` int32 [E] is the log's item column."""
        sizes = self.end[examples] - self.start[examples]
        example = np.repeat(np.arange(len(examples)), sizes)
        first = np.cumsum(sizes) - sizes
        place = np.arange(sizes.sum()) - first[example] + self.start[examples][example]
        found = (example, item[self.events[place]].astype(np.int64), self.weight[place])
        return Positives(*(torch.from_numpy(column) for column in found))


def _relevant_before(prepared: Prepared, relevant: str) -> Array:
    """bool [E]: the user had a relevant event on this item strictly earlier."""
    log = prepared.events
    pair = np.asarray(log["user"], dtype=np.int64) * len(prepared.item_ids) + log["item"]
    marked = np.flatnonzero(prepared.happened(relevant))
    # events are in time order within a user, so np.unique's first occurrence is the earliest
    known, first = np.unique(pair[marked], return_index=True)
    if not len(known):
        return np.zeros(len(pair), dtype=bool)
    place = np.searchsorted(known, pair).clip(max=len(known) - 1)
    earliest = np.asarray(log["time_ms"][marked[first]])[place]
    before: Array = (known[place] == pair) & (earliest < log["time_ms"])
    return before


class ItemPopularity:
    """Every item's popularity at the start of each day of the log."""

    def __init__(self, prepared: Prepared, config: Config) -> None:
        options, self.calendar = config.retrieval.popularity, Calendar(prepared, config)
        counts = np.zeros((len(options.events), self.calendar.num_days, len(prepared.item_ids)))
        for number, event in enumerate(options.events):
            counts[number] = self.calendar.counts(prepared.happened(event))
        self.table = torch.from_numpy(popularity(counts, options.half_life_days))

    def place(self, day: Array) -> Tensor:
        """Days since 1970 int [B] -> rows of `table` int64 [B]; a day before the training days has no popularity."""
        return self.calendar.place(day)

    def at(self, iso_day: str) -> Tensor:
        """float32 [I, S] as seen at the start of one day."""
        return self.table[self.place(np.array([day_number(iso_day)]))[0]]

    def latest(self) -> Tensor:
        """float32 [I, S] as seen after the whole log."""
        return self.table[-1]


def train_retrieval(
    prepared: Prepared,
    config: Config,
    folder: Path,
    identity: str,
    after_epoch: Callable[[TwoTower], Mapping[str, float]] = lambda _: {},
    report: Report = silent,
    begin: Callable[[TwoTower], object] = lambda _: None,
) -> tuple[TwoTower, list[dict[str, float]]]:
    """The trained towers and one record an epoch; see `loop.run` for how it resumes and what it raises.

    `begin` may change the weights that the training begins with.
    """
    torch.manual_seed(config.seed)
    towers = build_towers(config, prepared.transforms.sizes())
    begin(towers)
    groups = Groups.build(prepared, config)
    plan = Plan.of(config.retrieval, identity, len(groups), config.seed)
    examples = _Examples(prepared, config, groups)
    loss = _Loss(towers, prepared, config, examples, plan)
    records = run(
        towers,
        plan,
        examples.batch,
        loss,
        folder,
        lookup_tables=lookup_tables(towers, config.features),
        extra_state=loss.cache.state,
        load_extra=loss.cache.load_state,
        after_epoch=lambda _: after_epoch(towers),
        report=report,
        what="train two towers",
    )
    return towers, records


@dataclass(frozen=True, slots=True)
class _Batch:
    """Groups gathered: user features [B, ...], rows of the popularity table int64 [B], what was wanted and what not.

    `drawn` int64 [N] are the items that are negatives whether or not anybody wanted them.
    """

    user: Features
    day: Tensor
    positives: Positives
    excluded: Tensor
    drawn: Tensor


class _Examples:
    """Gathers batches of groups."""

    def __init__(self, prepared: Prepared, config: Config, groups: Groups) -> None:
        self.groups, self.log, self.num_items = groups, prepared.events, len(prepared.item_ids)
        self.uniform = config.retrieval.uniform_negatives
        self.users = UserExamples(prepared, config.features)
        self.popularity = ItemPopularity(prepared, config)
        own = np.flatnonzero(prepared.happened(config.retrieval.relevant))
        self.own = Timeline.build(len(prepared.user_ids), *(self.log[c][own] for c in ("user", "time_ms", "item")))

    def holding(self) -> Array:
        """In how many examples each item is wanted, int64 [I]."""
        example = np.repeat(np.arange(len(self.groups)), self.groups.end - self.groups.start)
        return examples_with(self.log["item"][self.groups.events], example, self.num_items)

    def batch(self, chosen: Array, draw: np.random.Generator) -> _Batch:
        first = self.groups.events[self.groups.start[chosen]]
        user, moment = np.asarray(self.log["user"][first], dtype=np.int64), np.asarray(self.log["time_ms"][first])
        excluded = self.own.before(user, moment, EXCLUDED).astype(np.int64)
        day = self.popularity.place(self.log["day"][first])
        positives = self.groups.positives(chosen, self.log["item"])
        drawn = uniform_items(self.num_items, self.uniform, draw)
        return _Batch(self.users.at(first), day, positives, torch.from_numpy(excluded), drawn)


class _Loss:
    """The loss of a batch of groups, by full or sampled softmax."""

    def __init__(self, towers: TwoTower, prepared: Prepared, config: Config, examples: _Examples, plan: Plan) -> None:
        self.towers, self.kind = towers, config.retrieval.loss
        self.popularity = examples.popularity.table
        self.items = item_tensors(prepared)
        self.presence = Presence(examples.holding(), plan.num_examples, config.retrieval.uniform_negatives)
        warm_up = round(WARM_UP * plan.epochs * plan.steps_per_epoch)
        self.cache = VectorCache(config.retrieval.cached_batches, towers.width - 1, warm_up)

    def __call__(self, batch: _Batch) -> Tensor:
        user_BD = self.towers.user_vectors(batch.user)
        if self.kind == "softmax":
            logits = self._logits(user_BD, batch.day, self.towers.item_vectors(self.items), self.popularity)
            return softmax_loss(logits, batch.positives, batch.excluded)
        fresh = torch.unique(torch.cat([batch.positives.item, batch.drawn]))
        fresh_CD = self.towers.item_vectors({name: column[fresh] for name, column in self.items.items()})
        earlier, earlier_CD = self.cache.beside(fresh)
        columns, order = torch.cat([fresh, earlier]).sort()
        item_CD = torch.cat([fresh_CD, earlier_CD])[order]
        logits = self._logits(user_BD, batch.day, item_CD, self.popularity[:, columns])
        log_q = self._log_q(columns, len(batch.day))
        # here and not where batches are made: what is held is the training's, and a checkpoint has it as of this step
        self.cache.add(fresh, fresh_CD)
        return sampled_softmax_loss(logits, columns, log_q, batch.positives, batch.excluded)

    def _log_q(self, columns: Tensor, batch: int) -> Tensor:
        if self.kind == "in_batch_softmax":
            return torch.zeros(len(columns))
        return self.presence.log_probability(columns, batch, self.cache.filled)

    def _logits(self, user_BD: Tensor, day: Tensor, item_CD: Tensor, popularity: Tensor) -> Tensor:
        """Similarity float32 [B, C] with items, the popularity [days, C, S] of each example's own day included."""
        bias_CT = self.towers.popularity_bias(popularity).T
        # [u, one-hot day] . [v, bias of each day]: one product instead of a gathered [B, C] of biases
        day_BT = torch.nn.functional.one_hot(day, bias_CT.shape[1]).to(user_BD.dtype)
        logits = torch.cat([user_BD, day_BT], dim=1) @ torch.cat([item_CD, bias_CT], dim=1).T
        return logits.float()
