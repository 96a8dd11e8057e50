"""A large ranker over a million items, published and live with users who have a past, as `Funnel.open` takes it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from benchmarks.scorer_world import ADVERTISERS, FUNNEL, LENGTH, SEED, TOPICS
from prerank.bundle.publish import Parts, publish
from prerank.bundle.registry import Gate, Registry
from prerank.config import Config, parse_config
from prerank.features.transforms import Transforms
from prerank.models.rankers import build_ranker
from prerank.models.towers import build_towers
from prerank.stores.records import EXPOSED
from prerank.stores.tail import TAIL, LmdbTail
from prerank.stores.users import UserStore
from prerank.types import Array

KEEP, K = 10_000, 1_000
COLUMNS = ("advertiser", "topics", "price", "bid_micros")
T0_MS = 1_767_225_600_000
NUM_USERS, COUNTRIES = 1_000, 4


def served_items(num: int) -> pa.Table:
    """Items as a table, with what targeting and answers read."""
    made = np.random.default_rng(SEED)
    topics = pa.FixedSizeListArray.from_arrays(pa.array(made.integers(0, TOPICS, 3 * num)), 3)
    return pa.table(
        {
            "item_id": np.arange(num),
            "advertiser": made.integers(0, ADVERTISERS, num),
            "topics": topics.cast(pa.list_(pa.int64())),
            "price": made.random(num, dtype=np.float32),
            "bid_micros": made.integers(1_000, 1_000_000, num),
            "revenue": made.random(num),
        }
    )


def _config(inventory: Mapping[str, object], keep: int, **more: object) -> Config:
    popularity = {"half_life_days": [1.0]}
    retrieval = {**FUNNEL["retrieval"], "keep": keep, "popularity": popularity, "index": {"storage": "bfloat16"}}
    plain = {**FUNNEL, "retrieval": retrieval, "ranker": {**FUNNEL["ranker"], "keep": K}, "inventory": inventory}
    return parse_config({**plain, "metadata": {"columns": list(COLUMNS)}, **more}, "benchmarks/served_world.py")


def published(store: Path, items: pa.Table, inventory: Mapping[str, object], keep: int = KEEP, **more: object) -> Path:
    """A version that is live, with users that have seen something and the items of the tail.

    `more` are further sections of the funnel file.
    """
    torch.manual_seed(SEED)
    config, num = _config(inventory, keep, **more), items.num_rows
    users = pa.table({"user_id": np.arange(1_000), "country": [f"c{n % COUNTRIES}" for n in range(1_000)]})
    transforms = Transforms.fit(
        config.features,
        users=(users, np.ones(len(users), np.int64)),
        items=(items, np.ones(num, np.int64)),
        context=[pa.table({"surface": ["a", "b", "c"]})],
    )
    golden: dict[str, Array] = {
        **transforms.encode("user", users.slice(0, 1)),
        **transforms.encode("context", pa.table({"surface": ["a"]})),
        **{name: np.full((1, LENGTH), -1, np.int32) for name in ("clicks", "topics_1d", "advertiser_1h")},
    }
    parts = Parts(
        config=config,
        transforms=transforms,
        towers=build_towers(config, transforms.sizes()),
        ranker=build_ranker(config, transforms.sizes()),
        item_ids=items["item_id"].to_numpy(),
        item_columns=transforms.encode("item", items),
        item_table=items,
        targeting=items if config.targeting else None,
        popularity=np.zeros((num, 1), np.float32),
        golden_user=golden,
        parents={},
        metrics={},
    )
    store.mkdir(parents=True, exist_ok=True)
    version = publish(store, parts)
    Registry(store).write_validation(version, [Gate("golden", "", 1.0, True)])
    Registry(store).promote(version, "a benchmark", "")
    made = np.random.default_rng(SEED)
    seen = (
        (
            user,
            made.integers(num, size=LENGTH),
            T0_MS - 3_600_000 + np.arange(LENGTH),
            T0_MS - 3_500_000 + np.arange(LENGTH),
        )
        for user in range(1_000)
    )
    events = ((user, ids, at, known, np.full(LENGTH, EXPOSED | 1, np.uint32)) for user, ids, at, known in seen)
    UserStore.write(store / "users.lmdb", users, events, labels=["is_click", "is_purchase"])
    if config.inventory.resident is not None:
        LmdbTail.write(store / TAIL, items, "item_id", COLUMNS)
    return store
