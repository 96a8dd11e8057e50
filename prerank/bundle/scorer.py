"""Everything that decides an order, as one module: item rows, eligibility, ranker, utility, diversity and top-k.

Candidates come in as rows and winners go out; what a loser was worth never leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from prerank.bundle.executor import NativeRanker
from prerank.bundle.item_table import ItemTable
from prerank.bundle.judge import Judged, Ranked, judged, known, winners
from prerank.business.diversity import Diversity, groups_of
from prerank.business.live import LiveItems
from prerank.business.rule import Rule
from prerank.business.targeting import Targeting
from prerank.business.utility import Utility
from prerank.errors import SchemaMismatch
from prerank.kernels.engine import Engine
from prerank.models.ranker import Ranker
from prerank.types import CandidateSet, Features

_ITEMS_AT_ONCE = 1 << 16

Changed: TypeAlias = Callable[[Tensor | None, Tensor | None, Tensor | None], None]
"""Told of rows, of slots, and of the rows of these that items newly have, int64 [n] each, or None."""


class ItemSide(nn.Module):
    """A ranker's item side as buffers by name, each [I, ...]."""

    def __init__(self, tensors: Features) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor [I, ...] by name."""
        return dict(self.named_buffers())

    def gather(self, rows: Tensor) -> dict[str, Tensor]:
        """Rows int64 [B, N] of every tensor -> [B, N, ...]."""
        return {name: _gathered(tensor, rows) for name, tensor in self.named_buffers()}


def _gathered(tensor: Tensor, rows: Tensor) -> Tensor:
    if tensor.dim() == 2 and tensor.is_floating_point():
        return embedding(rows, tensor)
    return tensor.index_select(0, rows.reshape(-1)).reshape(*rows.shape, *tensor.shape[1:])


class Scorer(nn.Module):
    """Candidates to winners. Its state_dict is its whole behaviour.

    `item_side` is the ranker's of every item; it is computed unless given. Without `diversity` no group is ever full,
    without `rules`, by name, every finite utility may win; `targeting` is asked before retrieval, without it every item
    is eligible. `live` is what changes while it serves, and no part of the state_dict. Raises SchemaMismatch if the
    items lack a value the utility reads, or the groups or the targeting are of other items.
    """

    ranker: Ranker

    def __init__(
        self,
        items: ItemTable,
        ranker: Ranker,
        utility: Utility,
        item_side: Features | None = None,
        diversity: Diversity | None = None,
        rules: Mapping[str, Rule] | None = None,
        targeting: Targeting | None = None,
    ) -> None:
        super().__init__()
        if targeting is not None and targeting.num_items != items.num_rows:
            raise SchemaMismatch(f"the targeting is of {targeting.num_items} items, and there are {items.num_rows}")
        for name in utility.values:
            if name not in items.names:
                raise SchemaMismatch(f"the utility reads {name!r}, and the items have {list(items.names)}")
        if diversity is not None and len(diversity.codes) != items.num_rows:
            raise SchemaMismatch(f"diversity has the groups of {len(diversity.codes)} items, expected {items.num_rows}")
        self.items = items
        self.ranker = ranker
        self.utility = utility
        self.rules = dict(rules or {})
        self.diversity = diversity
        self.targeting = targeting
        self.live = LiveItems(
            items.num_rows, {name: items.of_every_row(name) for name in utility.values}, items.num_published
        )
        self.item_side = ItemSide(self._computed() if item_side is None else item_side)
        self._native: NativeRanker | None = None
        self._changed: Changed | None = None
        for name, rule in self.rules.items():  # each under its own name in the state_dict, as every version has it
            assert not hasattr(self, name), f"a rule cannot be called {name!r}: a part of the scorer is"
            self.add_module(name, rule)

    @property
    def why_below(self) -> str:
        """What the candidates that `Ranked.num_below` counts were, after "were"."""
        return " or ".join(rule.why for rule in self.rules.values())

    def refresh(self) -> None:
        """Compute `item_side` again, as new weights or items want; torch ranks from here on."""
        self.item_side = ItemSide(self._computed())
        self._native = None

    def accelerate(self, engine: Engine | None) -> None:
        """Let `engine` rank from here on, with the weights of now; torch again if None.

        Its products of weights are bfloat16's; `Bundle.accelerate` bounds what that does to probabilities.
        """
        self._native = None if engine is None else NativeRanker(self.ranker, self.item_side.tensors(), engine)

    @property
    def is_native(self) -> bool:
        """Whether an engine ranks: it looks between blocks whether anybody still waits (`kernels.stop`)."""
        return self._native is not None

    def tell(self, changed: Changed | None) -> None:
        """From here on `changed` is told of what changes while this serves; None: nobody is."""
        self._changed = changed
        self.live.changed = None if changed is None else lambda rows, taken: changed(rows, None, taken)

    def put_side(self, slots: Tensor, side: Features) -> None:
        """Give slots int64 [n] the ranker's item side [n, ...]; no request of such a slot may be running."""
        with torch.inference_mode():
            for name, tensor in self.item_side.named_buffers():
                tensor[slots] = side[name].to(tensor.dtype)
        if self._native is not None:
            self._native.update(slots)
        if self._changed is not None:
            self._changed(None, slots, None)

    def probs(self, user: Features, slots: Tensor) -> Tensor:
        """user [B, ...] and slots int64 [B, N] -> each task's probability, float32 [B, N, T]."""
        return self._probs(self.ranker.user_side(user), slots)

    def _probs(self, user_side: Features, slots: Tensor) -> Tensor:
        if self._native is not None:
            return self._native(user_side, slots).sigmoid()
        return self.ranker(user_side, self.item_side.gather(slots)).float().sigmoid()

    @torch.no_grad()
    def _computed(self) -> dict[str, Tensor]:
        features = self.items.features()
        pieces = [
            self.ranker.item_side({name: column[start : start + _ITEMS_AT_ONCE] for name, column in features.items()})
            for start in range(0, self.items.num_slots, _ITEMS_AT_ONCE)
        ]
        return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}

    def forward(self, user: Features, candidates: CandidateSet, k: int) -> Ranked:
        """user [B, ...] and candidates [B, N] -> the k winners [B, k], best first; see `rank`."""
        return self.rank(self.ranker.user_side(user), candidates, k)

    def rank(self, user_side: Features, candidates: CandidateSet, k: int) -> Ranked:
        """The ranker's side of the user [B, ...] and candidates [B, N] -> the k winners [B, k], best first.

        Only valid candidates that are on win, of finite utility and probabilities, if every rule lets them, and of a
        group at most as many as diversity lets; where there are fewer than k the rest is not valid, with row
        and item_id -1. Equal utilities are ordered by item_id. A row given twice is ranked twice. What the candidates'
        `values` say, such as a bid of this request's own, counts in place of what is live of the item.
        """
        return self.winners(self.judge(user_side, candidates), k)

    def judge(self, user_side: Features, candidates: CandidateSet) -> Judged:
        """The first half of `rank`: what each candidate is worth, whatever the others are."""
        rows = torch.where(candidates.valid, candidates.rows, 0)
        slots = self._slots_of(candidates, rows)
        those = known(rows, candidates.valid, self.live.gather(rows), candidates.values, slots)
        return judged(those, self._probs(user_side, those.slots), self.utility, self.rules.values())

    def winners(self, candidates: Judged, k: int) -> Ranked:
        """The second half: the k winners of all candidates, judged at once or in pieces that were `joined`."""
        rows = candidates.rows
        # as published rows ascend with item_id, so the smaller row is the smaller item_id
        names = rows if self.items.is_in_order else self.items.item_ids[rows]
        return winners(candidates, names, groups_of(self.diversity, rows), self.items.item_ids, k)

    def _slots_of(self, candidates: CandidateSet, rows: Tensor) -> Tensor | None:
        """Where the features of rows int64 [B, N] are, -1 nowhere; None where that is their rows."""
        if candidates.slots is not None:
            return candidates.slots
        return None if self.items.slots is None else self.items.slots_of(rows)
