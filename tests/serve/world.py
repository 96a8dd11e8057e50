"""A funnel small enough to know by heart: eight items, three users, weights from a seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from prerank.config import Config, parse_config
from prerank.features.transforms import Transforms
from prerank.stores.records import EXPOSED
from prerank.stores.users import Events, UserStore
from prerank.types import Array

NUM_ITEMS = 8
T0 = 1_650_844_800_000
"""The moment of the first event; one follows every second."""
UNTIL = T0 + 4000
"""That of the last."""


def config(**changes: object) -> Config:
    plain: dict[str, object] = {
        "name": "tiny",
        "data": {
            "impressions": "impressions.parquet",
            "items": "items.parquet",
            "users": "users.parquet",
            "train": ["2022-04-25", "2022-04-26"],
            "validate": ["2022-04-27", "2022-04-27"],
            "test": ["2022-04-28", "2022-04-28"],
        },
        "features": {
            "user": {
                "country": {"kind": "category", "dim": 4},
                "clicks": {"kind": "history", "of": "item_id", "events": "is_click", "length": 3},
                "seen": {"kind": "history", "of": "genre", "length": 4},
            },
            "context": {"hour": {"kind": "category", "dim": 2}, "surface": {"kind": "category", "dim": 2}},
            "item": {
                "item_id": {"kind": "category", "dim": 4},
                "genre": {"kind": "category", "dim": 4},
                "bid_micros": {"kind": "value"},
            },
        },
        "tasks": {"click": {"label": "is_click"}, "like": {"label": "is_like"}},
        "retrieval": {
            "relevant": "is_click",
            "targets": {"is_click": 1.0},
            "popularity": {"half_life_days": [1.0]},
            "dim": 4,
            "hidden": [8],
            "keep": 6,
        },
        "ranker": {"model": "two_tower", "dim": 4, "hidden": [8], "keep": 5},
        "utility": {"click": {"value": "bid_micros"}, "like": {"value": 10.0}},
        "metadata": {"columns": ["title", "genre"]},
    }
    return parse_config(plain | changes, "tiny")


def counting() -> Config:
    """The same with a bag, and counters of every kind: by nothing, a category or a bag; lately by time or exposures.

    And shares of clicks, lately by both.
    """
    plain = config().to_dict()["features"]
    assert isinstance(plain, dict)
    plain["item"]["topics"] = {"kind": "bag", "dim": 4, "length": 3}
    lately = [{"window": "2s"}, {"window": "1h"}, {"last": 3}]
    plain["interaction"] = {
        f"{count}_{by or 'any'}_{n}": {"count": count, "by": by, "length": 4, **when}
        for count in ("impression", "is_click")
        for by in ("", "genre", "topics")
        for n, when in enumerate(lately)
    } | {f"share_{n}": {"count": "is_click", "share": True, **when} for n, when in enumerate(lately)}
    return config(features=plain)


def items() -> pa.Table:
    n = range(NUM_ITEMS)
    return pa.table(
        {
            "item_id": [100 + i for i in n],
            "genre": [f"genre {i % 3}" for i in n],
            "bid_micros": [1000 * (i + 1) for i in n],
            "title": [f"title {i}" for i in n],
            "topics": [[f"topic {j}" for j in range(i % 3)] for i in n],
        }
    )


def users() -> pa.Table:
    return pa.table({"user_id": [1, 2, 3], "country": ["de", "fr", "de"]})


def events() -> list[Events]:
    """User 1 saw items 100..104, one a second, and clicked 101 and 103; user 2 saw 107, and 999 which is no item."""
    seen = np.arange(100, 105)
    return [
        shown(1, seen, T0 + 1000 * np.arange(5), [0, 1, 0, 3, 0]),
        shown(2, np.array([107, 999]), np.array([T0, T0 + 1000]), [1, 1]),
    ]


def shown(user_id: int, item_ids: Array, time_ms: Array, labels: list[int], late_ms: int = 0) -> Events:
    """Exposures of one user whose labels, as bits, were known `late_ms` after them."""
    return user_id, item_ids, time_ms, time_ms + late_ms, np.array(labels, np.uint32) | EXPOSED


def transforms(funnel: Config) -> Transforms:
    hours = pa.table({"hour": [0, 1, 2], "surface": ["feed", "search", "feed"]})
    return Transforms.fit(
        funnel.features,
        users=(users(), np.ones(3, np.int64)),
        items=(items(), np.ones(NUM_ITEMS, np.int64)),
        context=[hours],
    )


def write_users(path: Path) -> None:
    UserStore.write(path, users(), events(), labels=["is_click", "is_like"])


def seeded(module: torch.nn.Module, seed: int) -> None:
    """Every parameter anew from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    module.eval()
