"""Encoded features in words, for whoever looks at one."""

from __future__ import annotations

import numpy as np

from prerank.features.transforms import Transforms
from prerank.schema import Bag, Category, Owner
from prerank.types import Array

_FEW = 8


class Words:
    """What a version's user and context features say: categories by name, where they are not hashed."""

    def __init__(self, transforms: Transforms) -> None:
        schema = transforms.schema
        self._names: dict[str, tuple[int | str, ...] | None] = {}
        owners: tuple[Owner, ...] = ("user", "context")
        for owner in owners:
            for name, kind in schema.of(owner).items():
                if isinstance(kind, Category | Bag):
                    self._names[name] = transforms.names(owner, name)
        lately = {name: history.of for name, history in schema.histories().items()}
        lately |= {name: counter.by for name, counter in schema.interaction.items() if counter.by}
        self._names |= {name: transforms.names("item", of) for name, of in lately.items()}
        self._lately = frozenset(lately)

    def of(self, name: str, value: Array) -> str:
        """One request's value of the feature, [] or [...]; of a long list the first, of what happened the latest."""
        if name not in self._names:
            return _few([f"{one:.6g}" for one in np.atleast_1d(value).tolist()])
        if value.ndim == 0:
            return self._name(name, int(value))
        words = [self._name(name, int(code)) for code in value.tolist() if code >= 0]
        if name not in self._lately:
            return _few(words)
        left_out = "... " if len(words) > _FEW else ""
        return f"{len(words)}: {left_out}{' '.join(words[-_FEW:])}".rstrip()

    def _name(self, feature: str, code: int) -> str:
        names = self._names[feature]
        if code == 0:
            return "unknown"
        return f"code {code}" if names is None else str(names[code - 1])


def _few(words: list[str]) -> str:
    return " ".join(words[:_FEW]) + (" ..." if len(words) > _FEW else "")
