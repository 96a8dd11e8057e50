"""Names to embedding rows: a vocabulary learnt from counts, or hash buckets that need none; row 0 is the unknown.

The hash is part of the saved format and the same everywhere. Integers (booleans as 0 and 1): one step of SplitMix64
(Steele, Lea & Flood 2014, figure 17) from the state x. Text: the first 8 bytes, little-endian, of BLAKE2b (RFC 7693)
with an 8-byte digest over UTF-8. The row is 1 + hash mod buckets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Protocol

import numpy as np

from prerank.features.reading import Family
from prerank.types import Array


class Codes(Protocol):
    """A mapping of names to rows 0..size-1 of an embedding table."""

    family: Family

    @property
    def size(self) -> int:
        """Rows of the table, the unknown row 0 included."""

    def of_integers(self, values: Array) -> Array:
        """int64 [R] -> int32 [R]."""

    def of_texts(self, values: Sequence[str | None]) -> Array:
        """R texts -> int32 [R]; None is 0."""

    def to_plain(self) -> dict[str, object]:
        """What is learnt, as JSON types."""


class Vocabulary:
    """The names seen in training in ascending order: the n-th, from 1, has row n; any other name has row 0."""

    def __init__(self, family: Family, values: Sequence[int | str]) -> None:
        self.family: Family = family
        self.values = tuple(values)
        is_text = family == "text"
        self._sorted = np.array([] if is_text else self.values, dtype=np.int64)
        # a dict and not a sorted array: numpy's text drops trailing NULs, so "a\0" would be found as "a"
        self._places: dict[int | str, int] = {text: n for n, text in enumerate(self.values if is_text else (), start=1)}

    @classmethod
    def learn(cls, family: Family, counts: Mapping[int | str, int], min_count: int) -> Vocabulary:
        """The names counted at least `min_count` times."""
        kept = [name for name, count in counts.items() if count >= min_count]
        return cls(family, sorted(kept))

    @property
    def size(self) -> int:
        """Rows of the table, the unknown row 0 included."""
        return len(self.values) + 1

    def of_integers(self, values: Array) -> Array:
        """int64 [R] -> int32 [R]."""
        if not len(self._sorted):
            return np.zeros(len(values), dtype=np.int32)
        places = self._sorted.searchsorted(values)
        known = self._sorted.take(places, mode="clip") == values
        places += 1
        places *= known
        return places.astype(np.int32)

    def of_texts(self, values: Sequence[str | None]) -> Array:
        """R texts -> int32 [R]; None is 0."""
        return np.array([0 if text is None else self._places.get(text, 0) for text in values], dtype=np.int32)

    def to_plain(self) -> dict[str, object]:
        """What is learnt, as JSON types."""
        return {"family": self.family, "values": list(self.values)}


class Buckets:
    """A fixed number of hash buckets, rows 1..num; only a missing name has row 0."""

    def __init__(self, family: Family, num: int) -> None:
        self.family: Family = family
        self.num = num

    @property
    def size(self) -> int:
        """Rows of the table, the unknown row 0 included."""
        return self.num + 1

    def of_integers(self, values: Array) -> Array:
        """int64 [R] -> int32 [R]."""
        return (splitmix64(values) % np.uint64(self.num)).astype(np.int32) + np.int32(1)

    def of_texts(self, values: Sequence[str | None]) -> Array:
        """R texts -> int32 [R]; None is 0."""
        return np.array([0 if t is None else hash_text(t) % self.num + 1 for t in values], dtype=np.int32)

    def to_plain(self) -> dict[str, object]:
        """What is learnt, as JSON types."""
        return {"family": self.family}


def splitmix64(values: Array) -> Array:
    """int64 [R] -> uint64 [R], one to one. See the module for the source."""
    mixed: Array = values.view(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def hash_text(text: str) -> int:
    """64 bits of one text. A lone surrogate, which JSON can spell and UTF-8 cannot, is hashed as its three bytes."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
