"""A large ranker over a million items, as drawn. It imports where there is torch, numpy and pyarrow alone."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prerank.config import parse_config
from prerank.models.cross_feature import CrossFeatureRanker

SEED, LENGTH, ADVERTISERS, TOPICS = 7, 50, 20_000, 200
WINNERS = 1_000
FUNNEL: dict[str, Any] = {
    "name": "scorer",
    "data": {
        "impressions": "impressions",
        "items": "items",
        "users": "users",
        "train": ["2026-01-01", "2026-01-02"],
        "validate": ["2026-01-03", "2026-01-03"],
        "test": ["2026-01-04", "2026-01-04"],
    },
    "features": {
        "user": {
            "country": {"kind": "category", "dim": 8},
            "clicks": {"kind": "history", "of": "advertiser", "length": LENGTH},
        },
        "context": {"surface": {"kind": "category", "dim": 4}},
        "item": {
            "advertiser": {"kind": "category", "dim": 64, "hash": ADVERTISERS - 1},
            "topics": {"kind": "bag", "dim": 16, "length": 3},
            "price": {"kind": "number"},
            "bid_micros": {"kind": "value"},
        },
        "interaction": {
            "topics_1d": {"count": "is_click", "by": "topics", "window": "1d", "length": LENGTH},
            "advertiser_1h": {"by": "advertiser", "window": "1h", "length": LENGTH},
        },
    },
    "tasks": {"click": {"label": "is_click"}, "purchase": {"label": "is_purchase"}},
    "retrieval": {"relevant": "is_click", "targets": {"is_click": 1.0}},
    "ranker": {
        "model": "cross_feature",
        "width": 256,
        "hidden": [64],
        "experts": 4,
        "low_rank": 64,
        "heads": 2,
    },
    "utility": {"click": {"value": "bid_micros"}},
}
_SIZES = {
    "user.country": 60,
    "context.surface": 4,
    "item.advertiser": ADVERTISERS,
    "item.topics": TOPICS,
}


@dataclass(frozen=True, slots=True)
class Drawn:
    """A ranker with weights as drawn, items as features [I, ...] and as its item side, one user's features [1, ...]."""

    ranker: CrossFeatureRanker
    items: dict[str, Tensor]
    item_side: dict[str, Tensor]
    user: dict[str, Tensor]


def drawn_world(num_items: int, length: int = LENGTH, ranker: Mapping[str, object] | None = None) -> Drawn:
    """Over a million items or so, histories of `length` events; `ranker` is what of [ranker] is another."""
    plain = deepcopy(FUNNEL)
    plain["features"]["user"]["clicks"]["length"] = length
    plain["ranker"] |= ranker or {}
    config = parse_config(plain, "benchmarks/scorer_world.py")
    drawn = CrossFeatureRanker(config, _SIZES).eval()
    for weight in drawn.parameters():  # also of what begins at zero
        weight.add_(0.02 * torch.randn_like(weight))
    items = {
        "advertiser": torch.randint(ADVERTISERS, (num_items,), dtype=torch.int32),
        "topics": torch.randint(-1, TOPICS, (num_items, 3), dtype=torch.int16),
        "price": torch.rand(num_items),
        "bid_micros": torch.randint(1_000, 1_000_000, (num_items,), dtype=torch.int32),
    }
    step, pieces = 1 << 16, []
    for start in range(0, num_items, step):
        pieces.append(drawn.item_side({name: column[start : start + step] for name, column in items.items()}))
    item_side = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
    user = {
        "country": torch.tensor([3]),
        "surface": torch.tensor([1]),
        "clicks": torch.randint(-1, ADVERTISERS, (1, length)),
        "topics_1d": torch.randint(-1, TOPICS, (1, LENGTH)),
        "advertiser_1h": torch.randint(-1, ADVERTISERS, (1, LENGTH)),
    }
    return Drawn(drawn, items, item_side, user)
