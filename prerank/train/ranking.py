"""A ranker from logged impressions and their 0/1 labels, one log loss a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from prerank.config import Config
from prerank.models.rankers import Ranker, build_ranker
from prerank.train.examples import UserExamples, item_tensors
from prerank.train.loop import Plan, run
from prerank.train.prepare import Prepared
from prerank.types import Array, Report, silent


def train_ranker(
    prepared: Prepared,
    config: Config,
    folder: Path,
    identity: str,
    after_epoch: Callable[[Ranker], Mapping[str, float]] = lambda _: {},
    report: Report = silent,
) -> tuple[Ranker, list[dict[str, float]]]:
    """The trained ranker and one record an epoch; see `loop.run` for how it resumes and what it raises."""
    torch.manual_seed(config.seed)
    ranker = build_ranker(config, prepared.transforms.sizes())
    assert isinstance(ranker, nn.Module)
    impressions = Impressions(prepared, config, np.flatnonzero(prepared.of_days(config.data.days("train"))))
    plan = Plan.of(config.ranker, identity, len(impressions.events), config.seed)

    def loss_of(examples: Tensor) -> Tensor:
        return binary_cross_entropy_with_logits(*impressions.logits_and_labels(ranker, examples.numpy()))

    records = run(
        ranker,
        plan,
        loss_of,
        folder,
        after_epoch=lambda _: after_epoch(ranker),
        report=report,
        what="train the ranker",
    )
    return ranker, records


class Impressions:
    """Logged impressions `events` int64 [P] with their labels, ready for a ranker."""

    def __init__(self, prepared: Prepared, config: Config, events: Array) -> None:
        self.events = events
        self.item = prepared.events["item"]
        self.users = UserExamples(prepared, config.features)
        self.items = item_tensors(prepared)
        happened = [prepared.happened(task.label)[events] for task in config.tasks.values()]
        self.labels = torch.from_numpy(np.stack(happened, axis=-1)).float()

    def logits_and_labels(self, ranker: Ranker, chosen: Array) -> tuple[Tensor, Tensor]:
        """Of positions `chosen` int64 [B] in `events`: logits and labels, both float32 [B, T]."""
        events = self.events[chosen]
        rows = torch.from_numpy(self.item[events].astype(np.int64))
        user_side = ranker.user_side(self.users.at(events))
        item_side = ranker.item_side({name: column[rows] for name, column in self.items.items()})
        return ranker(user_side, item_side[:, None]).squeeze(1), self.labels[torch.from_numpy(chosen)]

    @torch.inference_mode()
    def predict(self, ranker: Ranker, batch: int = 8192) -> Array:
        """Probabilities float32 [P, T] of every impression."""
        parts = torch.arange(len(self.events)).split(batch)  # type: ignore[no-untyped-call]
        found = [self.logits_and_labels(ranker, part.numpy())[0].sigmoid() for part in parts]
        return torch.cat(found).numpy()
