"""The heavy ranker from real labels, and the teachers that each leave a share of the users out."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from prerank._tensor_files import read_tensors, write_tensors
from prerank._toml import Problems, structure
from prerank.config import Config, HeavyRankerConfig
from prerank.errors import BundleError, ConfigError, SchemaMismatch
from prerank.features.transforms import Transforms
from prerank.models.heavy import HeavyRanker
from prerank.models.towers import TwoTower, adopt_tables
from prerank.train.prepare import Prepared
from prerank.train.ranking import Impressions, Lesson, fit
from prerank.types import Array, Report, silent

FILE = "teacher.safetensors"


def train_heavy(
    prepared: Prepared,
    config: Config,
    towers: TwoTower,
    events: Array,
    folder: Path,
    identity: str,
    after_epoch: Callable[[HeavyRanker], Mapping[str, float]] = lambda _: {},
    report: Report = silent,
    what: str = "train the heavy ranker",
) -> tuple[HeavyRanker, list[dict[str, float]]]:
    """The heavy ranker of logged `events` int64 [P] and their labels, and one record an epoch; see `loop.run`.

    Its loss is the sum of the tasks' log losses. Raises ConfigError without [heavy_ranker].
    """
    options = config.heavy_ranker
    if options is None:
        raise ConfigError("heavy_ranker: missing; add the section [heavy_ranker] to train a teacher")
    torch.manual_seed(config.seed)
    ranker = build_heavy(config, prepared.transforms.sizes(), towers)
    impressions, measured = Impressions(prepared, config, events), partial(after_epoch, ranker)

    def loss_of(batch: Lesson) -> Tensor:
        return batch.loss(ranker) * len(ranker.tasks)

    records = fit(ranker, options, config, impressions, loss_of, folder, identity, measured, report, what)
    return ranker, records


def build_heavy(config: Config, sizes: Mapping[str, int], towers: TwoTower) -> HeavyRanker:
    """An untrained one, with the towers' tables where the funnel file says so."""
    ranker = HeavyRanker(config, sizes)
    if config.heavy_ranker is not None and config.heavy_ranker.tables == "retrieval":
        adopt_tables(ranker.item_input, towers.item_tower)
    return ranker


def save_teacher(path: Path, ranker: HeavyRanker, config: Config, transforms: Transforms) -> None:
    """The teacher as one file, with all that says what it reads."""
    building = path.with_name(f".{path.name}-{os.getpid()}")
    assert config.heavy_ranker is not None
    note = {
        "transforms": transforms.to_json(),
        "tasks": list(ranker.tasks),
        "heavy_ranker": config.to_dict()["heavy_ranker"],
    }
    write_tensors(building, ranker.state_dict(), note)
    os.replace(building, path)


def load_teacher(path: Path, config: Config, transforms: Transforms) -> HeavyRanker:
    """The teacher `save_teacher` wrote, for a funnel of the same features, tasks and vocabularies.

    Its own widths count, not those of [heavy_ranker]. Raises SchemaMismatch naming the first difference, BundleError
    for a file that is damaged or none.
    """
    tensors, note = read_tensors(path)
    try:
        theirs = Transforms.from_json(str(note["transforms"]))
        tasks, options = note["tasks"], note["heavy_ranker"]
        assert isinstance(options, dict)
        problems = Problems()
        widths = structure(options, HeavyRankerConfig, "heavy_ranker", problems)
    except KeyError as error:
        raise BundleError(f"{path}: expected a teacher, found no {error} in it; name a {FILE}") from None
    if widths is None:
        raise BundleError("\n".join(f"{path}: {problem}" for problem in problems))
    different = transforms.first_difference(theirs)
    if different:
        raise SchemaMismatch(f"{path}: the teacher was trained on other features: {different}")
    if tasks != list(config.tasks):
        raise SchemaMismatch(f"{path}: the teacher predicts {tasks}, and the tasks are {list(config.tasks)}")
    ranker = HeavyRanker(replace(config, heavy_ranker=widths), transforms.sizes())
    try:
        ranker.load_state_dict(tensors)
    except RuntimeError as error:
        raise BundleError(f"{path}: its weights do not fit its own options: {error}") from None
    return ranker.eval()
