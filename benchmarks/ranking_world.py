"""What the questions about rankers share: KuaiRand-Pure by the example's funnel, seeds, and trainings side by side.

What is trained is judged on the test day; options were chosen on the validate day.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import nn

from benchmarks.machine import REPOSITORY, say
from benchmarks.result import Row
from benchmarks.run import Options
from prerank.config import Config, HeavyRankerConfig, load_config
from prerank.data.logs import open_tables
from prerank.evaluate.compare import Comparison, Predictions
from prerank.evaluate.winners import Winners
from prerank.models.ranker import Ranker
from prerank.train.prepare import Prepared, prepare
from prerank.train.ranking import Impressions
from prerank.types import Array

FUNNEL = REPOSITORY / "examples" / "kuairand" / "funnel.toml"
SEEDS, QUICK_SEEDS = (7, 8, 9), (7,)
TEACHER = "heavy ranker"
_THEIRS = "teacher"  # what a comparison calls it


@dataclass(frozen=True, slots=True)
class Told:
    """What one training gave on the test day: its predictions, its seconds and its weights outside the tables."""

    predictions: Predictions
    seconds: float
    weights: int


def seeds_of(options: Options) -> tuple[int, ...]:
    """Three, one in a quick run, or those that are asked for."""
    return options.seeds or (QUICK_SEEDS if options.quick else SEEDS)


def funnel_of(options: Options) -> Config:
    """The example's funnel; in a quick run with small models and one pass."""
    config = load_config(FUNNEL)
    if not options.quick:
        return config
    heavy = HeavyRankerConfig(width=16, hidden=(16,), experts=1, epochs=1, folds=0, batch=4096)
    small = replace(config.ranker, width=16, hidden=(16,), experts=1, epochs=1, batch=4096)
    retrieval = replace(config.retrieval, epochs=1)
    taught = replace(config.distillation, candidates=1, among=100)
    return replace(config, heavy_ranker=heavy, ranker=small, retrieval=retrieval, distillation=taught)


@contextmanager
def home_of_trainings(options: Options) -> Iterator[Path]:
    """The folder that keeps them, or one for now."""
    with TemporaryDirectory() if options.work is None else nullcontext(options.work) as home:
        yield Path(home)


def prepared_of(config: Config, data: Path, home: Path) -> Prepared:
    """The log as models read it. To be made before processes ask for it, for two would be in each other's way."""
    return prepare(config, open_tables(config, data, home / "tables"), home / "work")


def trained(train: Callable[[int, str], Told], *jobs: Sequence[tuple[int, str]]) -> dict[tuple[int, str], Told]:
    """Each (seed, name), in two processes of one thread each; one list of jobs after the other."""
    told: dict[tuple[int, str], Told] = {}
    with ProcessPoolExecutor(2, get_context("spawn"), _one_thread) as pool:
        for some in jobs:
            asked = [pool.submit(train, *job) for job in some]
            for job, one in zip(some, asked, strict=True):
                told[job] = one.result()
                say(f"seed {job[0]}, {job[1]}: {told[job].seconds:.0f} s")
    return told


def _one_thread() -> None:
    torch.set_num_threads(1)


def on_test_day(config: Config, prepared: Prepared) -> tuple[Impressions, Winners, Array]:
    """The test day's P impressions, as winners with their labels, and whose they are, int [P]."""
    events = np.flatnonzero(prepared.of_days(config.data.days("test")))
    impressions = Impressions(prepared, config, events)
    user = np.asarray(prepared.events["user"])[events]
    winners = Winners(tuple(config.tasks), impressions.labels.numpy(), user, np.zeros(len(events), dtype=np.int64))
    return impressions, winners, user


def num_weights(ranker: Ranker) -> int:
    """Of everything but the tables."""
    assert isinstance(ranker, nn.Module)
    tables = {id(module.weight) for module in ranker.modules() if isinstance(module, nn.Embedding)}
    return sum(weight.numel() for weight in ranker.parameters() if id(weight) not in tables)


def metric_rows(
    found: Sequence[Comparison],
    name: str,
    tasks: Sequence[str],
    wanted: Sequence[tuple[str, str]],
    bars: Mapping[tuple[str, str], float] | None = None,
) -> Iterator[Row]:
    """Of each (where, metric) of one model and each task the mean over seeds, and how far they are apart.

    `bars` are by (metric, task).
    """
    for where, metric in wanted:
        for task in tasks:
            told = [value_of(one, name, where, task, metric) for one in found]
            values = [value for value in told if value is not None]
            if not values:
                continue
            row = Row.of(f"{name}, {where}, {task} {metric}", float(np.mean(values)), metric, len(values))
            yield _barred(row, (bars or {}).get((metric, task)), metric)
            if len(values) > 1:
                apart = float(np.std(values, ddof=1))
                yield Row.of(f"{row.name}: deviation over seeds", apart, metric, len(values))


def difference_rows(
    told: Comparison, name: str, tasks: Sequence[str], metrics: Sequence[str], over: str
) -> Iterator[Row]:
    """What a model is more than the one that all are compared with, which is called `over`: with 95 % over users."""
    for one in told.differences:
        if one.model != name or one.segment != "all" or one.task not in tasks:
            continue
        for metric in metrics:
            estimate = one.metrics.get(metric)
            if estimate is None or estimate.value is None:
                continue
            said = f"{name}, {one.where}, {one.task} {metric}: over {over}"
            yield Row.of(said, estimate.value, metric, estimate.users)
            yield Row.of(f"{said}: low", float(estimate.low or 0.0), metric)
            yield Row.of(f"{said}: high", float(estimate.high or 0.0), metric)


def value_of(told: Comparison, name: str, where: str, task: str, metric: str) -> float | None:
    """One number of one model, if it was measured."""
    model = _THEIRS if name == TEACHER and name not in told.models else name
    estimate = told.metrics(model, where, task).get(metric)  # type: ignore[arg-type]
    return None if estimate is None else estimate.value


def _barred(row: Row, bar: float | None, metric: str) -> Row:
    """With a bar, if there is one; less is better of a loss alone."""
    if bar is None or row.value is None:
        return row
    return replace(row, bar=bar, holds=bool(row.value <= bar if metric == "log_loss" else row.value >= bar))
