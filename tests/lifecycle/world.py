"""A log whose users want what their segment wants: known by construction, learnt in seconds, and easy to spoil.

Users and items have one of eight tastes; a user clicks on seven of ten items of his own taste and on one of twenty of
any other. Half of what he is shown is of his taste. So towers find 70 items of 560 where popularity finds any, a
ranker's normalised entropy is far below 1, and every damage to the labels, the features or the days shows.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prerank.config import Bound, Config, parse_config
from prerank.data.logs import Tables, open_tables
from prerank.lifecycle.build import load_users, publish_trained
from prerank.lifecycle.training import Trained, train
from prerank.types import day_number

TASTES, USERS, ITEMS, A_DAY = 8, 240, 560, 1_600
FIRST = "2026-03-02"
NUM_DAYS = 8
BOUNDS = {
    "retrieval_recall": {"not_below_live_by": 0.05},
    "recall_over_popularity": {"at_least": 1.5},
    "normalised_entropy": {"at_most": 0.8, "not_above_live_by": 0.05},
    "calibration_error": {"at_most": 0.1},
    "bf16_difference": {"at_most": 0.02},
    "latency_ms": {"at_most": 1000.0, "at_most_of_live": 3.0},
    "memory_mib": {"at_most_of_live": 1.5},
    "embedding_drift": {"at_most": 0.8},
}


def day(number: int) -> str:
    """The ISO day `number` days after the log's first."""
    return (date.fromisoformat(FIRST) + timedelta(days=number)).isoformat()


def plain(**changes: object) -> dict[str, object]:
    return {
        "name": "tastes",
        "data": {
            "impressions": "log.parquet",
            "items": "items.parquet",
            "users": "users.parquet",
            "train": [day(0), day(4)],
            "validate": [day(5), day(5)],
            "test": [day(6), day(6)],
        },
        "features": {
            "user": {
                "taste": {"kind": "category", "dim": 8},
                "age": {"kind": "number"},
                "clicks": {"kind": "history", "of": "kind", "events": "is_click", "length": 5},
            },
            "context": {"hour": {"kind": "category", "dim": 4}},
            "item": {
                "kind": {"kind": "category", "dim": 8},
                "price": {"kind": "number"},
                "bid": {"kind": "value"},
            },
            "interaction": {"kind_clicks": {"count": "is_click", "by": "kind", "window": "3d"}},
        },
        "tasks": {"click": {"label": "is_click"}},
        "retrieval": {
            "relevant": "is_click",
            "targets": {"is_click": 1.0},
            "popularity": {"half_life_days": [1.0]},
            "dim": 16,
            "hidden": [16],
            "epochs": 6,
            "batch": 128,
            "keep": 100,
        },
        "ranker": {
            "model": "cross_feature",
            "hidden": [16],
            "width": 16,
            "experts": 1,
            "low_rank": 4,
            "heads": 1,
            "epochs": 2,
            "batch": 256,
            "learning_rate": 0.005,
            "keep": 20,
        },
        "utility": {"click": {"value": "bid"}},
        "validate": BOUNDS,
        **changes,
    }


def quick(**changes: object) -> dict[str, object]:
    """Sections for what needs no good model."""
    base = plain()
    retrieval, ranker = dict(base["retrieval"]), dict(base["ranker"])  # type: ignore[call-overload]
    return {"retrieval": {**retrieval, "epochs": 1}, "ranker": {**ranker, "epochs": 1}, **changes}


def config(**changes: object) -> Config:
    return parse_config(plain(**changes), "tastes")


def log(num_days: int = NUM_DAYS, seed: int = 0) -> pa.Table:
    """A_DAY impressions a day, from midnight to a minute before the next."""
    draw = np.random.default_rng(seed)
    num = A_DAY * num_days
    user = draw.integers(0, USERS, num)
    own = draw.random(num) < 0.5
    # an item's taste is its number modulo TASTES, and so is a user's
    item = np.where(own, draw.integers(0, ITEMS // TASTES, num) * TASTES + user % TASTES, draw.integers(0, ITEMS, num))
    click = draw.random(num) < np.where(item % TASTES == user % TASTES, 0.7, 0.05)
    within = (np.arange(num) % A_DAY) * (24 * 3600 * 1000 // A_DAY) + draw.integers(0, 1000, num)
    time_ms = (day_number(FIRST) + np.arange(num) // A_DAY) * 24 * 3600 * 1000 + within
    hour = (within // 3_600_000).astype(np.int64)
    return pa.table({"user_id": user, "item_id": 1000 + item, "time_ms": time_ms, "is_click": click, "hour": hour})


def thin(log: pa.Table) -> pa.Table:
    """Every fourth impression, for what needs no good model."""
    return log.take(pa.array(range(0, log.num_rows, 4)))


def users() -> pa.Table:
    number = np.arange(USERS)
    return pa.table({"user_id": number, "taste": number % TASTES, "age": 20.0 + number % 50})


def items() -> pa.Table:
    number = np.arange(ITEMS)
    bids = 1000 + number % 7
    return pa.table({"item_id": 1000 + number, "kind": number % TASTES, "price": 1.0 + number % 11, "bid": bids})


def write(folder: Path, impressions: pa.Table, of_users: pa.Table | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(impressions, folder / "log.parquet")
    pq.write_table(items(), folder / "items.parquet")
    pq.write_table(users() if of_users is None else of_users, folder / "users.parquet")
    return folder


@dataclass(frozen=True)
class Made:
    """A trained funnel, its tables, and the folder of the store it was trained in."""

    trained: Trained
    tables: Tables
    home: Path

    def publish(self, home: Path, change: Callable[[Trained], Trained] = lambda one: one, **bounds: Bound) -> str:
        """Into the funnel's folder `home`, with its users; `change` spoils what is published; `bounds` are gates."""
        trained = change(self.trained)
        if bounds:
            trained = replace(trained, config=replace(trained.config, validate=bounds))
        home.mkdir(parents=True, exist_ok=True)
        load_users(trained.config, self.tables, trained.prepared, home)
        return publish_trained(trained, self.tables, home, {})


def made(config: Config, data: Path, home: Path) -> Made:
    tables = open_tables(config, data, home / "work")
    return Made(train(config, tables, home), tables, home)


def moved(of: Config, by: int) -> Config:
    """The same with every window `by` days later."""
    later = {
        part: tuple((date.fromisoformat(one) + timedelta(days=by)).isoformat() for one in getattr(of.data, part))
        for part in ("train", "validate", "test")
    }
    return replace(of, data=replace(of.data, **later))
