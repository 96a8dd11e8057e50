"""What a ranker promises, and every ranker a funnel file may name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor

from prerank.config import Config
from prerank.models.mmoe_dcn import MMoEDCNRanker
from prerank.models.mtmd import MTMDRanker
from prerank.models.two_tower_ranker import TwoTowerRanker
from prerank.types import Features


class Ranker(Protocol):
    """User and items to one logit per task, split so that each side is computed as rarely as it can be.

    An implementation is an `nn.Module`. W and V are its own widths.
    """

    tasks: tuple[str, ...]

    def item_side(self, items: Features) -> Tensor:
        """Item features [I, ...] -> float32 [I, W]; `publish` stores it, so no user may enter."""
        ...

    def user_side(self, user: Features) -> Tensor:
        """User and context features [B, ...] -> float32 [B, V]; once per request."""
        ...

    def __call__(self, user_side: Tensor, item_side: Tensor) -> Tensor:
        """[B, V] and gathered item rows [B, N, W] -> logits float32 [B, N, T]."""
        ...


RANKERS: dict[str, Callable[[Config, Mapping[str, int]], Ranker]] = {
    "two_tower": TwoTowerRanker,
    "mtmd": MTMDRanker,
    "mmoe_dcn": MMoEDCNRanker,
}


def build_ranker(config: Config, sizes: Mapping[str, int]) -> Ranker:
    """The ranker `[ranker] model` names; `sizes` are the fitted transforms' table rows, keyed "owner.name"."""
    return RANKERS[config.ranker.model](config, sizes)
