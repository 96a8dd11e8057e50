"""What changes of items, as a caller says it: what a change must be, and what is told of those taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import NoReturn

from prerank._toml import nearest
from prerank.errors import RequestError
from prerank.serve.answer import INT64
from prerank.types import ItemChange

MOST_CHANGES = 10_000
"""The most items of one call."""


@dataclass(frozen=True, slots=True)
class Changed:
    """The changes of one call, all of them taken: `accepted`, and how many are of items that this version lacks."""

    accepted: int
    unknown_items: int


def check_changes(changes: Sequence[ItemChange], names: Sequence[str]) -> None:
    """Raises RequestError naming the first change's field that is wrong, what it must be, and what came.

    `names` are the item values that the utility reads.
    """
    if not 1 <= len(changes) <= MOST_CHANGES:
        raise RequestError(f"items: expected 1 to {MOST_CHANGES:,} of them, got {len(changes):,}; send more calls")
    for at, one in enumerate(changes):
        if one.item_id not in INT64:
            _wrong(at, "item_id", "an int64", one.item_id)
        if one.on is None and one.pacing is None and not one.values:
            raise RequestError(f"items[{at}]: expected at least one of on, pacing and values")
        if one.pacing is not None and not (isfinite(one.pacing) and one.pacing >= 0):
            _wrong(at, "pacing", "a finite number of 0 or more", one.pacing)
        for name, value in one.values.items():
            if name not in names:
                known = f"one of {list(names)}" if names else "none, for this funnel's utility reads no item value"
                raise RequestError(f"items[{at}].values: expected {known}, got {name!r}{nearest(name, names)}")
            if not isfinite(value):
                _wrong(at, f"values.{name}", "a finite number", value)


def _wrong(at: int, field: str, expected: str, came: object) -> NoReturn:
    raise RequestError(f"items[{at}].{field}: expected {expected}, got {came}")
