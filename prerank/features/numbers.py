"""Numbers, embeddings and values: what they learn from counted rows, and values to arrays.

A number is usable if it is finite and a float32 can hold it; any other (null, NaN, infinite, larger) is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite, sqrt

import numpy as np
import pyarrow as pa

from prerank.features.reading import (
    FLOAT32_MAX,
    Unreadable,
    absent,
    floats,
    integers,
    is_list,
    is_number,
    lists,
    one_float,
    shown,
)
from prerank.schema import Embedding, Number, Value
from prerank.types import Array, Given

_ROWS_AT_ONCE = 1 << 16


def _usable(numbers: Array) -> Array:
    usable: Array = np.abs(numbers) <= FLOAT32_MAX  # False for NaN
    return usable


def _compressed(numbers: Array) -> Array:
    """sign(x) log(1 + |x|)."""
    compressed: Array = np.copysign(np.log1p(np.abs(numbers)), numbers)
    return compressed


class Moments:
    """Mean and deviation of weighted numbers that come in pieces (Chan, Golub & LeVeque 1979, equation 2.1)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self._squares = 0.0
        self._least, self._most = np.inf, -np.inf

    def add(self, numbers: Array, weights: Array) -> None:
        """Take in float64 [R], each counted `weights` int64 [R] times."""
        count = int(weights.sum())
        if not count:
            return
        # around one of the numbers, so that a large offset costs no digits
        centred = numbers - numbers[0]
        shift = float(centred @ weights) / count
        squares = float((centred - shift) ** 2 @ weights)
        delta = float(numbers[0]) + shift - self.mean
        total = self.count + count
        self.mean += delta * (count / total)
        self._squares += squares + delta * delta * (self.count / total) * count
        self.count = total
        self._least, self._most = min(self._least, float(numbers.min())), max(self._most, float(numbers.max()))

    @property
    def std(self) -> float:
        """The population deviation; exactly 0 where every number is the same, and where there is none."""
        return sqrt(self._squares / self.count) if self._least < self._most else 0.0


class Numbers:
    """A fitted number."""

    expects = "a number"

    def __init__(self, log: bool, mean: float, std: float) -> None:
        self.log = log
        self.mean = mean
        self.std = std

    def column(self, chunk: pa.Array) -> Array:
        """R rows -> float32 [R], standardised; 0 (the mean) where missing or where training saw one value only."""
        return self._standardise(floats(chunk))

    def one(self, value: Given) -> Array:
        """One value -> float32 [1]."""
        return self._standardise(np.array([one_float(value)]))

    def _standardise(self, numbers: Array) -> Array:
        if not self.std:
            return np.zeros(len(numbers), dtype=np.float32)
        usable = _usable(numbers)
        numbers = np.where(usable, numbers, 0.0)
        places = _compressed(numbers) if self.log else numbers
        places = (places - self.mean) / self.std
        # held inside float32 after the division, which a small deviation can throw far
        places = np.minimum(np.maximum(places, -FLOAT32_MAX), FLOAT32_MAX)
        places[~usable] = 0.0
        return places.astype(np.float32)

    def to_plain(self) -> dict[str, object]:
        """What is learnt, as JSON types."""
        return {"mean": self.mean, "std": self.std}


class NumberFit:
    """Streams numbers into moments."""

    def __init__(self, kind: Number) -> None:
        self.kind = kind
        self._moments = Moments()

    def add(self, chunk: pa.Array, weights: Array) -> None:
        """Take in R rows, each `weights` int64 [R] times."""
        numbers = floats(chunk)
        usable = _usable(numbers)
        numbers = numbers[usable]
        self._moments.add(_compressed(numbers) if self.kind.log else numbers, weights[usable])

    def fitted(self) -> Numbers:
        """What the rows teach."""
        return Numbers(self.kind.log, self._moments.mean, self._moments.std)


def read_number(kind: Number, saved: Mapping[str, object]) -> Numbers:
    """What `to_plain` gave. Raises Unreadable on anything else."""
    mean, std = saved.get("mean"), saved.get("std")
    if len(saved) != 2 or not (
        isinstance(mean, float) and isinstance(std, float) and isfinite(mean + std) and std >= 0
    ):
        raise Unreadable("a finite mean and a std of 0 or more", str(dict(saved)))
    return Numbers(kind.log, mean, std)


class Embeddings:
    """A vector made elsewhere; it learns nothing."""

    def __init__(self, kind: Embedding) -> None:
        self.width = kind.width
        self.expects = f"a list of {kind.width} numbers"

    def column(self, chunk: pa.Array) -> Array:
        """R rows -> float32 [R, W]; zeros for a missing vector, 0 for a missing number in one."""
        if not (is_list(chunk.type) or pa.types.is_null(chunk.type)):
            raise Unreadable(self.expects, f"a column of {chunk.type}")
        out = np.zeros((len(chunk), self.width), dtype=np.float32)
        for start in range(0, len(chunk), _ROWS_AT_ONCE):
            piece = chunk.slice(start, _ROWS_AT_ONCE)
            members, lengths = lists(piece)
            missing = absent(piece)
            present = np.ones(len(piece), dtype=bool) if missing is None else ~missing
            wrong = present & (lengths != self.width)
            if wrong.any():
                row = int(wrong.argmax())
                raise Unreadable(self.expects, f"one of {lengths[row]} in row {start + row} of its chunk")
            out[start : start + _ROWS_AT_ONCE][present] = self._vectors(floats(members))
        return out

    def one(self, value: Given) -> Array:
        """One value -> float32 [1, W]."""
        if value is None:
            return np.zeros((1, self.width), dtype=np.float32)
        if not isinstance(value, list | tuple):
            raise Unreadable(self.expects, shown(value))
        if len(value) != self.width:
            raise Unreadable(self.expects, f"one of {len(value)}")
        return self._vectors(np.array([one_float(number) for number in value]))

    def _vectors(self, numbers: Array) -> Array:
        """float64 [R * W] -> float32 [R, W]."""
        return np.where(_usable(numbers), numbers, 0.0).astype(np.float32).reshape(-1, self.width)

    def to_plain(self) -> dict[str, object]:
        """Nothing."""
        return {}


class EmbeddingFit:
    """Nothing to learn, only the width to hold."""

    def __init__(self, kind: Embedding) -> None:
        self._fitted = Embeddings(kind)

    def add(self, chunk: pa.Array, weights: Array) -> None:
        """Refuse rows of another width."""
        self._fitted.column(chunk)

    def fitted(self) -> Embeddings:
        """The same for any rows."""
        return self._fitted


def read_embedding(kind: Embedding, saved: Mapping[str, object]) -> Embeddings:
    """What `to_plain` gave. Raises Unreadable on anything else."""
    if saved:
        raise Unreadable("nothing learnt", str(dict(saved)))
    return Embeddings(kind)


class Values:
    """A number kept as it came: int64 where training's column held integers or booleans, else float32."""

    def __init__(self, missing: float, integer: bool) -> None:
        self.missing = missing
        self.integer = integer
        self.expects = "an integer" if integer else "a number"

    def column(self, chunk: pa.Array) -> Array:
        """R rows -> int64 or float32 [R]; null and NaN are `missing`."""
        if not self.integer:
            return self._floats(floats(chunk))
        if not (_is_whole(chunk.type) or pa.types.is_null(chunk.type)):
            raise Unreadable("integers, as in training", f"a column of {chunk.type}")
        if pa.types.is_uint64(chunk.type) and (integers(chunk) < 0).any():
            raise Unreadable("integers below 2^63", "a larger one")
        missing = absent(chunk)
        found = integers(chunk)
        return found if missing is None else np.where(missing, np.int64(self.missing), found)

    def one(self, value: Given) -> Array:
        """One value -> int64 or float32 [1]."""
        if not self.integer:
            return self._floats(np.array([one_float(value)]))
        if value is None:
            value = int(self.missing)
        if not isinstance(value, int):
            raise Unreadable(self.expects, shown(value))
        if not -(2**63) <= value < 2**63:
            raise Unreadable("an integer of 64 bits with its sign", shown(value))
        return np.array([value], dtype=np.int64)

    def _floats(self, numbers: Array) -> Array:
        wide = (np.abs(numbers) > FLOAT32_MAX) & ~np.isinf(numbers)
        if wide.any():
            raise Unreadable(f"a number a float32 can hold (up to {FLOAT32_MAX:.4g})", f"{numbers[wide][0]:.6g}")
        return np.where(np.isnan(numbers), self.missing, numbers).astype(np.float32)

    def to_plain(self) -> dict[str, object]:
        """What is learnt, as JSON types."""
        return {"integer": self.integer}


class ValueFit:
    """Learns only whether the column holds integers."""

    def __init__(self, kind: Value) -> None:
        self.kind = kind
        self._integer: bool | None = None

    def add(self, chunk: pa.Array, weights: Array) -> None:
        """Refuse a column that holds no numbers."""
        kind = chunk.type
        if pa.types.is_null(kind):
            return
        if not (_is_whole(kind) or is_number(kind)):
            raise Unreadable("numbers", f"a column of {kind}")
        self._integer = _is_whole(kind) and self._integer is not False

    def fitted(self) -> Values:
        """What the column's type teaches."""
        if self._integer is None:
            raise Unreadable("numbers", "a column without a type or any value")
        return read_value(self.kind, {"integer": self._integer})


def read_value(kind: Value, saved: Mapping[str, object]) -> Values:
    """What `to_plain` gave. Raises Unreadable on anything else."""
    integer = saved.get("integer")
    if len(saved) != 1 or not isinstance(integer, bool):
        raise Unreadable("integer = true or false", str(dict(saved)))
    if integer and not float(kind.missing).is_integer():
        raise Unreadable("a whole number as `missing`, since the column holds integers", str(kind.missing))
    if not abs(kind.missing) <= FLOAT32_MAX:
        raise Unreadable("a `missing` that is finite and that a float32 can hold", str(kind.missing))
    return Values(kind.missing, integer)


def _is_whole(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_boolean(kind))
