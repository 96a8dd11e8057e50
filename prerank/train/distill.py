"""The lightweight ranker from the heavy one's lessons: KL on winners and on candidates, and, if asked, real labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from prerank.config import Config, Distillation
from prerank.models.ranker import Ranker
from prerank.train.examples import UserExamples
from prerank.train.items import DailyItems, item_sides
from prerank.train.lessons import Lessons
from prerank.train.losses import bernoulli_kl
from prerank.train.prepare import Prepared
from prerank.types import Array, Features


@dataclass(frozen=True, slots=True)
class TaughtBatch:
    """Impressions, each with C candidates after it, gathered: the user's features once, and each distinct item's.

    items are the features of the batch's U distinct items [U, ...], place int64 [B, 1 + C] is where each pair's are;
    teacher float32 [B, 1 + C, T] are the heavy ranker's logits, valid bool [B, C] where there is a candidate, labels
    float32 [B, T] the impressions' own.
    """

    user: Features
    items: Features
    place: Tensor
    teacher: Tensor
    valid: Tensor
    labels: Tensor
    options: Distillation

    def logits(self, ranker: Ranker) -> Tensor:
        """float32 [B, 1 + C, T]; a user's side is made once for an impression's items, an item's once a batch.

        So where a ranker drops out, what it drops of a user or an item is dropped of it in the whole batch.
        """
        item_side = item_sides(ranker, self.items, self.place)
        return ranker(ranker.user_side(self.user), item_side).float()

    def loss(self, ranker: Ranker) -> Tensor:
        """KL(teacher || ranker), mean over tasks: of winners, plus the weighted mean over candidates -> scalar.

        `label_weight` adds the winners' log loss on their real labels.
        """
        logits = self.logits(ranker)
        winners, candidates = self.divergences(logits)
        total = winners + self.options.candidate_weight * candidates
        if self.options.label_weight:
            real = binary_cross_entropy_with_logits(logits[:, 0], self.labels)
            total = total + self.options.label_weight * real
        return total

    def divergences(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Mean KL over winners and tasks, and over valid candidates and tasks (0 where there is none) -> scalars."""
        kl = bernoulli_kl(logits, self.teacher)
        weight = self.valid.unsqueeze(-1).to(kl.dtype)
        of_candidates = (kl[:, 1:] * weight).sum() / (weight.sum() * kl.shape[-1]).clamp_min(1.0)
        return kl[:, 0].mean(), of_candidates


class Taught:
    """Lessons as examples of a ranker."""

    def __init__(self, prepared: Prepared, config: Config, lessons: Lessons) -> None:
        self.prepared, self.config = prepared, config
        self.lessons, self.options = lessons, config.distillation
        self.users, self.items = UserExamples(prepared, config.features), DailyItems(prepared, config)
        log, events = prepared.events, lessons.events
        self.day = np.asarray(log["day"])
        self.rows = np.concatenate([np.asarray(log["item"])[events][:, None], lessons.rows], axis=1)
        self.teacher = torch.cat([lessons.winner.unsqueeze(1), lessons.candidate], dim=1)
        happened = [prepared.happened(task.label)[events] for task in config.tasks.values()]
        self.labels = torch.from_numpy(np.stack(happened, axis=-1)).float()

    def __len__(self) -> int:
        return len(self.lessons.events)

    def batch(self, chosen: Array) -> TaughtBatch:
        """Of positions int64 [B] in the lessons."""
        events, places = self.lessons.events[chosen], torch.from_numpy(chosen)
        rows = torch.from_numpy(self.rows[chosen].astype(np.int64))
        items, place = self.items.distinct(rows.clamp_min(0), self.day[events])
        user, valid = self.users.at(events), rows[:, 1:] >= 0
        return TaughtBatch(user, items, place, self.teacher[places], valid, self.labels[places], self.options)

    def of(self, positions: Array) -> Taught:
        """Some of the lessons only, at positions int64 [P]."""
        return Taught(self.prepared, self.config, self.lessons.of(positions))

    @torch.inference_mode()
    def divergence(self, ranker: Ranker, batch: int = 2048) -> dict[str, float]:
        """Mean KL to the teacher in nats over tasks, of winners and of candidates; `kl` is the loss's own mix."""
        sums = torch.zeros(2, dtype=torch.float64)
        for part in torch.arange(len(self)).split(batch):  # type: ignore[no-untyped-call]
            made = self.batch(part.numpy())
            sums += torch.stack(made.divergences(made.logits(ranker))).double() * len(part)
        winners, candidates = (sums / max(len(self), 1)).tolist()
        mixed = winners + self.options.candidate_weight * candidates
        return {"kl_winners": winners, "kl_candidates": candidates, "kl": mixed}
