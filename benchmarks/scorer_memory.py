"""What a million resident items take: 64 numbers, 16 categories, and the rows a ranker computes of them beforehand."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from benchmarks.machine import in_own_process, resident_bytes
from benchmarks.result import Row
from benchmarks.scorer_world import FUNNEL, LENGTH, SEED, WINNERS
from prerank.bundle.item_table import ItemTable
from prerank.bundle.scorer import Scorer
from prerank.business.utility import Utility
from prerank.config import parse_config
from prerank.kernels.engine import Engine
from prerank.models.rankers import build_ranker
from prerank.types import Array, CandidateSet

NUMBERS = 64
CATEGORIES = (100, 1_000, 20_000, 100_000) * 4
"""How many values each has."""
WIDTHS = {64: 2.0, 256: 4.0}
"""By the ranker's width, what the issue lets a million items take, in GB: the default's, and the benchmark's own."""
_MILLION = 1_000_000
_OF = 2
"""The category that users have a history of."""
_OF_USER = {
    "user": {
        "country": {"kind": "category", "dim": 8},
        "clicks": {"kind": "history", "of": f"category_{_OF}", "length": LENGTH},
    },
    "context": {"surface": {"kind": "category", "dim": 4}},
    "interaction": {"seen_1h": {"by": f"category_{_OF}", "window": "1h", "length": LENGTH}},
}


def memory_rows(num_items: int) -> Iterator[Row]:
    """Of a process of its own that has answered a request natively: all of it, Python and torch too."""
    for width, bar in WIDTHS.items():
        spent = in_own_process(_resident, num_items, width)
        name = f"Scorer: resident set with {NUMBERS} numbers, {len(CATEGORIES)} categories, a ranker of width {width}"
        row = Row.of(name, spent.made / 1e9, "GB", num_items)
        yield row if num_items < _MILLION else replace(row, bar=bar, holds=bool(spent.made < bar * 1e9))


def _resident(num_items: int, width: int) -> int:
    """Bytes this process holds once a scorer of so many items has answered."""
    torch.manual_seed(SEED)
    scorer = _scorer(num_items, width)
    engine = Engine(len(os.sched_getaffinity(0)))
    with torch.inference_mode():
        scorer.accelerate(engine)
        rows = torch.randint(num_items, (1, 10_000))
        valid = torch.ones_like(rows, dtype=torch.bool)
        scorer(_user(), CandidateSet(rows, torch.zeros(rows.shape), valid), WINNERS)
    gc.collect()
    held = resident_bytes()
    engine.close()
    return held


def _scorer(num_items: int, width: int) -> Scorer:
    """Of items as drawn, as a version holds them, with the ranker of the benchmark at this width; weights as drawn."""
    numbers = [f"number_{n}" for n in range(NUMBERS)]
    sizes = {f"category_{n}": values for n, values in enumerate(CATEGORIES)}
    features = {
        **{name: {"kind": "number"} for name in numbers},
        **{name: {"kind": "category", "dim": 16, "hash": values - 1} for name, values in sizes.items()},
        "bid_micros": {"kind": "value"},
    }
    config = parse_config({**FUNNEL, "features": {**_OF_USER, "item": features}, "ranker": _ranker(width)}, __file__)
    made = np.random.default_rng(SEED)
    columns: dict[str, Array] = {name: made.random(num_items, dtype=np.float32) for name in numbers}
    columns |= {name: made.integers(0, values, num_items) for name, values in sizes.items()}
    columns["bid_micros"] = made.integers(1_000, 1_000_000, num_items)
    items = ItemTable.build(np.arange(num_items), columns)
    known = {"user.country": 60, "context.surface": 4, **{f"item.{name}": values for name, values in sizes.items()}}
    ranker = build_ranker(config, known)
    return Scorer(items, ranker, Utility.build(ranker.tasks, config.utility)).eval()


def _ranker(width: int) -> dict[str, object]:
    return {**FUNNEL["ranker"], "width": width}


def _user() -> dict[str, Tensor]:
    codes = {name: torch.randint(-1, CATEGORIES[_OF], (1, LENGTH)) for name in ("clicks", "seen_1h")}
    return {"country": torch.tensor([3]), "surface": torch.tensor([1]), **codes}
