"""How close does each lightweight ranker come to the heavy one?

KuaiRand-Pure, the development split of examples/kuairand/funnel.toml, three seeds. A seed has towers, a heavy ranker,
its cross-fitted labels and every student of its own. Students are judged on the test day: on all impressions (winners),
and on 1,000 candidates that the towers retrieve at the first moment of each of 1,000 users, by KL to the heavy ranker
and by how much of its top 100 theirs holds. How good that is itself is `benchmarks.ranking_teacher`'s to say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np

from benchmarks.machine import say
from benchmarks.ranking_world import (
    TEACHER,
    Told,
    difference_rows,
    funnel_of,
    home_of_trainings,
    metric_rows,
    num_weights,
    on_test_day,
    prepared_of,
    seeds_of,
    trained,
    value_of,
)
from benchmarks.result import Row
from benchmarks.run import Measured, Options, run
from prerank.config import Config, Crossing, Segments
from prerank.data.logs import open_tables
from prerank.evaluate.compare import Comparison, compare
from prerank.evaluate.consistency import Candidates
from prerank.evaluate.estimates import Resampling
from prerank.evaluate.judge import ask, predict
from prerank.lifecycle.training import train, train_teacher
from prerank.models.ranker import Ranker
from prerank.models.towers import TwoTower

PASSES = 6  # of every student; the example's funnel has fewer, for its demo is to end in minutes
ALONE, SEGMENTED = "cross_feature, winners alone", "cross_feature a segment"
ONCE = (ALONE, SEGMENTED)  # students of the first seed alone
BASE, FULL, HARD = "mmoe_dcn", "cross_feature", "cross_feature on labels"
BARS = {("overlap@100", "click"): 0.87, ("overlap@100", "long_view"): 0.87}
LESS_KL = {"cross_feature, no crossings": 0.12, "cross_feature, attention": 0.20, FULL: 0.40}
_COMPARED = ("auc", "log_loss", "kl", "overlap@100")
_WANTED = (
    *(("winners", metric) for metric in ("auc", "log_loss", "calibration_error", "calibration_ratio", "kl")),
    *(("candidates", metric) for metric in ("kl", "overlap@10", "overlap@100", "ndcg@100", "top10_in_100")),
)


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


def measure(options: Options, ceilings: Mapping[str, float]) -> Measured:
    if options.data is None:
        return Measured([Row.skipped("ranking quality", "no folder of KuaiRand-Pure; name one by --data")], {})
    seeds, config = seeds_of(options), funnel_of(options)
    if not options.quick:
        config = replace(config, ranker=replace(config.ranker, epochs=PASSES))
    with home_of_trainings(options) as home:
        prepared_of(config, options.data, home)
        first = [(seed, BASE) for seed in seeds]  # with the towers, the heavy ranker and the labels of its seed
        later = [(seed, name) for name in (TEACHER, *students(config)) if name not in (BASE, *ONCE) for seed in seeds]
        later += [(seeds[0], name) for name in ONCE]
        told = trained(partial(_train, config, options.data, home), first, later)
        rows = list(_rows(config, options.data, home, seeds, told))
    said = {name: one.to_dict()["ranker"] for name, one in students(config).items()}
    return Measured(rows, {"seeds": list(seeds), "heavy_ranker": config.to_dict()["heavy_ranker"], "rankers": said})


def _train(config: Config, data: Path, home: Path, seed: int, name: str) -> Told:
    """One student, or the heavy ranker; what others trained is taken over."""
    own = replace({**students(config), TEACHER: config}[name], seed=seed)
    tables = open_tables(own, data, home / "tables")
    started = perf_counter()
    ranker: Ranker = train_teacher(own, tables, home)[0] if name == TEACHER else train(own, tables, home).ranker
    seconds = perf_counter() - started
    prepared = prepared_of(own, data, home)
    asked = ask(_towers(config, data, home, seed), prepared, own, own.data.days("test"))
    impressions, _, _ = on_test_day(own, prepared)
    return Told(predict(ranker, impressions, asked), seconds, num_weights(ranker))


def _towers(config: Config, data: Path, home: Path, seed: int) -> TwoTower:
    """The towers that the students of a seed share."""
    own = replace(students(config)[BASE], seed=seed)
    return train(own, open_tables(own, data, home / "tables"), home).towers


def _rows(
    config: Config, data: Path, home: Path, seeds: Sequence[int], told: Mapping[tuple[int, str], Told]
) -> Iterator[Row]:
    prepared, tasks = prepared_of(config, data, home), tuple(config.tasks)
    _, winners, _ = on_test_day(config, prepared)
    user = np.asarray(prepared.events["user"])
    found: list[Comparison] = []
    for seed in seeds:
        asked = ask(_towers(config, data, home, seed), prepared, config, config.data.days("test"))
        candidates = Candidates(tasks, asked.valid, user[asked.events], np.zeros(len(asked.events), dtype=np.int64))
        models = {name: told[seed, name].predictions for name in students(config) if (seed, name) in told}
        teacher, how = told[seed, TEACHER].predictions, Resampling(draws=300, seed=seed)
        found.append(compare(models, winners, candidates, teacher, against=BASE, how=how))
        say(f"seed {seed}: compared")
    for name in students(config):
        yield Row.of(f"{name}: weights outside the tables", told[seeds[0], name].weights, "weights")
        yield from metric_rows(found, name, tasks, _WANTED, BARS if name == FULL else None)
    for name in students(config):
        yield from _divergence_rows(found, name, tasks)
        yield from difference_rows(found[0], name, tasks, _COMPARED, f"{BASE}, first seed")


def _divergence_rows(found: Sequence[Comparison], name: str, tasks: Sequence[str]) -> Iterator[Row]:
    """KL to the heavy ranker, mean over tasks and seeds, over that of the two towers of mmoe_dcn."""
    for where in ("winners", "candidates"):
        both = np.array(
            [[[value_of(one, model, where, task, "kl") for task in tasks] for model in (name, BASE)] for one in found],
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


if __name__ == "__main__":
    run("ranking_quality", __doc__, measure, keeps=True)
