"""What are a sampled softmax's negatives worth, and the correction for how they are drawn, beside the whole catalogue?

KuaiRand-Pure, the development split of examples/kuairand/funnel.toml, one option changed at a time. What is compared is
the same seeds' and the same users', so the standard error is of the difference; differences near the deviation over
seeds, which `retrieval_quality` has, are noise all the same. A batch of another size is another number of steps too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.machine import say
from benchmarks.result import Row
from benchmarks.retrieval_quality import FUNNEL, PARTS, Part, smaller, standard_error
from benchmarks.run import Measured, Options, run
from prerank.config import Config, load_config
from prerank.data.logs import open_tables
from prerank.evaluate.retrieval import KS, Questions, recalls, tower_score
from prerank.train.prepare import Prepared, prepare
from prerank.train.retrieval import train_retrieval
from prerank.types import Array

FULL, CORRECTED = "full softmax", "log-Q"
CHANGES: dict[str, dict[str, object]] = {
    FULL: {"loss": "softmax"},
    CORRECTED: {},
    "no log-Q": {"loss": "in_batch_softmax"},
    "1,024 uniform": {"uniform_negatives": 1024},
    "4 batches cached": {"cached_batches": 4},
    "1,024 uniform and 4 batches cached": {"uniform_negatives": 1024, "cached_batches": 4},
    "4,096 uniform": {"uniform_negatives": 4096},
    "batches of 128": {"batch": 128},
    "batches of 2,048": {"batch": 2048},
}
"""By name: what is changed of the funnel's [retrieval] with loss = "sampled_softmax"."""
SEED, SEEDS = 7, (7, 8, 9)
QUICK = (CORRECTED, "1,024 uniform and 4 batches cached")
WITHIN = 0.02
"""How far below the full softmax the corrected one may be on the test day."""
AT = KS.index(100)


def measure(options: Options, ceilings: Mapping[str, float]) -> Measured:
    config = smaller(load_config(FUNNEL)) if options.quick else load_config(FUNNEL)
    said: dict[str, object] = {"funnel": config.to_dict(), "changes": CHANGES}
    if options.data is None:
        why = "no folder of KuaiRand-Pure; name one by --data or PRERANK_DATA"
        return Measured([Row.skipped("negatives of a sampled softmax", why)], said)
    names = options.only or (QUICK if options.quick else tuple(CHANGES))
    with TemporaryDirectory() if options.work is None else nullcontext(options.work) as folder:
        work = Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        prepared = prepare(config, open_tables(config, options.data, work), work)
        found = {}
        for name in names:
            for seed in seeds_of(name, options):
                changed = replace(changed_by(config, name), seed=seed)
                found[name, seed] = _recall(changed, prepared, work / f"{name}, {seed}")
    said["seeds"] = {name: [seed for one, seed in found if one == name] for name in names}
    return Measured(list(rows(found, is_whole=not options.quick)), said)


def changed_by(config: Config, name: str) -> Config:
    """The funnel with the change of this name."""
    sampled = replace(config.retrieval, loss="sampled_softmax")
    return replace(config, retrieval=replace(sampled, **CHANGES[name]))  # type: ignore[arg-type]


def seeds_of(name: str, options: Options) -> tuple[int, ...]:
    """The seeds a change is trained with: three where a bar is asked of it, unless others are named."""
    return options.seeds or (SEEDS if name in (FULL, CORRECTED) and not options.quick else (SEED,))


def _recall(config: Config, prepared: Prepared, folder: Path) -> dict[Part, Array]:
    """recall@100 of each user by part, float64 [Q]; read back where it was kept."""
    paths = {part: folder / f"{part}.npy" for part in PARTS}
    if not all(path.exists() for path in paths.values()):
        say(f"retrieval_negatives: training, {folder.name}")
        towers, _ = train_retrieval(prepared, config, folder, folder.name)
        for part, path in paths.items():
            questions = Questions.of(prepared, config, config.data.days(part))
            score = tower_score(towers, prepared, config, questions)
            np.save(path, recalls(questions, score, len(prepared.item_ids))[:, AT])
    return {part: np.load(path) for part, path in paths.items()}


def rows(found: Mapping[tuple[str, int], Mapping[Part, Array]], is_whole: bool) -> Iterator[Row]:
    """Each change on each part: its recall, and how far it is from the full softmax of the same seeds and users."""
    for part in PARTS:
        for name in dict.fromkeys(name for name, _ in found):
            seeds = [seed for one, seed in found if one == name]
            ours = np.stack([found[name, seed][part] for seed in seeds])
            label = f"{name}, {part}, {len(seeds)} seed{'s' * (len(seeds) > 1)}"
            users, mean = ours.shape[1], float(ours.mean())
            if name == FULL or any((FULL, seed) not in found for seed in seeds):
                yield Row.of(label, mean, "recall@100", users)
                continue
            base = np.stack([found[FULL, seed][part] for seed in seeds])
            yield Row.of(label, mean, "recall@100", users, FULL, mean / float(base.mean()))
            less = float((ours - base).mean())
            row = Row.of(f"{label}: less {FULL}", less, "recall@100", users)
            barred = is_whole and name == CORRECTED and part == "test"
            yield replace(row, bar=-WITHIN, holds=less >= -WITHIN) if barred else row
            error = standard_error((ours - base).mean(axis=0), seed=0)
            yield Row.of(f"{label}: less {FULL}, standard error over users", error, "recall@100", users)


if __name__ == "__main__":
    run("retrieval_negatives", __doc__, measure, trainings=tuple(CHANGES))
