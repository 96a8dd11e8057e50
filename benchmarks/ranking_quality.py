"""How well does each ranker know what users click, watch and like, at about the same number of weights?

KuaiRand-Pure, the development split of examples/kuairand/funnel.toml, three seeds, every impression of the days. All
have the same tables and vectors; `compared` sets the rest so that the weights outside the tables are about as many.
The seeds say how far the training's draws move a number; the bootstrap, how far the choice of users moves the
difference to two_tower.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Literal, TypeAlias

import numpy as np
from torch import nn

from benchmarks.machine import REPOSITORY, say
from benchmarks.result import Row
from benchmarks.run import Measured, Options, run
from prerank.config import Config, RankerConfig, load_config
from prerank.data.logs import open_tables
from prerank.evaluate.ranking import RankingQuality, evaluate_ranking
from prerank.metrics.classification import auc, log_loss
from prerank.models.rankers import Ranker
from prerank.train.prepare import Prepared, prepare
from prerank.train.ranking import Impressions, train_ranker
from prerank.types import Array

FUNNEL = REPOSITORY / "examples" / "kuairand" / "funnel.toml"
SEEDS, QUICK_SEEDS, QUICK_EPOCHS = (7, 8, 9), (7,), 1
Part: TypeAlias = Literal["validate", "test"]
PARTS: tuple[Part, ...] = ("validate", "test")  # options were chosen on the first, the second is what is told
METRICS = {"AUC": auc, "log loss": log_loss}
BASE = "two_tower"
DRAWS = 1000


def compared(ranker: RankerConfig) -> dict[str, RankerConfig]:
    """The options of each ranker; a domain's experts cost weights, so with them each expert is narrower."""
    return {
        BASE: replace(ranker, model="two_tower"),
        "mtmd": replace(ranker, model="mtmd", domain="tab", hidden=(32,)),
        "mtmd without domains": replace(ranker, model="mtmd", hidden=(72,)),
        "mmoe_dcn": replace(ranker, model="mmoe_dcn", hidden=(80,)),
    }


def measure(options: Options, ceilings: Mapping[str, float]) -> Measured:
    config = load_config(FUNNEL)
    if options.quick:
        config = replace(config, ranker=replace(config.ranker, epochs=QUICK_EPOCHS))
    seeds = QUICK_SEEDS if options.quick else SEEDS
    rankers = compared(config.ranker)
    configs = {name: replace(config, ranker=one) for name, one in rankers.items()}
    said = {name: one.to_dict()["ranker"] for name, one in configs.items()}
    about: dict[str, object] = {"funnel": config.to_dict(), "seeds": list(seeds), "rankers": said}
    if options.data is None:
        why = "no folder of KuaiRand-Pure; name one by --data or PRERANK_DATA"
        return Measured([Row.skipped("rankers beside two towers", why)], about)
    with TemporaryDirectory() as name:
        work = Path(name)
        say("ranking_quality: preparing")
        prepared = prepare(config, open_tables(config, options.data, work), work)
        shown = {part: Impressions(prepared, config, _events(prepared, config, part)) for part in PARTS}
        # seed by seed, so that a change of the machine's speed is every ranker's
        trained: dict[str, list[_Trained]] = {name: [] for name in configs}
        for seed in seeds:
            for name, one in configs.items():
                say(f"ranking_quality: training {name}, seed {seed}")
                folder = work / "runs" / f"{name} {seed}"
                trained[name].append(_train(replace(one, seed=seed), prepared, shown, folder))
        floors = {part: _floors(trained[BASE][0].ranker, prepared, config, part) for part in PARTS}
    rows = [*_size_rows(trained)]
    for part in PARTS:
        rows += _part_rows(part, trained, shown[part], list(config.tasks), floors[part])
    return Measured(rows, about)


@dataclass(frozen=True, slots=True)
class _Trained:
    """One training: seconds on the clock, and probabilities by part, float32 [P, T]."""

    ranker: Ranker
    seconds: float
    probs: dict[Part, Array]


def _train(config: Config, prepared: Prepared, shown: Mapping[Part, Impressions], folder: Path) -> _Trained:
    started = perf_counter()
    ranker, _ = train_ranker(prepared, config, folder, folder.name)
    seconds = perf_counter() - started
    return _Trained(ranker, seconds, {part: impressions.predict(ranker) for part, impressions in shown.items()})


def _events(prepared: Prepared, config: Config, part: Part) -> Array:
    return np.flatnonzero(prepared.of_days(config.data.days(part)))


def _floors(ranker: Ranker, prepared: Prepared, config: Config, part: Part) -> RankingQuality:
    """What needs no ranker at all; the ranker given is measured too and not looked at."""
    return evaluate_ranking(ranker, prepared, config, config.data.days(part))


def num_weights(ranker: Ranker) -> int:
    """Of everything but the tables."""
    assert isinstance(ranker, nn.Module)
    tables = {id(module.weight) for module in ranker.modules() if isinstance(module, nn.Embedding)}
    return sum(weight.numel() for weight in ranker.parameters() if id(weight) not in tables)


def _size_rows(trained: Mapping[str, Sequence[_Trained]]) -> Iterator[Row]:
    base_weights = num_weights(trained[BASE][0].ranker)
    base_s = _mean_s(trained[BASE])
    for name, runs in trained.items():
        against = "" if name == BASE else BASE
        weights, seconds = num_weights(runs[0].ranker), _mean_s(runs)
        ratio = weights / base_weights if against else None
        yield Row.of(f"{name}: weights outside the tables", weights, "weights", None, against, ratio)
        ratio = seconds / base_s if against else None
        yield Row.of(f"{name}: training, mean over seeds", seconds, "s", len(runs), against, ratio)


def _mean_s(runs: Sequence[_Trained]) -> float:
    return float(np.mean([one.seconds for one in runs]))


def _part_rows(
    part: Part,
    trained: Mapping[str, Sequence[_Trained]],
    impressions: Impressions,
    tasks: Sequence[str],
    floors: RankingQuality,
) -> Iterator[Row]:
    user = impressions.users.prepared.events["user"][impressions.events]
    n = len(impressions.events)
    for number, task in enumerate(tasks):
        label = impressions.labels.numpy()[:, number]
        probs = {name: np.stack([one.probs[part][:, number] for one in runs]) for name, runs in trained.items()}
        yield Row.of(f"each item's rate, {part}, {task} AUC", floors.tasks[task]["item_rate_auc"], "AUC", n)
        yield Row.of(f"the training rate, {part}, {task} log loss", floors.tasks[task]["rate_log_loss"], "log loss", n)
        for metric, measured in METRICS.items():
            found = {name: np.array([measured(label, one) for one in by_seed]) for name, by_seed in probs.items()}
            for name, by_seed in found.items():
                yield from _metric_rows(f"{name}, {part}, {task} {metric}", metric, by_seed, found[BASE], name, n)
        for name in probs:
            if name != BASE:
                said = f"{name}, {part}, {task} log loss: below {BASE}"
                yield from _difference_rows(said, log_losses(label, probs[BASE]) - log_losses(label, probs[name]), user)


def _metric_rows(said: str, metric: str, by_seed: Array, base: Array, name: str, n: int) -> Iterator[Row]:
    mean = float(by_seed.mean())
    against = "" if name == BASE else BASE
    yield Row.of(said, mean, metric, n, against, mean / float(base.mean()) if against else None)
    yield Row.of(f"{said}: least of the seeds", float(by_seed.min()), metric, len(by_seed))
    yield Row.of(f"{said}: most of the seeds", float(by_seed.max()), metric, len(by_seed))
    if len(by_seed) > 1:
        yield Row.of(f"{said}: deviation over seeds", float(by_seed.std(ddof=1)), metric, len(by_seed))


def _difference_rows(said: str, by_row: Array, user: Array) -> Iterator[Row]:
    """by_row float64 [P], the mean over seeds of what each impression's loss is less than two_tower's."""
    yield Row.of(said, float(by_row.mean()), "log loss", len(by_row))
    error = standard_error_over_users(by_row, user, seed=0)
    yield Row.of(f"{said}: standard error over users", error, "log loss", len(np.unique(user)))


def log_losses(label: Array, prob: Array) -> Array:
    """label [P] and prob float [seeds, P] -> each impression's loss, the mean over seeds, float64 [P]."""
    truth = np.where(label > 0, prob, 1 - prob.astype(np.float64))
    losses: Array = -np.log(truth.clip(np.finfo(np.float64).eps)).mean(axis=0)
    return losses


def standard_error_over_users(by_row: Array, user: Array, seed: int) -> float:
    """Of the mean of float64 [P], each row of a user int [P]: the deviation over resamples of users (Efron 1979)."""
    _, member, rows = np.unique(user, return_inverse=True, return_counts=True)
    total = np.bincount(member, by_row)
    draw = np.random.default_rng(seed)
    chosen = (draw.integers(len(rows), size=len(rows)) for _ in range(DRAWS))
    return float(np.std([total[users].sum() / rows[users].sum() for users in chosen], ddof=1))


if __name__ == "__main__":
    run("ranking_quality", __doc__, measure)
