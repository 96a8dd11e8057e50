"""The heavy ranker's peer: LightGBM on the same features, where it is installed (the extra `bench`)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec

import numpy as np
import torch

from prerank.config import Config
from prerank.models.matching import Matching
from prerank.schema import Category
from prerank.train.prepare import Prepared
from prerank.train.ranking import Impressions
from prerank.types import Array

OPTIONS = {
    "objective": "binary",
    "learning_rate": 0.05,
    "num_leaves": 31,
    "min_data_in_leaf": 200,
    "feature_fraction": 0.6,
    "bagging_fraction": 0.8,
    "bagging_freq": 1,
    "num_threads": 2,
    "verbose": -1,
}
ROUNDS, PATIENCE = 600, 30
FEW = 64  # values of a category whose code a tree can split; the rates stand for those of larger ones
_AT_ONCE = 8192


def is_there() -> bool:
    """Whether LightGBM is installed."""
    return find_spec("lightgbm") is not None


def lightgbm_probs(prepared: Prepared, config: Config, seeds: Sequence[int]) -> list[Array]:
    """Probabilities float64 [P, T] of the test days' impressions, one array a seed; the validate days end it."""
    lightgbm = import_module("lightgbm")
    parts = {part: _table(prepared, config, part) for part in ("train", "validate", "test")}
    found = []
    for seed in seeds:
        by_task = []
        for task in range(len(config.tasks)):
            train, validate = (
                lightgbm.Dataset(parts[part][0], parts[part][1][:, task], free_raw_data=False)
                for part in ("train", "validate")
            )
            stop = lightgbm.early_stopping(PATIENCE, verbose=False)
            model = lightgbm.train({**OPTIONS, "seed": seed}, train, ROUNDS, [validate], callbacks=[stop])
            by_task.append(model.predict(parts["test"][0]))
        found.append(np.stack(by_task, axis=-1))
    return found


def _table(prepared: Prepared, config: Config, part: str) -> tuple[Array, Array]:
    """Features float32 [P, F] and labels float32 [P, T] of one part's impressions."""
    days = {"train": config.data.train, "validate": config.data.validate, "test": config.data.test}
    assert part in days
    events = np.flatnonzero(prepared.of_days(config.data.days(part)))  # type: ignore[arg-type]
    impressions, matching = Impressions(prepared, config, events), Matching(config.features)
    sizes = prepared.transforms.sizes()
    columns = []
    for start in range(0, len(events), _AT_ONCE):
        batch = impressions.batch(np.arange(start, min(start + _AT_ONCE, len(events))))
        items = {name: side.unsqueeze(1) for name, side in matching.item_side(batch.items).items()}
        found = [one.squeeze(1) for one in matching(matching.user_side(batch.user), items)]
        for owner, given in (("user", batch.user), ("context", batch.user), ("item", batch.items)):
            for name, kind in config.features.of(owner).items():  # type: ignore[arg-type]
                many = isinstance(kind, Category) and sizes[f"{owner}.{name}"] > FEW
                if given[name].dim() == 1 and not many:
                    found.append(given[name].float())
        found += [batch.user[name].float() for name, one in config.features.interaction.items() if not one.by]
        columns.append(torch.stack(found, dim=-1))
    return torch.cat(columns).numpy(), impressions.labels.numpy()
