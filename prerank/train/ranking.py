"""A ranker from examples: logged impressions with their 0/1 labels here, lessons of the heavy ranker in `distill`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from prerank.config import Config
from prerank.models.ranker import Ranker
from prerank.models.rankers import build_one_ranker
from prerank.models.towers import ItemTower, TwoTower, adopt_tables
from prerank.train.examples import UserExamples
from prerank.train.items import DailyItems
from prerank.train.loop import run
from prerank.train.optimisers import lookup_tables
from prerank.train.plan import Options, Plan
from prerank.train.prepare import Prepared
from prerank.types import Array, Features, Report, silent

WATCH = "validate.loss"
"""What an epoch's record says of the validate days, where a training may stop early: the smaller the better."""


class Lesson(Protocol):
    """A batch gathered, ready for a ranker."""

    def loss(self, ranker: Ranker) -> Tensor:
        """How wrong the ranker is -> scalar."""
        ...


class RankerExamples(Protocol):
    """What a ranker learns from, `len` of them."""

    def __len__(self) -> int: ...

    def batch(self, chosen: Array) -> Lesson:
        """The examples at positions int64 [B]."""
        ...


def train_ranker(
    prepared: Prepared,
    config: Config,
    folder: Path,
    identity: str,
    after_epoch: Callable[[Ranker], Mapping[str, float]] = lambda _: {},
    report: Report = silent,
    *,
    towers: TwoTower | None = None,
    examples: RankerExamples | None = None,
    what: str = "train the ranker",
    begin: Callable[[nn.Module], object] = lambda _: None,
) -> tuple[Ranker, list[dict[str, float]]]:
    """One trained ranker and one record an epoch; see `loop.run` for how it resumes and what it raises.

    It learns from `examples`, from the impressions of the training days where none are given. `towers` are those whose
    tables it takes where `[ranker] tables` says so. `begin` may change the other weights that the training begins with.
    """
    torch.manual_seed(config.seed)
    ranker = build_one_ranker(config, prepared.transforms.sizes())
    assert isinstance(ranker, nn.Module)
    begin(ranker)
    if config.ranker.tables == "retrieval":
        assert towers is not None, "tables of the retrieval towers are asked for"
        for tower in (module for module in ranker.modules() if isinstance(module, ItemTower)):
            adopt_tables(tower, towers.item_tower)
    if examples is None:
        examples = Impressions(prepared, config, np.flatnonzero(prepared.of_days(config.data.days("train"))))
    loss_of, measured = partial(_loss, ranker), partial(after_epoch, ranker)
    records = fit(ranker, config.ranker, config, examples, loss_of, folder, identity, measured, report, what)
    return ranker, records


def _loss(ranker: Ranker, batch: Lesson) -> Tensor:
    return batch.loss(ranker)


class GuardedOptions(Options, Protocol):
    """The options of a section whose training is guarded against memorising; see `Plan`."""

    @property
    def average(self) -> float:
        """The decay of the weights' moving average."""

    @property
    def patience(self) -> int:
        """Epochs without a smaller `WATCH` that end the training."""


def fit(
    ranker: nn.Module,
    options: GuardedOptions,
    config: Config,
    examples: RankerExamples,
    loss_of: Callable[[Lesson], Tensor],
    folder: Path,
    identity: str,
    after_epoch: Callable[[], Mapping[str, float]],
    report: Report,
    what: str,
) -> list[dict[str, float]]:
    """Train a light or a heavy ranker on `examples` as `options` say -> one record an epoch; see `loop.run`."""

    def batch_of(chosen: Array, draw: np.random.Generator) -> Lesson:
        return examples.batch(chosen)

    plan = Plan.of(options, identity, len(examples), config.seed)
    return run(
        ranker,
        replace(plan, average=options.average, patience=options.patience, watch=WATCH),
        batch_of,
        loss_of,
        folder,
        lookup_tables=lookup_tables(ranker, config.features),
        after_epoch=lambda _: after_epoch(),
        report=report,
        what=what,
    )


@dataclass(frozen=True, slots=True)
class Batch:
    """Impressions gathered: user and item features [B, ...], labels float32 [B, T]."""

    user: Features
    items: Features
    labels: Tensor

    def logits(self, ranker: Ranker) -> Tensor:
        """float32 [B, T], also where the model computes in bfloat16: a loss of eight bits learns little."""
        user_side = ranker.user_side(self.user)
        item_side = {name: side[:, None] for name, side in ranker.item_side(self.items).items()}
        return ranker(user_side, item_side).squeeze(1).float()

    def loss(self, ranker: Ranker) -> Tensor:
        """The log loss, mean over impressions and tasks -> scalar."""
        return binary_cross_entropy_with_logits(self.logits(ranker), self.labels)


class Impressions:
    """Logged impressions `events` int64 [P] with their labels, ready for a ranker."""

    def __init__(self, prepared: Prepared, config: Config, events: Array) -> None:
        self.events = events
        self.item, self.day = prepared.events["item"], prepared.events["day"]
        self.users = UserExamples(prepared, config.features)
        self.items = DailyItems(prepared, config)
        happened = [prepared.happened(task.label)[events] for task in config.tasks.values()]
        self.labels = torch.from_numpy(np.stack(happened, axis=-1)).float()

    def __len__(self) -> int:
        return len(self.events)

    def batch(self, chosen: Array) -> Batch:
        """Of positions `chosen` int64 [B] in `events`."""
        events = self.events[chosen]
        rows = torch.from_numpy(self.item[events].astype(np.int64))
        items = self.items.at(rows, self.day[events])
        return Batch(self.users.at(events), items, self.labels[torch.from_numpy(chosen)])

    @torch.inference_mode()
    def predict(self, ranker: Ranker, batch: int = 8192) -> Array:
        """Probabilities float32 [P, T] of every impression."""
        parts = torch.arange(len(self.events)).split(batch)  # type: ignore[no-untyped-call]
        found = [self.batch(part.numpy()).logits(ranker).sigmoid() for part in parts]
        return torch.cat(found).numpy()
