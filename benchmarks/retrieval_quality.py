"""How much of what users go on to watch do the two towers find, beside popularity and EASE?

KuaiRand-Pure, the development split of examples/kuairand/funnel.toml, three seeds, every question of the days. The
seeds say how far the training's draws move a number, the bootstrap how far the choice of users does; popularity and
EASE have no draws. `--ablate` adds one changed option at a time, one seed each: differences near the seeds' are noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Literal, TypeAlias

import numpy as np

from benchmarks.machine import REPOSITORY, say
from benchmarks.result import Row
from benchmarks.run import Measured, Options, run
from prerank.config import Config, Retrieval, load_config
from prerank.data.logs import Tables, open_tables
from prerank.evaluate.retrieval import KS, Questions, Score, ease_score, popularity_score, recalls, tower_score
from prerank.train.prepare import Prepared, prepare
from prerank.train.retrieval import train_retrieval
from prerank.types import Array

FUNNEL = REPOSITORY / "examples" / "kuairand" / "funnel.toml"
SEEDS, QUICK_SEEDS = (7, 8, 9), (7,)
QUICK_EPOCHS, QUICK_GROUP = 1, 64  # larger groups, and no impressions among the targets, are fewer examples
BAR = 0.411  # recall@100 on the test day
Part: TypeAlias = Literal["validate", "test"]
PARTS: tuple[Part, ...] = ("validate", "test")
TOWERS, FLOORS = "two towers", ("popularity", "EASE")
DRAWS = 1000


def measure(options: Options, ceilings: Mapping[str, float]) -> Measured:
    config = load_config(FUNNEL)
    if options.quick:
        config = smaller(config)
    seeds = QUICK_SEEDS if options.quick else SEEDS
    said: dict[str, object] = {"funnel": config.to_dict(), "seeds": list(seeds), "ablate": options.ablate}
    if options.data is None:
        why = "no folder of KuaiRand-Pure; name one by --data or PRERANK_DATA"
        return Measured([Row.skipped("two towers beside popularity and EASE", why)], said)
    with TemporaryDirectory() as name:
        work = Path(name)
        tables = open_tables(config, options.data, work)
        say("retrieval_quality: preparing")
        prepared = prepare(config, tables, work)
        trained = [_train(replace(config, seed=s), prepared, work, f"seed {s}", PARTS) for s in seeds]
        rows = _main_rows(config, prepared, trained)
        if options.ablate:
            rows += _ablation_rows(replace(config, seed=seeds[0]), tables, work, trained[0])
    # a smaller training is not what the bar is asked of
    return Measured([replace(row, bar=None, holds=None) if options.quick else row for row in rows], said)


def smaller(config: Config) -> Config:
    """The same with a training of seconds."""
    return replace(config, retrieval=replace(_relevant_only(config.retrieval), epochs=QUICK_EPOCHS, group=QUICK_GROUP))


def _main_rows(config: Config, prepared: Prepared, trained: Sequence[_Trained]) -> list[Row]:
    seconds = [one.seconds for one in trained]
    rows = [Row.of("training, mean over seeds", float(np.mean(seconds)), "s", len(seconds))]
    for part in PARTS:
        say(f"retrieval_quality: the floors on the {part} days")
        floors = _floors(config, prepared, part)
        rows += _part_rows(part, np.stack([one.recall[part] for one in trained]), floors)
    return rows


@dataclass(frozen=True, slots=True)
class _Trained:
    """One training: seconds on the clock, and recall by part, float64 [Q, len(KS)]."""

    seconds: float
    recall: dict[Part, Array]


def _train(config: Config, prepared: Prepared, work: Path, name: str, parts: Sequence[Part]) -> _Trained:
    say(f"retrieval_quality: training, {name}")
    started = perf_counter()
    towers, _ = train_retrieval(prepared, config, work / "runs" / name, name)
    seconds = perf_counter() - started
    found: dict[Part, Array] = {}
    for part in parts:
        questions = _questions(config, prepared, part)
        found[part] = _recalls(questions, tower_score(towers, prepared, config, questions), prepared)
    return _Trained(seconds, found)


def _floors(config: Config, prepared: Prepared, part: Part) -> dict[str, Array]:
    questions = _questions(config, prepared, part)
    scores = popularity_score(prepared, config, questions), ease_score(prepared, config, questions)
    assert scores[1] is not None, "KuaiRand-Pure has few enough items for EASE"
    return {name: _recalls(questions, one, prepared) for name, one in zip(FLOORS, scores, strict=True) if one}


def _questions(config: Config, prepared: Prepared, part: Part) -> Questions:
    return Questions.of(prepared, config, config.data.days(part))


def _recalls(questions: Questions, score: Score, prepared: Prepared) -> Array:
    return recalls(questions, score, len(prepared.item_ids))


def _part_rows(part: Part, towers: Array, floors: Mapping[str, Array]) -> Iterator[Row]:
    """towers float64 [seeds, Q, K] and each floor [Q, K] -> every method at every k, and how sure each is."""
    n = towers.shape[1]
    for at, k in enumerate(KS):
        ease = float(floors["EASE"][:, at].mean())
        ours = towers[:, :, at]
        by_seed = ours.mean(axis=1)
        mean = float(by_seed.mean())
        row = Row.of(_name(TOWERS, part, k), mean, "recall", n, "EASE", mean / ease)
        yield replace(row, bar=BAR, holds=mean >= BAR) if _is_barred(part, k) else row
        yield from _spread_rows(_name(TOWERS, part, k), by_seed)
        yield _error_row(_name(TOWERS, part, k), ours.mean(axis=0))
        for name, found in floors.items():
            mean, against = float(found[:, at].mean()), "EASE" if name != "EASE" else ""
            yield Row.of(_name(name, part, k), mean, "recall", n, against, mean / ease if against else None)
            yield _error_row(_name(name, part, k), found[:, at])


def _spread_rows(name: str, by_seed: Array) -> Iterator[Row]:
    n = len(by_seed)
    yield Row.of(f"{name}: least of the seeds", float(by_seed.min()), "recall", n)
    yield Row.of(f"{name}: most of the seeds", float(by_seed.max()), "recall", n)
    if n > 1:
        yield Row.of(f"{name}: deviation over seeds", float(by_seed.std(ddof=1)), "recall", n)


def _error_row(name: str, by_user: Array) -> Row:
    return Row.of(f"{name}: standard error over users", standard_error(by_user, seed=0), "recall", len(by_user))


def standard_error(by_user: Array, seed: int) -> float:
    """Of the mean of float64 [Q]: the deviation of the means of `DRAWS` resamples of the users (Efron 1979)."""
    draw = np.random.default_rng(seed)
    means = [by_user[draw.integers(len(by_user), size=len(by_user))].mean() for _ in range(DRAWS)]
    return float(np.std(means, ddof=1))


def _name(method: str, part: Part, k: int) -> str:
    return f"{method}, {part}, recall@{k}"


def _is_barred(part: Part, k: int) -> bool:
    return part == "test" and k == 100


# ablations: what each part of the recipe is worth


def ablations(config: Config) -> dict[str, Config]:
    """One changed option a configuration."""
    retrieval, features = config.retrieval, config.features
    popularity = replace(retrieval.popularity, half_life_days=())
    only_id = replace(features, item={"item_id": features.item["item_id"]}, interaction={})
    no_exposures = {name: kind for name, kind in features.user.items() if name != "exposures"}
    return {
        "item features left out": replace(config, features=only_id),
        "no popularity": replace(config, retrieval=replace(retrieval, popularity=popularity)),
        "targets without impressions": replace(config, retrieval=_relevant_only(retrieval)),
        "histories without exposures": replace(config, features=replace(features, user=no_exposures)),
        "sampled softmax with log-Q": replace(config, retrieval=replace(retrieval, loss="sampled_softmax")),
        "normalised, temperature 0.07": replace(config, retrieval=replace(retrieval, normalise=True, temperature=0.07)),
    }


def _relevant_only(retrieval: Retrieval) -> Retrieval:
    return replace(retrieval, targets={retrieval.relevant: retrieval.targets[retrieval.relevant]})


def _ablation_rows(config: Config, tables: Tables, work: Path, whole: _Trained) -> Iterator[Row]:
    """recall@100 on the test day against `whole`, the recipe as it is with the same seed."""
    at = KS.index(100)
    base = whole.recall["test"][:, at]
    mean = float(base.mean())
    yield Row.of(f"ablation, seed {config.seed}: the whole recipe", mean, "recall@100", len(base))
    for name, changed in ablations(config).items():
        trained = _train(changed, prepare(changed, tables, work), work, name, ("test",))
        less = float(trained.recall["test"][:, at].mean())
        label = f"ablation, seed {config.seed}: {name}"
        yield Row.of(label, less, "recall@100", len(base), "the whole recipe", less / mean)


if __name__ == "__main__":
    run("retrieval_quality", __doc__, measure, ablations=True)
