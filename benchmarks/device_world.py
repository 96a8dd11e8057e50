"""What is ranked on a device: a million resident items, users, requests; and one request's stage, tensor by tensor.

`Stage` is what `serve.device_replica` does, with the ranker's part to be put in: rung by rung of a ladder.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from benchmarks.scorer_whole import drawn_diversity, drawn_scorer
from benchmarks.scorer_world import ADVERTISERS, SEED, TOPICS, WINNERS, Drawn, drawn_world
from prerank.bundle.executor import DeviceRanker
from prerank.bundle.judge import Judged, Ranked, judged, known, winners
from prerank.bundle.scorer import ItemSide, Scorer
from prerank.business.diversity import Diversity, groups_of
from prerank.types import CandidateSet, Features

KINDS = {"cross features": 0, "target attention": 100}
"""The rankers, and how many events the user is met with."""

Logits: TypeAlias = Callable[[Features, Tensor], Tensor]
"""The ranker's side of users [B, ...] and rows int64 [B, N] -> float [B, N, T]."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: its user's features, the ranker's side of the user [1, ...], and candidates [1, N], on the host."""

    user: Features
    user_side: Features
    candidates: CandidateSet

    @property
    def rows(self) -> Tensor:
        """int64 [1, N]."""
        return self.candidates.rows


@dataclass(frozen=True, slots=True)
class World:
    """A ranker and its items, on the host."""

    drawn: Drawn
    scorer: Scorer
    diversity: Diversity

    @classmethod
    def of(cls, num_items: int, events: int) -> World:
        """With target attention over so many events, or with none."""
        torch.manual_seed(SEED)
        others = {} if events else {"crossings": ["matches"]}
        drawn = drawn_world(num_items, max(1, events), others)
        diversity = drawn_diversity(drawn, np.random.default_rng(SEED))
        return cls(drawn, drawn_scorer(drawn, diversity), diversity)

    @property
    def flops(self) -> int:
        """Of a candidate."""
        return self.drawn.ranker.program().flops

    def row_bytes(self, dtype: torch.dtype) -> int:
        """What a candidate has read of tables whose floats are `dtype`, its row among them."""
        own = sum(
            one[0].numel() * (dtype.itemsize if one.is_floating_point() else one.dtype.itemsize)
            for one in self.drawn.item_side.values()
        )
        # its row and item_id, whether it is on, pacing, the bid, a code a rule
        return own + 8 + 8 + 1 + 4 + 4 + 4 * self.diversity.codes.shape[1]

    def winner_bytes(self, k: int = WINNERS) -> int:
        """What is written of k winners: row, item_id, utility, probabilities, whether there is one."""
        return k * (8 + 8 + 4 + 4 * len(self.drawn.ranker.tasks) + 1)

    def asked(self, num: int, seed: int = 0) -> Asked:
        """A request of `num` candidates by a user of its own."""
        made = torch.Generator().manual_seed(seed)
        user = dict(self.drawn.user)
        for name, most in (("clicks", ADVERTISERS), ("topics_1d", TOPICS), ("advertiser_1h", ADVERTISERS)):
            user[name] = torch.randint(-1, most, user[name].shape, generator=made)
        rows = torch.randperm(len(self.drawn.items["price"]), generator=made)[:num].unsqueeze(0)
        candidates = CandidateSet(rows, torch.zeros(rows.shape), torch.ones_like(rows, dtype=torch.bool))
        return Asked(user, self.drawn.ranker.user_side(user), candidates)


class Stage:
    """A world's items and rules on a device, floats of the ranker and of what it reads as `dtype`."""

    def __init__(self, world: World, where: torch.device, dtype: torch.dtype) -> None:
        self.where, self.dtype, self._world = where, dtype, world
        self.ranker = deepcopy(world.drawn.ranker).to(where, dtype)
        self.item_side = ItemSide({name: self.there(one) for name, one in world.drawn.item_side.items()})
        items, live = world.scorer.items, world.scorer.live
        self._item_ids, self._on, self._pacing = (one.to(where) for one in (items.item_ids, live.on, live.pacing))
        self._values = {name: live.value(name).to(where) for name in live.names}
        self._utility = deepcopy(world.scorer.utility).to(where)
        self._diversity = deepcopy(world.diversity).to(where)

    def there(self, tensor: Tensor) -> Tensor:
        """A tensor where the stage is, in its type."""
        return tensor.to(self.where, self.dtype if tensor.is_floating_point() else tensor.dtype)

    def logits(self, user_side: Features, rows: Tensor) -> Tensor:
        """By torch, module by module."""
        found: Tensor = self.ranker(user_side, self.item_side.gather(rows))
        return found

    def fused(self) -> Logits:
        """The ranker's program in one kernel; torch's, in float32, where there is no GPU."""
        return DeviceRanker(self._world.drawn.ranker, self.item_side.tensors(), self.dtype)

    def bids(self, rows: Tensor) -> Tensor:
        """What a click on items int64 [N] is worth, float64 [N]."""
        return self._values["bid_micros"][rows].double()

    def judge(self, user_side: Features, rows: Tensor, logits: Logits) -> Judged:
        """What candidates are worth."""
        live = self._on[rows], self._pacing[rows], {name: column[rows] for name, column in self._values.items()}
        those = known(rows, torch.ones_like(rows, dtype=torch.bool), live, {})
        return judged(those, logits(user_side, rows).float().sigmoid(), self._utility, ())

    def winners(self, candidates: Judged, k: int = WINNERS) -> Ranked:
        """Who wins, under the caps."""
        names = self._item_ids[candidates.rows]
        return winners(candidates, names, groups_of(self._diversity, candidates.rows), self._item_ids, k)
