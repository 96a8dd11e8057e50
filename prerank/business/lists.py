"""What items list for a rule of targeting: read from a column of the items table, and packed as bitmaps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from prerank.config import MOST_TARGETED, TargetingRule
from prerank.errors import DataError
from prerank.kernels.eligible import WORD, num_words
from prerank.types import Array

HOURS = 168
"""The hours of a week; 0 is Monday from 00:00."""
_BYTES_AT_ONCE = 1 << 24


def read_lists(
    rule: TargetingRule, columns: Mapping[str, pa.ChunkedArray], where: str
) -> tuple[Array, list[str], Array]:
    """How many values each item lists int64 [I], the distinct ones, and which each is, int [M], item after item.

    Raises DataError naming `where` for a column that is missing or not as the rule must have it.
    """
    if rule.item not in columns:
        raise DataError(f"{where}: the items have no such column")
    lengths, distinct, codes = _members(columns[rule.item], where)
    _check_values(rule, distinct, where)
    return lengths, distinct, codes


def pack_lists(rule: TargetingRule, lengths: Array, distinct: Sequence[str], codes: Array) -> Tensor:
    """What `read_lists` gave as the bitmaps of one rule, int64 [., W], values ascending."""
    num_items, width = len(lengths), num_words(len(lengths))
    rank = np.argsort(np.argsort(np.array(distinct, dtype=object))) if distinct else np.zeros(0, np.int64)
    first = int(not rule.excludes)
    packed = np.zeros((first + len(distinct), width), np.int64)
    ends = np.cumsum(lengths)
    step = max(WORD, _BYTES_AT_ONCE // (1 + len(distinct)) // WORD * WORD)
    for start in range(0, num_items, step):
        some = lengths[start : start + step]
        those = slice(ends[start] - some[0], ends[start + len(some) - 1])
        # a byte a bit, and an item may list a value twice
        bits = np.zeros((len(packed), num_words(len(some)) * WORD), bool)
        bits[first + rank[codes[those]], np.repeat(np.arange(len(some)), some)] = True
        if first:
            bits[:, np.flatnonzero(some == 0)] = True
        at = start // WORD
        packed[:, at : at + bits.shape[1] // WORD] = np.packbits(bits, axis=1, bitorder="little").view("<i8")
    return torch.from_numpy(packed)


def _members(column: pa.ChunkedArray, where: str) -> tuple[Array, list[str], Array]:
    """See `read_lists`."""
    lengths, pieces = [np.zeros(0, np.int64)], []
    for chunk in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
        chunk = _plain(chunk)
        if _is_list(chunk.type):
            lengths.append(pc.list_value_length(chunk).fill_null(0).to_numpy(zero_copy_only=False))
            members = _plain(chunk.flatten())
            if members.null_count:
                raise DataError(f"{where}: expected no null in a list, found {members.null_count}; leave them out")
        else:
            lengths.append(chunk.is_valid().to_numpy(zero_copy_only=False))
            members = chunk.drop_null()
        if not _is_name(members.type):
            raise DataError(f"{where}: expected text, whole numbers, booleans or lists of these, found {column.type}")
        is_other = pa.types.is_integer(members.type) or pa.types.is_boolean(members.type)
        pieces.append(members if is_other else members.cast(pa.large_string()))
    whole = pa.concat_arrays(pieces) if pieces else pa.array([], pa.large_string())
    encoded = whole.dictionary_encode()
    distinct = encoded.dictionary.cast(pa.large_string()).to_pylist()
    return np.concatenate(lengths).astype(np.int64), distinct, encoded.indices.to_numpy()


def _check_values(rule: TargetingRule, distinct: Sequence[str], where: str) -> None:
    if len(distinct) > MOST_TARGETED:
        raise DataError(f"{where}: expected at most {MOST_TARGETED:,} distinct values, found {len(distinct):,}")
    if "" in distinct:
        raise DataError(f"{where}: expected no empty text; an item for everybody has null or an empty list")
    hours = {str(hour) for hour in range(HOURS)}
    wrong = [value for value in distinct if value not in hours] if rule.schedule else []
    if wrong:
        raise DataError(f"{where}: expected hours of the week, 0 to {HOURS - 1}, found {wrong[0]!r}")


def _plain(chunk: pa.Array) -> pa.Array:
    chunk = chunk.dictionary_decode() if pa.types.is_dictionary(chunk.type) else chunk
    return chunk.cast(pa.large_string()) if pa.types.is_string_view(chunk.type) else chunk


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_name(kind: pa.DataType) -> bool:
    t = pa.types
    kinds = (t.is_string, t.is_large_string, t.is_integer, t.is_boolean, t.is_null)
    return any(is_one(kind) for is_one in kinds)
