"""How close does each lightweight ranker come to the heavy one, and what is each ingredient worth?

KuaiRand-Pure, the development split of examples/kuairand/funnel.toml, three seeds. A seed has towers, a heavy ranker,
its cross-fitted labels and every student of its own. Students are judged on the test day: on all impressions (winners),
and on 1,000 candidates that the towers retrieve at the first moment of each of 1,000 users, by KL to the heavy ranker
and by how much of its top 100 theirs holds. Options were chosen on the validate day. Two processes of one thread each.
PRERANK_BENCHMARK_SEEDS=7,8 takes other seeds, PRERANK_BENCHMARK_STORE names a folder that keeps trainings.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import numpy as np
import torch
from torch import nn

from benchmarks.lightgbm_peer import is_there, lightgbm_probs
from benchmarks.machine import REPOSITORY, say
from benchmarks.result import Row
from benchmarks.run import Measured, Options, run
from prerank.config import Config, Crossing, HeavyRankerConfig, Segments, load_config
from prerank.data.logs import Tables, open_tables
from prerank.evaluate.compare import Comparison, Predictions, compare
from prerank.evaluate.consistency import Candidates
from prerank.evaluate.estimates import Resampling
from prerank.evaluate.judge import ask, predict
from prerank.evaluate.winners import Winners
from prerank.lifecycle.training import train, train_teacher
from prerank.models.ranker import Ranker
from prerank.models.towers import TwoTower
from prerank.schema import Rate
from prerank.train.prepare import prepare
from prerank.train.ranking import Impressions

FUNNEL = REPOSITORY / "examples" / "kuairand" / "funnel.toml"
SEEDS, QUICK_SEEDS = (7, 8, 9), (7,)
PASSES = 6  # of every student; the example's funnel has fewer, for its demo is to end in minutes
NUM_ABLATED = 1  # seeds of the heavy ranker's ablations, and of the students of ONCE
PEER = "LightGBM"
ALONE, SEGMENTED = "cross_feature, winners alone", "cross_feature a segment"
ONCE = (ALONE, SEGMENTED)  # students of one seed
TEACHER, BASE, FULL, HARD = "heavy ranker", "mmoe_dcn", "cross_feature", "cross_feature on labels"
BARS = {
    ("auc", "click"): 0.751,
    ("log_loss", "click"): 0.584,
    ("auc", "long_view"): 0.758,
    ("log_loss", "long_view"): 0.531,
    ("auc", "like"): 0.872,
    ("log_loss", "like"): 0.0605,
}
OVERLAP_BAR = 0.87
LESS_KL = {"cross_feature, no crossings": 0.12, "cross_feature, attention": 0.20, FULL: 0.40}


def students(config: Config) -> dict[str, Config]:
    """The funnel of each student; widths are set for about equal weights outside the tables."""
    ranker = config.ranker
    full = replace(config, ranker=replace(ranker, model="cross_feature"))
    without = {name: replace(full, ranker=replace(full.ranker, crossings=kept)) for name, kept in _CROSSINGS.items()}
    return {
        BASE: replace(config, ranker=replace(ranker, model="mmoe_dcn", hidden=(16,))),
        "mtmd": replace(config, ranker=replace(ranker, model="mtmd", domain="tab", hidden=(35,))),
        **without,
        FULL: full,
        ALONE: replace(full, distillation=replace(config.distillation, candidates=0)),
        SEGMENTED: replace(full, segments=Segments(by="tab", own=("1", "0"))),
        HARD: replace(full, heavy_ranker=None, ranker=replace(full.ranker, patience=1)),  # which labels teach by heart
    }


_CROSSINGS: Mapping[str, tuple[Crossing, ...]] = {
    "cross_feature, no crossings": (),
    "cross_feature, attention": ("attention",),
}


def ablations(config: Config) -> dict[str, Config]:
    """The heavy ranker without one ingredient each."""
    heavy, schema = config.heavy_ranker, config.features
    assert heavy is not None

    def options(**changed: object) -> Config:
        return replace(config, heavy_ranker=replace(heavy, **changed))  # type: ignore[arg-type]

    def counters(kept: Mapping[str, object]) -> Config:
        return replace(config, features=replace(schema, interaction=kept))  # type: ignore[arg-type]

    def of_the_log() -> Config:
        item = {n: replace(kind, history=False) if isinstance(kind, Rate) else kind for n, kind in schema.item.items()}
        counted = {n: c for n, c in schema.interaction.items() if not c.share}
        return replace(config, features=replace(schema, item=item, interaction=counted))

    counted = schema.interaction
    return {
        "without shares, and rates of before the log": of_the_log(),
        "without counters by item feature": counters({n: c for n, c in counted.items() if not c.by}),
        "without user state": counters({n: c for n, c in counted.items() if c.by}),
        "without id regularisation": options(tables="own", id_dropout=0.0, average=0.0, patience=0),
        "without attention": options(crossings=("matches",)),
        "without cross features": options(crossings=()),
        "without cross network": options(cross_layers=1, low_rank=1),
    }


@dataclass(frozen=True, slots=True)
class Told:
    """What one training gave on the test day: its predictions, its seconds and its weights outside the tables."""

    predictions: Predictions
    seconds: float
    weights: int


def measure(options: Options, ceilings: Mapping[str, float]) -> Measured:
    if options.data is None:
        return Measured([Row.skipped("ranking quality", "no folder of KuaiRand-Pure; name one by --data")], {})
    named = os.environ.get("PRERANK_BENCHMARK_SEEDS", "")
    seeds = QUICK_SEEDS if options.quick else tuple(map(int, named.split(","))) if named else SEEDS
    config = load_config(FUNNEL)
    config = _quick(config) if options.quick else replace(config, ranker=replace(config.ranker, epochs=PASSES))
    with TemporaryDirectory() as kept:
        home = Path(os.environ.get("PRERANK_BENCHMARK_STORE", kept))
        jobs = [(seed, BASE) for seed in seeds]
        fewer = seeds[:NUM_ABLATED]
        later = [(seed, name) for name in students(config) if name not in (BASE, *ONCE) for seed in seeds]
        later += [(seed, name) for name in ONCE for seed in fewer]
        later += [(seed, name) for name in ablations(config) for seed in fewer]
        told: dict[tuple[int, str], Told] = {}
        for own in (config, *ablations(config).values()):  # here, for two processes would be in each other's way
            prepare(own, open_tables(own, options.data, home / "tables"), home / "work")
        with ProcessPoolExecutor(2, get_context("spawn"), _one_thread) as pool:
            for some in (jobs, [(seed, TEACHER) for seed in seeds] + later):
                asked = [pool.submit(_train, config, options.data, home, *job) for job in some]
                for job, one in zip(some, asked, strict=True):
                    told[job] = one.result()
                    say(f"seed {job[0]}, {job[1]}: {told[job].seconds:.0f} s")
        rows = list(_rows(config, options.data, home, seeds, told))
    said = {name: one.to_dict()["ranker"] for name, one in students(config).items()}
    return Measured(rows, {"seeds": list(seeds), "heavy_ranker": config.to_dict()["heavy_ranker"], "rankers": said})


def _one_thread() -> None:
    torch.set_num_threads(1)


def _quick(config: Config) -> Config:
    heavy = HeavyRankerConfig(width=16, hidden=(16,), experts=1, epochs=1, folds=0, batch=4096)
    small = replace(config.ranker, width=16, hidden=(16,), experts=1, epochs=1, batch=4096)
    retrieval = replace(config.retrieval, epochs=1)
    taught = replace(config.distillation, candidates=1, among=100)
    return replace(config, heavy_ranker=heavy, ranker=small, retrieval=retrieval, distillation=taught)


def _train(config: Config, data: Path, home: Path, seed: int, name: str) -> Told:
    """One student, the heavy ranker, or the heavy ranker without an ingredient; what others trained is taken over."""
    own = {**students(config), TEACHER: config, **ablations(config)}[name]
    own = replace(own, seed=seed)
    tables = open_tables(own, data, home / "tables")
    started = perf_counter()
    ranker: Ranker = (
        train(own, tables, home).ranker if name in students(config) else train_teacher(own, tables, home)[0]
    )
    seconds = perf_counter() - started
    days, prepared = own.data.days("test"), prepare(own, tables, home / "work")
    asked = None
    if name not in ablations(config):
        asked = ask(_towers(config, tables, home, seed), prepared, own, days)
    impressions = Impressions(prepared, own, np.flatnonzero(prepared.of_days(days)))
    return Told(predict(ranker, impressions, asked), seconds, num_weights(ranker))


def _towers(config: Config, tables: Tables, home: Path, seed: int) -> TwoTower:
    """The towers that the students of a seed share."""
    return train(replace(students(config)[BASE], seed=seed), tables, home).towers


def num_weights(ranker: Ranker) -> int:
    """Of everything but the tables."""
    assert isinstance(ranker, nn.Module)
    tables = {id(module.weight) for module in ranker.modules() if isinstance(module, nn.Embedding)}
    return sum(weight.numel() for weight in ranker.parameters() if id(weight) not in tables)


def _rows(
    config: Config, data: Path, home: Path, seeds: Sequence[int], told: Mapping[tuple[int, str], Told]
) -> Iterator[Row]:
    tables = open_tables(config, data, home / "tables")
    prepared = prepare(config, tables, home / "work")
    days, user = config.data.days("test"), np.asarray(prepared.events["user"])
    events = np.flatnonzero(prepared.of_days(days))
    tasks = tuple(config.tasks)
    labels = Impressions(prepared, config, events).labels.numpy()
    winners = Winners(tasks, labels, user[events], np.zeros(len(events), dtype=np.int64))
    names = [*students(config), *(name for name in ablations(config) if (seeds[0], name) in told)]
    found: list[Comparison] = []
    peers = lightgbm_probs(prepared, config, seeds) if is_there() else []
    for seed in seeds:
        asked = ask(_towers(config, tables, home, seed), prepared, config, days)
        where = np.zeros(len(asked.events), dtype=np.int64)
        candidates = Candidates(tasks, asked.valid, user[asked.events], where)
        models = {name: told[seed, name].predictions for name in names if (seed, name) in told}
        if peers:
            models[PEER] = Predictions(tasks, peers[len(found)])
        teacher = told[seed, TEACHER].predictions
        found.append(compare(models, winners, candidates, teacher, against=BASE, how=Resampling(draws=300, seed=seed)))
        say(f"seed {seed}: compared")
    yield from _model_rows(found, PEER, tasks, True) if peers else [Row.skipped(PEER, "it is not installed")]
    for name in [TEACHER, *names]:
        runs = [told[seed, name] for seed in seeds if (seed, name) in told]
        yield Row.of(f"{name}: weights outside the tables", runs[0].weights, "weights")
        yield from _model_rows(found, name, tasks, name in ablations(config))
    for name in students(config):
        yield from _divergence_rows(found, name, tasks)
        yield from _difference_rows(found[0], name, tasks)


def _model_rows(found: Sequence[Comparison], name: str, tasks: Sequence[str], is_ablation: bool) -> Iterator[Row]:
    """Every number of one model: the mean over seeds, and how far they are apart."""
    wanted = [("winners", metric) for metric in ("auc", "log_loss", "calibration_error", "calibration_ratio")]
    if name != TEACHER and not is_ablation:
        wanted += [("winners", "kl"), ("candidates", "kl")]
        wanted += [("candidates", metric) for metric in ("overlap@10", "overlap@100", "ndcg@100", "top10_in_100")]
    for where, metric in wanted:
        for task in tasks:
            told = [_value(one, name, where, task, metric) for one in found]
            values = [value for value in told if value is not None]
            if not values:
                continue
            row = Row.of(f"{name}, {where}, {task} {metric}", float(np.mean(values)), metric, len(values))
            yield _barred(row, name, where, task, metric)
            if len(values) > 1:
                yield Row.of(f"{row.name}: deviation over seeds", float(np.std(values, ddof=1)), metric, len(values))


def _barred(row: Row, name: str, where: str, task: str, metric: str) -> Row:
    """With the bar the issue sets for it, if it sets one."""
    bar, more_is_better = None, metric != "log_loss"
    if name == TEACHER:
        bar = BARS.get((metric, task))
    elif name == FULL and metric == "overlap@100" and task != "like":
        bar = OVERLAP_BAR
    if bar is None or row.value is None:
        return row
    return replace(row, bar=bar, holds=bool(row.value >= bar if more_is_better else row.value <= bar))


def _value(told: Comparison, name: str, where: str, task: str, metric: str) -> float | None:
    model = "teacher" if name == TEACHER else name
    estimate = told.metrics(model, where, task).get(metric)  # type: ignore[arg-type]
    return None if estimate is None else estimate.value


def _divergence_rows(found: Sequence[Comparison], name: str, tasks: Sequence[str]) -> Iterator[Row]:
    """KL to the heavy ranker, mean over tasks and seeds, over that of the two towers of mmoe_dcn."""
    for where in ("winners", "candidates"):
        both = np.array(
            [[[_value(one, model, where, task, "kl") for task in tasks] for model in (name, BASE)] for one in found],
            dtype=float,
        )
        both = both[~np.isnan(both).any((1, 2))]  # of the seeds that have it: a student of ONCE has one
        mine, base = both.mean((0, 2))
        against = "" if name == BASE else BASE
        row = Row.of(
            f"{name}, {where}, KL over tasks", mine, "nats", len(both), against, mine / base if against else None
        )
        if name in LESS_KL:
            bar = 1 - LESS_KL[name]
            row = replace(row, bar=bar, holds=bool(mine / base <= bar))
        yield row


def _difference_rows(told: Comparison, name: str, tasks: Sequence[str]) -> Iterator[Row]:
    """What the first seed's student is more than its mmoe_dcn, with the interval over users, 95 %."""
    for one in told.differences:
        if one.model != name or one.segment != "all" or one.task not in tasks:
            continue
        for metric in ("auc", "log_loss", "kl", "overlap@100"):
            estimate = one.metrics.get(metric)
            if estimate is None or estimate.value is None:
                continue
            said = f"{name}, {one.where}, {one.task} {metric}: over {BASE}, first seed"
            yield Row.of(said, estimate.value, metric, estimate.users)
            yield Row.of(f"{said}: low", float(estimate.low or 0.0), metric)
            yield Row.of(f"{said}: high", float(estimate.high or 0.0), metric)


if __name__ == "__main__":
    run("ranking_quality", __doc__, measure)
