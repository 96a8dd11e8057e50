"""Who may see an item, as packed bitmaps: fitted from the items table, asked with a profile, a context and a time.

A rule has a bitmap a value: of the items that a user with this value may see, or may not where it excludes. A rule
that does not exclude has one more before them, of the items that list nothing, which are for everybody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Self, TypeAlias
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from prerank.business.lists import HOURS as HOURS
from prerank.business.lists import pack_lists, read_lists
from prerank.config import MOST_TARGETED, TargetingRule
from prerank.errors import BundleError, DataError, RequestError
from prerank.kernels.eligible import WORD, eligible_rows, num_words
from prerank.schema import Owner
from prerank.types import Array, Given

_EXPECTS = "text, a whole number, true or false, or a list of these, or null where it is not known"


Listed: TypeAlias = Sequence[Sequence[Sequence[str]]]
"""By rule and item, the values that the item lists."""


@dataclass(frozen=True, slots=True)
class _Fitted:
    """One rule, the first of its bitmaps, and the bitmap of each value."""

    rule: TargetingRule
    first: int
    rows: Mapping[str, int]


class Targeting(nn.Module):
    """`rules` with the `values` each has bitmaps of, ascending; bitmaps int64 [R, W], W = ceil(num_items / 64).

    Values are text: 7 and "7" are the same, true is "true".
    """

    bitmaps: Tensor

    def __init__(
        self, rules: Mapping[str, TargetingRule], values: Mapping[str, Sequence[str]], bitmaps: Tensor, num_items: int
    ) -> None:
        super().__init__()
        assert bitmaps.dtype == torch.int64
        assert bitmaps.shape == (_num_bitmaps(rules, values), num_words(num_items))
        self.num_items = num_items
        self._rules: dict[str, _Fitted] = {}
        first = 0
        for name, rule in rules.items():
            at = first + (not rule.excludes)
            self._rules[name] = _Fitted(rule, first, {value: at + n for n, value in enumerate(values[name])})
            first = at + len(values[name])
        self._inverted = torch.tensor([rule.excludes for rule in rules.values()], dtype=torch.bool)
        self.register_buffer("bitmaps", bitmaps)

    @classmethod
    def fit(
        cls, rules: Mapping[str, TargetingRule], columns: Mapping[str, pa.ChunkedArray], num_items: int, slack: int = 0
    ) -> Self:
        """From the items' columns [I], in row order: lists or single values, of text, whole numbers or booleans.

        The `slack` rows after them have no bit. Raises DataError naming the rule's key and the column that is missing,
        or not as it must be.
        """
        values: dict[str, list[str]] = {}
        bitmaps = [torch.zeros((0, num_words(num_items)), dtype=torch.int64)]
        for name, rule in rules.items():
            where = f"targeting.{name}.item = {rule.item!r}"
            if rule.item in columns and len(columns[rule.item]) != num_items:
                raise DataError(f"{where}: {len(columns[rule.item])} rows for {num_items} items")
            lengths, distinct, codes = read_lists(rule, columns, where)
            values[name] = sorted(distinct)
            bitmaps.append(pack_lists(rule, lengths, distinct, codes))
        room = num_words(num_items + slack) - num_words(num_items)
        return cls(rules, values, pad(torch.cat(bitmaps), (0, room)), num_items + slack)

    def part(self, rows: Array) -> Targeting:
        """The same rules of rows int64 [n], ascending, alone: row n of it is rows[n] of this one."""
        words = num_words(len(rows))
        bitmaps = np.zeros((len(self.bitmaps), words * WORD // 8), np.uint8)
        for n, whole in enumerate(self.bitmaps.numpy().view(np.uint8)):  # one at a time: a bit is a byte meanwhile
            own = np.packbits(np.unpackbits(whole, bitorder="little")[rows], bitorder="little")
            bitmaps[n, : len(own)] = own
        rules = {name: fitted.rule for name, fitted in self._rules.items()}
        return Targeting(rules, self.to_plain(), torch.from_numpy(bitmaps.view(np.int64)), len(rows))

    def read(self, columns: Mapping[str, pa.ChunkedArray]) -> Listed:
        """What n items list under each rule, to be `put`. Raises DataError as `fit`."""
        found = []
        for name, fitted in self._rules.items():
            where = f"targeting.{name}.item = {fitted.rule.item!r}"
            lengths, distinct, codes = read_lists(fitted.rule, columns, where)
            together = len({*distinct, *fitted.rows})
            if together > MOST_TARGETED:
                raise DataError(
                    f"{where}: {together:,} distinct values with those of the items there are; publish again"
                )
            texts = [distinct[code] for code in codes.tolist()]
            ends = np.cumsum(lengths).tolist()
            found.append([texts[end - length : end] for end, length in zip(ends, lengths.tolist(), strict=True)])
        return found

    def put(self, rows: Tensor, listed: Listed) -> None:
        """Let rows int64 [n], which nobody has taken, list what `read` gave; other rows are found as ever meanwhile."""
        words, bits = (rows // WORD).numpy(), np.int64(1) << (rows % WORD).numpy()
        for (name, fitted), items in zip(list(self._rules.items()), listed, strict=True):
            new = sorted({text for texts in items for text in texts} - set(fitted.rows))
            if new:
                # the bitmaps first: who chooses by the new values finds them there
                like = torch.zeros_like(self.bitmaps[:1]) if fitted.rule.excludes else self.bitmaps[[fitted.first]]
                first = len(self.bitmaps)
                self.bitmaps = torch.cat([self.bitmaps, like.expand(len(new), -1)])
                more = {value: first + n for n, value in enumerate(new)}
                fitted = self._rules[name] = replace(fitted, rows={**fitted.rows, **more})
            bitmaps = self.bitmaps.numpy()
            own = np.array([*fitted.rows.values(), *([] if fitted.rule.excludes else [fitted.first])])
            np.bitwise_and.at(bitmaps, (own[:, None], words), ~bits)
            for texts, word, bit in zip(items, words, bits, strict=True):
                is_for_all = not texts and not fitted.rule.excludes
                bitmaps[own if is_for_all else [fitted.rows[text] for text in texts], word] |= bit

    def to_plain(self) -> dict[str, list[str]]:
        """The values of each rule, as JSON types."""
        return {name: list(fitted.rows) for name, fitted in self._rules.items()}

    @classmethod
    def from_plain(cls, rules: Mapping[str, TargetingRule], plain: object, bitmaps: Tensor, num_items: int) -> Self:
        """From what `to_plain` gave and the bitmaps. Raises BundleError where rules, values and bitmaps do not fit."""
        if not isinstance(plain, dict) or list(plain) != list(rules):
            found = list(plain) if isinstance(plain, dict) else type(plain).__name__
            raise BundleError(f"targeting: expected the values of the rules {list(rules)}, found {found}")
        for name, values in plain.items():
            is_text = isinstance(values, list) and all(isinstance(value, str) for value in values)
            if not is_text or values != sorted(set(values)):
                raise BundleError(f"targeting.{name}: expected a list of texts, ascending, each once")
        expected = [_num_bitmaps(rules, plain), num_words(num_items)]
        if bitmaps.dtype != torch.int64 or list(bitmaps.shape) != expected:
            found = f"{bitmaps.dtype} {list(bitmaps.shape)}".removeprefix("torch.")
            raise BundleError(f"targeting: expected bitmaps int64 {expected} of {num_items} items, found {found}")
        return cls(rules, plain, bitmaps, num_items)

    def columns(self, owner: Owner) -> dict[str, str]:
        """The columns of users, items or requests that the rules read, and the key of the first rule that does."""
        read: dict[str, str] = {}
        for name, fitted in self._rules.items():
            read.setdefault(getattr(fitted.rule, owner), f"targeting.{name}.{owner}")
        return {column: key for column, key in read.items() if column}

    def example(self, owner: Owner = "context") -> dict[str, Given]:
        """A value for each field of the request, or column of the user, that the rules read."""
        found: dict[str, Given] = {}
        for fitted in self._rules.values():
            column = getattr(fitted.rule, owner)
            if column and found.get(column) is None:
                found[column] = next(iter(fitted.rows), None)
        return found

    def choose(
        self, profile: Mapping[str, Given], context: Mapping[str, Given], time_ms: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One request as groups of bitmaps, a rule a group: chosen int32 [C], starts int64 [G + 1], inverted bool [G].

        A value that is null, or that no item lists, matches only the items that list nothing, and none that is
        excluded; a column the profile lacks is null. Raises RequestError for a context field that is missing or of
        another type or a time past a zone's calendar, DataError for a profile of another type.
        """
        chosen: list[int] = []
        starts = [0]
        for fitted in self._rules.values():
            asked = _asked(fitted.rule, profile, context, time_ms)
            rows = [fitted.rows[value] for value in asked if value in fitted.rows]
            chosen += rows or ([] if fitted.rule.excludes else [fitted.first])
            starts.append(len(chosen))
        return torch.tensor(chosen, dtype=torch.int32), torch.tensor(starts), self._inverted

    def forward(self, chosen: Tensor, starts: Tensor, inverted: Tensor) -> Tensor:
        """What `choose` gave -> the rows that are eligible, int64 [n], ascending."""
        return eligible_rows(self.bitmaps, chosen, starts, inverted, self.num_items)

    def rows(self, profile: Mapping[str, Given], context: Mapping[str, Given], time_ms: int) -> Tensor:
        """The rows that are eligible for one request, int64 [n], ascending; raises as `choose`."""
        rows: Tensor = self(*self.choose(profile, context, time_ms))
        return rows


def _num_bitmaps(rules: Mapping[str, TargetingRule], values: Mapping[str, Sequence[str]]) -> int:
    return sum(len(values[name]) + (not rule.excludes) for name, rule in rules.items())


def _asked(
    rule: TargetingRule, profile: Mapping[str, Given], context: Mapping[str, Given], time_ms: int
) -> Sequence[str]:
    if rule.schedule:
        return [str(hour_of_week(time_ms, rule.schedule))]
    if rule.user:
        try:
            return _texts(profile.get(rule.user))
        except TypeError as error:
            raise DataError(f"user store: {rule.user}: expected {_EXPECTS}, got {error}") from None
    if rule.context not in context:
        raise RequestError(f"context.{rule.context}: missing; expected {_EXPECTS}")
    try:
        return _texts(context[rule.context])
    except TypeError as error:
        raise RequestError(f"context.{rule.context}: expected {_EXPECTS}, got {error}") from None


def _texts(given: Given) -> list[str]:
    """The values given, nulls left out. Raises TypeError with the first that is none of ours."""
    found = []
    for value in given if isinstance(given, list) else [given]:
        if isinstance(value, bool):
            found.append("true" if value else "false")
        elif isinstance(value, str | int):
            found.append(str(value))
        elif value is not None:
            raise TypeError(repr(value))
    return found


def hour_of_week(time_ms: int, zone: str) -> int:
    """The hour of the week, 0 to 167, at UTC `time_ms` on the clocks of a time zone; 0 is Monday from 00:00.

    Raises RequestError for a time after the year 9999 or before the year 1 there.
    """
    try:
        there = datetime.fromtimestamp(time_ms // 1000, ZoneInfo(zone))
    except (OverflowError, ValueError, OSError):
        raise RequestError(f"time_ms: expected a time that {zone} has a calendar for, got {time_ms}") from None
    return there.weekday() * 24 + there.hour
