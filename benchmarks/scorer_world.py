"""A large ranker over a million items, as drawn; and a trained one, to see how far off its native answers are."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.machine import REPOSITORY, say
from benchmarks.result import Row
from prerank.bundle.executor import NativeRanker
from prerank.config import load_config, parse_config
from prerank.data.logs import open_tables
from prerank.kernels.engine import Engine
from prerank.lifecycle.training import train
from prerank.models.cross_feature import CrossFeatureRanker
from prerank.train.examples import UserExamples
from prerank.train.items import DailyItems
from prerank.train.prepare import prepare

SEED, LENGTH, ADVERTISERS, TOPICS = 7, 50, 20_000, 200
WINNERS, REQUESTS = 1_000, 100
_KUAIRAND = REPOSITORY / "examples" / "kuairand" / "funnel.toml"
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


def drawn_world(num_items: int) -> Drawn:
    """Over a million items or so."""
    config = parse_config(FUNNEL, "benchmarks/scorer_world.py")
    ranker = CrossFeatureRanker(config, _SIZES).eval()
    for weight in ranker.parameters():  # also of what begins at zero
        weight.add_(0.02 * torch.randn_like(weight))
    items = {
        "advertiser": torch.randint(ADVERTISERS, (num_items,), dtype=torch.int32),
        "topics": torch.randint(-1, TOPICS, (num_items, 3), dtype=torch.int16),
        "price": torch.rand(num_items),
        "bid_micros": torch.randint(1_000, 1_000_000, (num_items,), dtype=torch.int32),
    }
    step, pieces = 1 << 16, []
    for start in range(0, num_items, step):
        pieces.append(ranker.item_side({name: column[start : start + step] for name, column in items.items()}))
    item_side = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
    user = {
        "country": torch.tensor([3]),
        "surface": torch.tensor([1]),
        "clicks": torch.randint(-1, ADVERTISERS, (1, LENGTH)),
        "topics_1d": torch.randint(-1, TOPICS, (1, LENGTH)),
        "advertiser_1h": torch.randint(-1, ADVERTISERS, (1, LENGTH)),
    }
    return Drawn(ranker, items, item_side, user)


def agreement_rows(data: Path | None) -> Iterator[Row]:
    """Of a ranker trained on KuaiRand's labels: the native top 1,000 of all items against that of float64."""
    if data is None:
        yield Row.skipped("agreement with float64", "no folder of KuaiRand-Pure; name one by --data")
        return
    config = load_config(_KUAIRAND)
    one = replace(config.retrieval, epochs=1)
    config = replace(config, retrieval=one, heavy_ranker=None, ranker=replace(config.ranker, epochs=1, batch=1024))
    say("scorer_cpu: training a ranker to compare with float64")
    with TemporaryDirectory() as kept:
        home = Path(kept)
        tables = open_tables(config, data, home / "tables")
        trained = train(config, tables, home)
        prepared = prepare(config, tables, home / "work")
    ranker = trained.ranker
    assert isinstance(ranker, CrossFeatureRanker)
    moments = np.flatnonzero(prepared.of_days(config.data.days("test")))[::1_000][:REQUESTS]
    with torch.inference_mode():
        items = DailyItems(prepared, config).latest()
        users = UserExamples(prepared, config.features).at(moments)
        side, rows = ranker.item_side(items), torch.arange(len(items["item_id"]))[None]
        engine = Engine(2)
        native = NativeRanker(ranker, {name: tensor.contiguous() for name, tensor in side.items()}, engine)
        found, half = [], []
        for number in range(len(moments)):
            user = ranker.user_side({name: column[number : number + 1] for name, column in users.items()})
            found.append(native(user, rows)[0].sigmoid())
            half.append(_in_bfloat16(ranker, user, side))
        engine.close()
        exact = [_in_float64(ranker, users, side, number) for number in range(len(moments))]
    for name, probs, is_ours in (("native", found, True), ("eager bfloat16", half, False)):
        for metric, bar in (("overlap", 0.99), ("captured", 0.999)):
            told = [_agreement(mine, true, metric) for mine, true in zip(probs, exact, strict=True)]
            row = Row.of(f"{name}: {metric} of float64's top 1,000, mean over requests", float(np.mean(told)), "share")
            if is_ours:
                row = replace(row, bar=bar, holds=bool(np.mean(told) >= bar))
            yield row


def _in_float64(ranker: CrossFeatureRanker, users: dict[str, Tensor], side: dict[str, Tensor], number: int) -> Tensor:
    exact = deepcopy(ranker).double()
    user = ranker.user_side({name: column[number : number + 1] for name, column in users.items()})
    wide = [{n: t.double() if t.is_floating_point() else t for n, t in one.items()} for one in (user, side)]
    out: Tensor = exact(wide[0], {name: tensor.unsqueeze(0) for name, tensor in wide[1].items()})[0].sigmoid()
    return out


def _in_bfloat16(ranker: CrossFeatureRanker, user: dict[str, Tensor], side: dict[str, Tensor]) -> Tensor:
    half = deepcopy(ranker).bfloat16()
    low = [{n: t.bfloat16() if t.is_floating_point() else t for n, t in one.items()} for one in (user, side)]
    out: Tensor = half(low[0], {name: tensor.unsqueeze(0) for name, tensor in low[1].items()})[0].float().sigmoid()
    return out


def _agreement(mine: Tensor, true: Tensor, metric: str) -> float:
    """Of the first task's probabilities [I, T], which a constant worth makes the utility."""
    kept = min(WINNERS, len(true))
    chosen, best = mine[:, 0].double().topk(kept).indices, true[:, 0].topk(kept).indices
    if metric == "captured":
        return float(true[chosen, 0].sum() / true[best, 0].sum())
    return float(torch.isin(chosen, best).double().mean())
