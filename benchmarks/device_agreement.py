"""How far off the winners on a device are: those of float64 beside what bfloat16 and the kernel make of them.

Weights are as drawn, so that utilities lie closer together than a trained ranker's do.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from benchmarks.device_graphs import made
from benchmarks.device_rows import Bench
from benchmarks.device_world import Asked, Stage
from benchmarks.result import Row
from benchmarks.scorer_world import WINNERS

OVERLAP, CAPTURED = "overlap", "utility captured"
_BARS = {OVERLAP: 0.99, CAPTURED: 0.999}
_PIECE = 1 << 13
_REQUESTS = 8


def agreement_rows(bench: Bench) -> Iterator[Row]:
    """Of a large request's candidates the winners by utility, before caps."""
    num, where = bench.sizes.large, bench.device.where
    exact = made(bench.device, lambda: Stage(bench.world, where, torch.float64))
    half = made(bench.device, lambda: Stage(bench.world, where, torch.bfloat16))
    fused = made(bench.device, half.fused)
    requests = [bench.world.asked(num, seed) for seed in range(_REQUESTS)]
    truth = [_exactly(exact, one) for one in requests]
    for name, logits in (("fused program", fused), ("eager bfloat16", half.logits)):
        found = []
        for asked in requests:
            side = {n: half.there(one) for n, one in asked.user_side.items()}
            found.append(half.judge(side, asked.rows.to(where), logits).utility[0].cpu())
        for metric, bar in _BARS.items():
            told = [agreement(mine, true, metric) for mine, true in zip(found, truth, strict=True)]
            what = f"{name}: {metric} of float64's {WINNERS:,} winners, mean over requests"
            row = Row.of(bench.called(what, num), float(np.mean(told)), "share", num)
            yield row.over(bar) if name == "fused program" else row


def agreement(mine: Tensor, true: Tensor, metric: str) -> float:
    """Of utilities [N] as found and as they are: which share of the best was found, or of what the best are worth."""
    kept = min(WINNERS, len(true))
    chosen, best = mine.double().topk(kept).indices, true.topk(kept).indices
    if metric == CAPTURED:
        return float(true[chosen].sum() / true[best].sum())
    return float(torch.isin(chosen, best).double().mean())


def _exactly(stage: Stage, asked: Asked) -> Tensor:
    """Utilities float64 [N]; the bids are whole numbers, which are exact in any case."""
    side = {name: stage.there(one) for name, one in asked.user_side.items()}
    found = []
    for rows in torch.split(asked.rows.to(stage.where), _PIECE, 1):
        probs = stage.logits(side, rows).sigmoid()[0, :, 0]
        found.append(probs * stage.bids(rows[0]))
    return torch.cat(found).double().cpu()
