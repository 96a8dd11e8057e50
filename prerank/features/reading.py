"""Arrow columns and Python values as plain arrays: the one place that knows which types a feature may come in.

Nothing here is learnt. `Unreadable` says what was expected and found; whoever knows the feature's name adds it.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prerank.types import Array, Given, Scalar

Family: TypeAlias = Literal["integer", "text", "boolean"]

FLOAT32_MAX = float(np.finfo(np.float32).max)
EXPECTS: dict[Family, str] = {"integer": "an integer", "text": "text", "boolean": "true or false"}
_LARGEST = 1 << 63


class Unreadable(Exception):
    """A column or value of a type its feature cannot take."""

    def __init__(self, expected: str, found: str) -> None:
        super().__init__(f"expected {expected}, found {found}")
        self.expected = expected
        self.found = found


def shown(value: object) -> str:
    """A value and its type for an error, cut to one short line."""
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def plain(chunk: pa.Array) -> pa.Array:
    """The chunk without its dictionary or extension wrapping."""
    if isinstance(chunk, pa.ExtensionArray):
        chunk = chunk.storage
    return chunk.dictionary_decode() if pa.types.is_dictionary(chunk.type) else chunk


def absent(chunk: pa.Array) -> Array | None:
    """bool [R], True where the chunk is null; None where nothing is."""
    return chunk.is_null().to_numpy(zero_copy_only=False) if chunk.null_count else None


def is_text(kind: pa.DataType) -> bool:
    """Whether the Arrow type holds UTF-8 text."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def is_list(kind: pa.DataType) -> bool:
    """Whether the Arrow type holds a list a row."""
    t = pa.types
    lists = (t.is_list, t.is_large_list, t.is_fixed_size_list, t.is_list_view, t.is_large_list_view)
    return any(is_one(kind) for is_one in lists)


def family_of(kind: pa.DataType) -> Family | None:
    """What names a column of categories is written in; None for a column of nulls without a type."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_null(kind):
        return None
    if pa.types.is_boolean(kind):
        return "boolean"
    if pa.types.is_integer(kind):
        return "integer"
    if is_text(kind):
        return "text"
    raise Unreadable("integers, text or booleans", f"a column of {kind}")


def integers(chunk: pa.Array) -> Array:
    """int64 [R] of an integer or boolean chunk, nulls as 0; unsigned ones from 2^63 on wrap (one to one)."""
    if pa.types.is_null(chunk.type):
        return np.zeros(len(chunk), dtype=np.int64)
    if pa.types.is_boolean(chunk.type):
        chunk = chunk.cast(pa.int8())
    found: Array = (chunk.fill_null(0) if chunk.null_count else chunk).to_numpy()
    return found.view(np.int64) if found.dtype == np.uint64 else found.astype(np.int64, copy=False)


def texts(chunk: pa.Array) -> tuple[list[str | None], Array]:
    """The distinct texts of a chunk with None last, and the place in that list of each row, int [R]."""
    if pa.types.is_null(chunk.type):
        return [None], np.zeros(len(chunk), dtype=np.int32)
    if pa.types.is_string_view(chunk.type):
        chunk = chunk.cast(pa.large_string())
    encoded = chunk.dictionary_encode()
    distinct: list[str | None] = encoded.dictionary.to_pylist()
    places = encoded.indices.fill_null(len(distinct)).to_numpy()
    return [*distinct, None], places


def floats(chunk: pa.Array) -> Array:
    """float64 [R] of a chunk of numbers (integer, floating, decimal, boolean), nulls as NaN."""
    kind = chunk.type
    if pa.types.is_boolean(kind):
        chunk = chunk.cast(pa.int8())
    elif not (pa.types.is_null(kind) or is_number(kind)):
        raise Unreadable("numbers", f"a column of {kind}")
    found: Array = chunk.cast(pa.float64(), safe=False).fill_null(np.nan).to_numpy()
    return found


def is_number(kind: pa.DataType) -> bool:
    """Whether the Arrow type holds quantities."""
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def lists(chunk: pa.Array) -> tuple[pa.Array, Array]:
    """All members of a list chunk end to end, and how many each row has, int64 [R] (null rows none)."""
    if pa.types.is_null(chunk.type):
        return pa.nulls(0), np.zeros(len(chunk), dtype=np.int64)
    lengths = pc.list_value_length(chunk).fill_null(0).to_numpy()
    return plain(chunk.flatten()), lengths.astype(np.int64, copy=False)


def one_integer(value: Scalar, family: Family) -> int:
    """The same int64 `integers` gives, of one value that is not None."""
    wanted = bool if family == "boolean" else int
    if type(value) is not wanted:
        raise Unreadable(EXPECTS[family], shown(value))
    if not -_LARGEST <= value < 2 * _LARGEST:
        raise Unreadable("an integer of 64 bits", shown(value))
    return value - 2 * _LARGEST if value >= _LARGEST else value


def one_float(value: Given) -> float:
    """The same float64 `floats` gives, of one value; None is NaN."""
    if value is None:
        return np.nan
    if not isinstance(value, int | float):
        raise Unreadable("a number", shown(value))
    try:
        return float(value)
    except OverflowError:  # an integer of 309 digits or more: as infinite as 1e999 is
        return np.inf if value > 0 else -np.inf
