"""How good is the heavy ranker, and what is each of its ingredients worth?

KuaiRand-Pure, the development split of examples/kuairand/funnel.toml: three seeds, each with towers of its own, beside
LightGBM on the same features; the ablations are of the first. All judge the test day's impressions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter

from benchmarks.lightgbm_peer import is_there, lightgbm_probs
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
)
from benchmarks.result import Row
from benchmarks.run import Measured, Options, run
from prerank.config import Config
from prerank.data.logs import open_tables
from prerank.evaluate.compare import Comparison, Predictions, compare
from prerank.evaluate.estimates import Resampling
from prerank.evaluate.judge import predict
from prerank.lifecycle.training import train_teacher
from prerank.schema import Rate

PEER = "LightGBM"
NUM_ABLATED = 1  # seeds of the ablations
BARS = {
    ("auc", "click"): 0.751,
    ("log_loss", "click"): 0.584,
    ("auc", "long_view"): 0.758,
    ("log_loss", "long_view"): 0.531,
    ("auc", "like"): 0.872,
    ("log_loss", "like"): 0.0605,
}
_METRICS = ("auc", "log_loss", "calibration_error", "calibration_ratio")
_COMPARED = ("auc", "log_loss")


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


def measure(options: Options, ceilings: Mapping[str, float]) -> Measured:
    if options.data is None:
        return Measured([Row.skipped("ranking teacher", "no folder of KuaiRand-Pure; name one by --data")], {})
    seeds, config = seeds_of(options), funnel_of(options)
    without = ablations(config)
    with home_of_trainings(options) as home:
        for own in (config, *without.values()):
            prepared_of(own, options.data, home)
        jobs = [(seed, TEACHER) for seed in seeds] + [(seed, name) for name in without for seed in seeds[:NUM_ABLATED]]
        told = trained(partial(_train, config, options.data, home), jobs)
        rows = list(_rows(config, options.data, home, seeds, told))
    return Measured(rows, {"seeds": list(seeds), "heavy_ranker": config.to_dict()["heavy_ranker"]})


def _train(config: Config, data: Path, home: Path, seed: int, name: str) -> Told:
    """The heavy ranker, or the heavy ranker without an ingredient; what was trained is taken over."""
    own = replace({TEACHER: config, **ablations(config)}[name], seed=seed)
    started = perf_counter()
    ranker, _ = train_teacher(own, open_tables(own, data, home / "tables"), home)
    seconds = perf_counter() - started
    impressions, _, _ = on_test_day(own, prepared_of(own, data, home))
    return Told(predict(ranker, impressions, None), seconds, num_weights(ranker))


def _rows(
    config: Config, data: Path, home: Path, seeds: Sequence[int], told: Mapping[tuple[int, str], Told]
) -> Iterator[Row]:
    prepared, tasks = prepared_of(config, data, home), tuple(config.tasks)
    _, winners, _ = on_test_day(config, prepared)
    peers = lightgbm_probs(prepared, config, seeds) if is_there() else []
    found: list[Comparison] = []
    for number, seed in enumerate(seeds):
        models = {TEACHER: told[seed, TEACHER].predictions}
        models |= {name: told[seed, name].predictions for name in ablations(config) if (seed, name) in told}
        if peers:
            models[PEER] = Predictions(tasks, peers[number])
        how = Resampling(draws=300, seed=seed)
        found.append(compare(models, winners, against=PEER if peers else TEACHER, how=how))
        say(f"seed {seed}: compared")
    wanted = [("winners", metric) for metric in _METRICS]
    if not peers:
        yield Row.skipped(PEER, "it is not installed")
    for name in [TEACHER, *([PEER] if peers else []), *ablations(config)]:
        if (seeds[0], name) in told:
            yield Row.of(f"{name}: weights outside the tables", told[seeds[0], name].weights, "weights")
        yield from metric_rows(found, name, tasks, wanted, BARS if name == TEACHER else None)
    for number, one in enumerate(found if peers else []):
        yield from difference_rows(one, TEACHER, tasks, _COMPARED, f"{PEER}, seed {seeds[number]}")


if __name__ == "__main__":
    run("ranking_teacher", __doc__, measure, keeps=True)
