"""A training that begins with another version's weights: each row of a table goes to the row of the same value.

Vocabularies are fitted anew on every training window, so a category's row number means another value than before. A
value that is new begins as it would in a training from nothing, and so does everything of a model that does not fit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from prerank.bundle.load import Bundle
from prerank.config import Config
from prerank.features.transforms import Transforms
from prerank.schema import Bag, Category, Owner

Part: TypeAlias = Literal["towers", "ranker"]
_TABLE = re.compile(r"(?:^|\.)tables\.([^.]+)\.weight$")


@dataclass(frozen=True, slots=True)
class WarmStart:
    """The weights of `version` by model, and the transforms and the funnel file they were made with."""

    version: str
    config: Config
    transforms: Transforms
    weights: Mapping[Part, Mapping[str, Tensor]]

    @classmethod
    def of(cls, bundle: Bundle) -> WarmStart:
        """From a loaded version."""
        ranker = bundle.scorer.ranker
        assert isinstance(ranker, nn.Module)
        weights: dict[Part, Mapping[str, Tensor]] = {
            "towers": bundle.towers.state_dict(),
            "ranker": ranker.state_dict(),
        }
        return cls(bundle.version, bundle.config, bundle.transforms, weights)

    def give(self, part: Part, model: nn.Module, config: Config, transforms: Transforms) -> str:
        """Put the weights into `model`, or leave it as it is and say why they do not fit.

        `config` and `transforms` are those the model was built with. All of its weights are given, or none.
        """
        different = self._difference(part, config)
        if different:
            return different
        old, given = self.weights[part], model.state_dict()
        if set(old) != set(given):
            return f"its {part} have other weights: {sorted(set(old) ^ set(given))[0]!r} is of one of them only"
        for name, fresh in given.items():
            moved = self._moved(name, old[name], fresh, transforms)
            if moved is None:
                return f"{name!r} is {list(old[name].shape)} there and {list(fresh.shape)} here"
            given[name] = moved
        model.load_state_dict(given)
        return ""

    def _difference(self, part: Part, config: Config) -> str:
        """Why the same numbers would mean something else, whatever their shapes."""
        different = config.features.first_difference(self.config.features)
        if different:
            return f"its features are others: {different}"
        if part == "towers" and config.retrieval.popularity != self.config.retrieval.popularity:
            return "its [retrieval] popularity is another"
        if part == "ranker":
            if tuple(config.tasks) != tuple(self.config.tasks):
                return f"its tasks are {list(self.config.tasks)}, and these are {list(config.tasks)}"
            if config.ranker.model != self.config.ranker.model:
                return f"its ranker is {self.config.ranker.model!r}, and this one {config.ranker.model!r}"
            if config.segments is not None or self.config.segments is not None:
                return "rankers of [segments] are trained from nothing"
        return ""

    def _moved(self, name: str, old: Tensor, fresh: Tensor, transforms: Transforms) -> Tensor | None:
        """The old numbers in the places of the new model, or None where there are no such places."""
        table = _TABLE.search(name)
        owner = None if table is None else _owner(transforms, table.group(1))
        if table is None or owner is None:
            return old if old.shape == fresh.shape else None
        before, now = (one.names(owner, table.group(1)) for one in (self.transforms, transforms))
        if before is None or now is None:  # hashed, so a row is of the same values as long as there are as many
            return old if old.shape == fresh.shape else None
        if (len(old), len(fresh)) != (len(before) + 1, len(now) + 1) or old.shape[1:] != fresh.shape[1:]:
            return None
        row_of = {value: row for row, value in enumerate(before, start=1)}
        pairs = [(row, row_of[value]) for row, value in enumerate(now, start=1) if value in row_of]
        moved = fresh.clone()
        moved[0] = old[0]
        if pairs:
            here, there = (torch.tensor(rows) for rows in zip(*pairs, strict=True))
            moved[here] = old[there]
        return moved


def _owner(transforms: Transforms, feature: str) -> Owner | None:
    """Whose category or bag this is; a name is of one owner only."""
    found = (o for o, name, kind in transforms.schema if name == feature and isinstance(kind, Category | Bag))
    return next(found, None)
