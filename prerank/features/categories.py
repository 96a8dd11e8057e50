"""Categories and bags of categories: what they learn from counted rows, and values to rows of their tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, pairwise

import numpy as np
import pyarrow as pa

from prerank.features.reading import (
    EXPECTS,
    Family,
    Unreadable,
    absent,
    family_of,
    integers,
    is_list,
    is_text,
    lists,
    one_integer,
    shown,
    texts,
)
from prerank.features.vocabulary import Buckets, Codes, Vocabulary
from prerank.schema import Bag, Category
from prerank.types import Array, Given, Scalar


class Categories:
    """A fitted category."""

    def __init__(self, codes: Codes) -> None:
        self.codes = codes
        self.expects = EXPECTS[codes.family]

    def column(self, chunk: pa.Array) -> Array:
        """R rows -> int32 [R], 0 where missing or unknown."""
        return _codes_of_chunk(self.codes, chunk)

    def one(self, value: Given) -> Array:
        """One value -> int32 [1]."""
        if isinstance(value, list | tuple):
            raise Unreadable(self.expects, shown(value))
        return _codes_of_values(self.codes, [value])

    def to_plain(self) -> dict[str, object]:
        """What is learnt, as JSON types."""
        return self.codes.to_plain()


class Bags:
    """A fitted bag: of a list column where `separator` is empty, else of text split there."""

    def __init__(self, codes: Codes, length: int, separator: str) -> None:
        self.codes = codes
        self.length = length
        self.separator = separator
        self.expects = (
            f"text separated by {separator!r}" if separator else f"a list, each member {EXPECTS[codes.family]}"
        )

    def column(self, chunk: pa.Array) -> Array:
        """R rows -> int32 [R, M]: the first M members in their order, then -1; an unknown member is 0."""
        _check_bag(chunk.type, self.separator)
        if self.separator:
            distinct, places = texts(chunk)
            return self._rows([_split(text, self.separator) for text in distinct]).take(places, axis=0)
        members, lengths = lists(chunk)
        return _padded(_codes_of_chunk(self.codes, members), lengths, self.length)

    def one(self, value: Given) -> Array:
        """One value -> int32 [1, M]."""
        if value is None:
            return self._rows([[]])
        if self.separator:
            if not isinstance(value, str):
                raise Unreadable(self.expects, shown(value))
            return self._rows([_split(value, self.separator)])
        if not isinstance(value, list | tuple):
            raise Unreadable(self.expects, shown(value))
        return self._rows([value])

    def _rows(self, rows: Sequence[Sequence[Scalar]]) -> Array:
        lengths = np.array([len(members) for members in rows], dtype=np.int64)
        return _padded(_codes_of_values(self.codes, list(chain.from_iterable(rows))), lengths, self.length)

    def to_plain(self) -> dict[str, object]:
        """What is learnt, as JSON types."""
        return self.codes.to_plain()


def _split(text: str | None, separator: str) -> list[str]:
    """The parts of a text without the blanks around them; empty parts do not count."""
    return [] if text is None else [part for raw in text.split(separator) if (part := raw.strip())]


def _check_bag(kind: pa.DataType, separator: str) -> None:
    """Refuse a column that is not what the bag's `separator`, or its absence, says."""
    if pa.types.is_null(kind):
        return
    if separator and not is_text(kind):
        raise Unreadable(f"text to split at {separator!r} (a list column needs no separator)", f"a column of {kind}")
    if not separator and not is_list(kind):
        raise Unreadable("a list column (or text, and a separator in funnel.toml)", f"a column of {kind}")


def _codes_of_chunk(codes: Codes, chunk: pa.Array) -> Array:
    """int32 [R] of a chunk without dictionary."""
    family = family_of(chunk.type)
    if family is None:
        return np.zeros(len(chunk), dtype=np.int32)
    if family != codes.family:
        raise Unreadable(f"{codes.family} values, as in training", f"a column of {chunk.type}")
    if family == "text":
        distinct, places = texts(chunk)
        return codes.of_texts(distinct).take(places)
    found = codes.of_integers(integers(chunk))
    missing = absent(chunk)
    if missing is not None:
        found[missing] = 0
    return found


def _codes_of_values(codes: Codes, values: Sequence[Scalar]) -> Array:
    """int32 [R] of R Python values."""
    if codes.family == "text":
        for value in values:
            if not (value is None or isinstance(value, str)):
                raise Unreadable("text", shown(value))
        return codes.of_texts(values)  # type: ignore[arg-type]
    missing = [value is None for value in values]
    found = codes.of_integers(
        np.array([0 if value is None else one_integer(value, codes.family) for value in values], dtype=np.int64)
    )
    if any(missing):
        found[missing] = 0
    return found


def _padded(members: Array, lengths: Array, width: int) -> Array:
    """[V] end to end and lengths [R] -> [R, width], the first `width` of each row, then -1."""
    out = np.full((len(lengths), width), -1, dtype=np.int32)
    places = np.arange(width)
    taken = places < lengths[:, None]
    starts = np.cumsum(lengths) - lengths
    out[taken] = members[(starts[:, None] + places)[taken]]
    return out


class CategoryFit:
    """Counts names, chunk by chunk; `fitted` is what was learnt. A bag counts every member of every row."""

    def __init__(self, kind: Category | Bag) -> None:
        self.kind = kind
        self._counts: dict[int | str, int] = {}
        self._family: Family | None = None

    def add(self, chunk: pa.Array, weights: Array) -> None:
        """Count R rows, each `weights` int64 [R] times."""
        separator = ""
        if isinstance(self.kind, Bag):
            separator = self.kind.separator
            _check_bag(chunk.type, separator)
            if not separator:
                chunk, lengths = lists(chunk)
                weights = np.repeat(weights, lengths)
        family = family_of(chunk.type)
        if family is None:
            return
        if self._family not in (None, family):
            raise Unreadable(f"{self._family} values, as in the batches before", f"a column of {chunk.type}")
        self._family = family
        if self.kind.hash:
            return
        if family == "text":
            self._count_texts(chunk, weights, separator)
        else:
            self._count_integers(chunk, weights)

    def _count_texts(self, chunk: pa.Array, weights: Array, separator: str) -> None:
        distinct, places = texts(chunk)
        totals = np.bincount(places, weights, len(distinct)).tolist()
        for text, total in zip(distinct[:-1], totals, strict=False):  # the last is None
            for name in _split(text, separator) if separator else [str(text)]:
                self._counts[name] = self._counts.get(name, 0) + int(total)

    def _count_integers(self, chunk: pa.Array, weights: Array) -> None:
        present = chunk.is_valid().to_numpy(zero_copy_only=False)
        numbers, places = np.unique(integers(chunk)[present], return_inverse=True)
        totals = np.bincount(places, weights[present], len(numbers)).tolist()
        for number, total in zip(numbers.tolist(), totals, strict=True):
            self._counts[number] = self._counts.get(number, 0) + int(total)

    def fitted(self) -> Categories | Bags:
        """What the counted rows teach."""
        if self._family is None:
            raise Unreadable("integers, text or booleans", "a column without a type or any value")
        if self.kind.hash:
            return _of_kind(self.kind, Buckets(self._family, self.kind.hash))
        return _of_kind(self.kind, Vocabulary.learn(self._family, self._counts, self.kind.min_count))


def _of_kind(kind: Category | Bag, codes: Codes) -> Categories | Bags:
    return Bags(codes, kind.length, kind.separator) if isinstance(kind, Bag) else Categories(codes)


def read_category(kind: Category | Bag, saved: Mapping[str, object]) -> Categories | Bags:
    """What `to_plain` gave. Raises Unreadable on anything else."""
    wanted = {"family"} if kind.hash else {"family", "values"}
    if set(saved) != wanted:
        raise Unreadable(f"the keys {sorted(wanted)}", f"{sorted(saved)}")
    family = next((f for f in EXPECTS if f == saved["family"]), None)
    if family is None:
        raise Unreadable(f"a family of {list(EXPECTS)}", shown(saved["family"]))
    if kind.hash:
        return _of_kind(kind, Buckets(family, kind.hash))
    values = saved["values"]
    member: type = str if family == "text" else int
    if not isinstance(values, list) or any(type(v) is not member for v in values):
        raise Unreadable(f"values: a list of {member.__name__}", shown(values))
    if any(a >= b for a, b in pairwise(values)):
        raise Unreadable("values: each once, in ascending order", shown(values))
    if family != "text" and values and (values[0] < -(2**63) or values[-1] >= 2**63):
        raise Unreadable("values: integers of 64 bits", shown(values))
    return _of_kind(kind, Vocabulary(family, values))
