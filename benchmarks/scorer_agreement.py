"""How far off the native answers of a trained ranker are, for those of weights as drawn say little."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from benchmarks.machine import REPOSITORY, say
from benchmarks.result import Row
from benchmarks.scorer_world import WINNERS
from prerank.bundle.executor import NativeRanker
from prerank.config import load_config
from prerank.data.logs import open_tables
from prerank.kernels.engine import Engine
from prerank.lifecycle.training import train
from prerank.models.cross_feature import CrossFeatureRanker
from prerank.train.examples import UserExamples
from prerank.train.items import DailyItems
from prerank.train.prepare import prepare

REQUESTS = 100
_KUAIRAND = REPOSITORY / "examples" / "kuairand" / "funnel.toml"


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
