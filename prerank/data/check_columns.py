"""One feature column: is its type what its kind needs, and are its values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prerank.config import MOST_TARGETED
from prerank.schema import Bag, Category, Embedding, Kind, Number, Value, kind_name


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong: `where` (table.column or a key of the funnel file), what, what was expected, what was found."""

    where: str
    what: str
    expected: str
    found: str
    severity: Literal["error", "warning"] = "error"


def integer(kind: pa.DataType) -> bool:
    """Whether this is an integer type."""
    return bool(pa.types.is_integer(kind))


def type_problem(where: str, kind: Kind, given: pa.DataType, file_format: str) -> Problem | None:
    """What is wrong with a column of type `given` for a feature of this kind, if anything."""
    plain = given.value_type if pa.types.is_dictionary(given) else given
    expected = _expected(kind, plain)
    if not expected:
        return None
    inferred = " (inferred from CSV)" if file_format == "csv" else ""
    name = kind_name(kind)
    article = "an" if name == "embedding" else "a"
    return Problem(where, "wrong type", f"{expected} for {article} {name}", f"{given}{inferred}")


def group_problem(where: str, given: pa.DataType) -> Problem | None:
    """What is wrong with a column of type `given` whose values are the groups of a rule, if anything."""
    plain = given.value_type if pa.types.is_dictionary(given) else given
    return None if _is_name(plain) else Problem(where, "wrong type", "an integer, string or boolean", str(given))


def content_problem(where: str, kind: Kind, batches: Iterable[pa.RecordBatch]) -> Problem | None:
    """What is wrong with the values of a column of the right type, if anything; `batches` have it first."""
    if not isinstance(kind, Number | Value | Embedding):
        return None
    rows = not_finite = wrong_width = 0
    for batch in batches:
        column = batch.column(0)
        rows += len(column)
        not_finite += num_not_finite(column)
        if isinstance(kind, Embedding) and not pa.types.is_fixed_size_list(column.type):
            widths = pc.fill_null(pc.list_value_length(column), kind.width)
            wrong_width += int(pc.sum(pc.not_equal(widths, kind.width)).as_py() or 0)
    if wrong_width:
        found = f"{wrong_width} of {rows} rows of another width"
        return Problem(where, "wrong width", f"{kind.width} numbers in each row", found)  # type: ignore[union-attr]
    if not_finite:
        found = f"NaN or infinity in {not_finite} of {rows} rows; write null where a value is missing"
        return Problem(where, "not a finite number", "finite numbers, or null", found)
    return None


def targeting_problem(where: str, given: pa.DataType, file_format: str) -> Problem | None:
    """What is wrong with a column of type `given` for a rule of [targeting], if anything."""
    kind = _decoded(given)
    if pa.types.is_null(kind) or _is_name(_decoded(kind.value_type) if _is_list(kind) else kind):
        return None
    inferred = " (inferred from CSV)" if file_format == "csv" else ""
    expected = "integers, strings or booleans, or lists of these, for targeting"
    return Problem(where, "wrong type", expected, f"{given}{inferred}")


def listed_problem(where: str, are_hours: bool, batches: Iterable[pa.RecordBatch]) -> Problem | None:
    """What is wrong with the values that items list for a rule, hours of the week or any; `batches` have them first."""
    nulls, texts = 0, set[str | None]()
    for batch in batches:
        column = batch.column(0)
        members = pc.list_flatten(column) if _is_list(column.type) else column
        nulls += members.null_count if _is_list(column.type) else 0
        texts.update(pc.unique(members.cast(_decoded(members.type)).cast(pa.large_string())).to_pylist())
    if nulls:
        return Problem(where, "nulls in a list", "lists without nulls", f"{nulls} of them; leave them out")
    if len(texts - {None}) > MOST_TARGETED:
        return Problem(where, "too many values", f"at most {MOST_TARGETED:,} distinct", f"{len(texts - {None}):,}")
    if "" in texts:
        return Problem(where, "empty text", "null or an empty list where an item is for everybody", "empty text")
    hours = {None, *map(str, range(24 * 7))}
    wrong = sorted(str(text) for text in texts - hours) if are_hours else []
    if wrong:
        return Problem(where, "no hour of the week", "0, Monday from 00:00, to 167", ", ".join(wrong[:3]))
    return None


def num_not_finite(column: pa.Array) -> int:
    """Rows that hold a NaN or an infinity; a null is neither."""
    kind = column.type
    if pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind):
        parents, values = pc.list_parent_indices(column), pc.list_flatten(column)
        if not pa.types.is_floating(values.type):
            return 0
        bad = pc.fill_null(pc.invert(pc.is_finite(values)), False)
        return len(np.unique(parents.filter(bad).to_numpy()))
    if not pa.types.is_floating(kind):
        return 0
    return int(pc.sum(pc.invert(pc.is_finite(column))).as_py() or 0)


def _expected(kind: Kind, given: pa.DataType) -> str:
    """What this kind needs, or "" where `given` will do."""
    if isinstance(kind, Category):
        return "" if _is_name(given) else "an integer, string or boolean"
    if isinstance(kind, Number | Value):
        return "" if _is_number(given) else "a number"
    if isinstance(kind, Bag):
        if _is_list(given):
            return "" if _is_name(given.value_type) else "a list of integers or strings"
        if kind.separator:
            return "" if _is_text(given) else f"a list, or text split at {kind.separator!r},"
        return "a list column (or set `separator` for text)"
    if isinstance(kind, Embedding):
        if not _is_list(given) or not _is_number(given.value_type):
            return f"a list of {kind.width} numbers"
        if pa.types.is_fixed_size_list(given) and given.list_size != kind.width:
            return f"a list of {kind.width} numbers"
        return ""
    raise AssertionError(f"a {kind_name(kind)} reads no column")


def _decoded(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_name(kind: pa.DataType) -> bool:
    return integer(kind) or _is_text(kind) or bool(pa.types.is_boolean(kind))


def _is_number(kind: pa.DataType) -> bool:
    return integer(kind) or bool(pa.types.is_floating(kind) or pa.types.is_decimal(kind) or pa.types.is_boolean(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))
