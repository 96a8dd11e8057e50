"""A request that was answered: what was asked, what was known of the user, and what won; and it as a row of columns.

What was known is kept raw (the profile by column, events by item_id) and not encoded: a code means something in one
version alone, and from what it was made of any version can be asked the same again, or trained on it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from prerank.stores.records import EXPOSED, UserRecord
from prerank.types import Array, Columns, Given

StageTime: TypeAlias = tuple[str, float, float, int, int]
"""A stage's name, start and duration in milliseconds, and things in and out."""


@dataclass(frozen=True, slots=True)
class LoggedRequest:
    """One request that was answered, as of `time_ms` (UTC milliseconds).

    `record` is what the store knew of the user then, None of one it did not know; its flags are of `labels`, its
    contexts of `context_columns`. `digest` is `digest_of` the features that the version made of it.
    Winners, best first: item_ids int64 [K], utility float32 [K] (NaN: not computed), probs float32 [K, T] of `tasks`,
    values float32 [K, V] that the utility read, such as bids, by `value_names`, and pacing float32 [K]; found_by int32
    [K] has bit n where `generators[n]` found it. `lost_item_ids` int64 [S] are drawn from the candidates that did not
    win, each as likely, with their lost_similarity float32 [S], NaN where the index did not find them.
    """

    request_id: str
    time_ms: int
    user_id: int
    version: str
    k: int
    exclude: tuple[int, ...]
    deadline_ms: float | None
    context: Mapping[str, Given]
    record: UserRecord | None
    labels: tuple[str, ...]
    context_columns: tuple[str, ...]
    digest: int
    item_ids: Array
    utility: Array
    tasks: tuple[str, ...]
    probs: Array
    value_names: tuple[str, ...]
    values: Array
    pacing: Array
    generators: tuple[str, ...]
    found_by: Array
    num_candidates: int
    lost_item_ids: Array
    lost_similarity: Array
    degraded: bool
    notes: tuple[str, ...]
    ms: float
    stages: tuple[StageTime, ...]


SCHEMA = pa.schema(
    [
        ("request_id", pa.string()),
        ("time_ms", pa.int64()),
        ("user_id", pa.int64()),
        ("version", pa.string()),
        ("k", pa.int32()),
        ("exclude", pa.list_(pa.int64())),
        ("deadline_ms", pa.float64()),
        ("context", pa.string()),  # JSON, as the profile is: columns come and go with versions
        ("profile", pa.string()),  # null where nothing was known of the user
        ("labels", pa.list_(pa.string())),
        ("context_columns", pa.list_(pa.string())),
        ("event_item_ids", pa.list_(pa.int64())),
        ("event_time_ms", pa.list_(pa.int64())),
        ("event_known_ms", pa.list_(pa.int64())),
        ("event_flags", pa.list_(pa.uint32())),
        ("event_contexts", pa.list_(pa.int64())),  # those of one event beside each other
        ("digest", pa.uint64()),
        ("item_ids", pa.list_(pa.int64())),
        ("utility", pa.list_(pa.float32())),
        ("tasks", pa.list_(pa.string())),
        ("probs", pa.list_(pa.float32())),  # those of one winner beside each other, as its values are
        ("value_names", pa.list_(pa.string())),
        ("values", pa.list_(pa.float32())),
        ("pacing", pa.list_(pa.float32())),
        ("generators", pa.list_(pa.string())),
        ("found_by", pa.list_(pa.int32())),
        ("num_candidates", pa.int64()),
        ("lost_item_ids", pa.list_(pa.int64())),
        ("lost_similarity", pa.list_(pa.float32())),
        ("degraded", pa.bool_()),
        ("notes", pa.list_(pa.string())),
        ("ms", pa.float64()),
        (
            "stages",
            pa.list_(
                pa.struct(
                    [
                        ("name", pa.string()),
                        ("start_ms", pa.float64()),
                        ("ms", pa.float64()),
                        ("in", pa.int64()),
                        ("out", pa.int64()),
                    ]
                )
            ),
        ),
    ]
)
_STAGE = ("name", "start_ms", "ms", "in", "out")
_EVENTS = {"item_ids": "<i8", "time_ms": "<i8", "known_ms": "<i8", "flags": "<u4"}
_NUMBERS = {"item_ids": "<i8", "utility": "<f4", "pacing": "<f4", "found_by": "<i4"} | {
    "lost_item_ids": "<i8",
    "lost_similarity": "<f4",
    "probs": "<f4",
    "values": "<f4",
}
_PLAIN = (
    "request_id",
    "time_ms",
    "user_id",
    "version",
    "k",
    "exclude",
    "deadline_ms",
    "labels",
    "context_columns",
    "digest",
    "tasks",
    "value_names",
    "generators",
    "num_candidates",
    "degraded",
    "notes",
    "ms",
)


def as_of(record: UserRecord, time_ms: int) -> UserRecord:
    """The record without what features of that moment do not read: events at or after it, labels known so late."""
    before = record.time_ms < time_ms
    flags = record.flags[before]
    is_late = record.known_ms[before] >= time_ms
    return replace(
        record,
        item_ids=record.item_ids[before],
        time_ms=record.time_ms[before],
        known_ms=record.known_ms[before],
        flags=np.where(is_late, flags & EXPOSED, flags),
        contexts=record.contexts[before],
    )


def digest_of(features: Columns) -> int:
    """64 bits that two sets of encoded features share only if they are the same to the bit, but by chance."""
    hashed = blake2b(digest_size=8)
    for name in sorted(features):
        column = np.ascontiguousarray(features[name])
        hashed.update(f"{name} {column.dtype.str} {column.shape}\n".encode())
        hashed.update(column.tobytes())
    return int.from_bytes(hashed.digest(), "little")


def num_bytes(row: LoggedRequest) -> int:
    """About how many bytes of memory a row takes."""
    arrays = [getattr(row, name) for name in _NUMBERS]
    if row.record is not None:
        arrays += [getattr(row.record, name) for name in (*_EVENTS, "contexts")]
    return 2000 + sum(int(one.nbytes) for one in arrays)


def to_table(rows: Sequence[LoggedRequest]) -> pa.Table:
    """The rows as columns of SCHEMA, in their order."""
    columns: dict[str, Sequence[object] | pa.Array] = {name: [getattr(row, name) for row in rows] for name in _PLAIN}
    columns["context"] = [json.dumps(dict(row.context)) for row in rows]
    columns["profile"] = [None if row.record is None else json.dumps(dict(row.record.profile)) for row in rows]
    none = np.zeros(0)
    for name, dtype in {**_EVENTS, "contexts": "<i8"}.items():
        given = [none if row.record is None else getattr(row.record, name) for row in rows]
        columns[f"event_{name}"] = _lists(given, dtype)
    for name, dtype in _NUMBERS.items():
        columns[name] = _lists([getattr(row, name) for row in rows], dtype)
    columns["stages"] = [[dict(zip(_STAGE, one, strict=True)) for one in row.stages] for row in rows]
    arrays = [
        one if isinstance(one, pa.Array) else pa.array(one, field.type)
        for field, one in ((field, columns[field.name]) for field in SCHEMA)
    ]
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


def to_rows(batch: pa.RecordBatch) -> Iterator[LoggedRequest]:
    """The rows of columns of SCHEMA."""
    plain = {name: batch.column(name).to_pylist() for name in (*_PLAIN, "context", "profile", "stages")}
    arrays = {name: _slices(batch.column(name)) for name in _NUMBERS}
    events = {name: _slices(batch.column(f"event_{name}")) for name in (*_EVENTS, "contexts")}
    for at in range(batch.num_rows):
        said: dict[str, Any] = {name: tuple(v) if isinstance(v := plain[name][at], list) else v for name in _PLAIN}
        own: dict[str, Any] = {name: column[at] for name, column in arrays.items()}
        own["probs"] = own["probs"].reshape(len(own["item_ids"]), len(said["tasks"]))
        own["values"] = own["values"].reshape(len(own["item_ids"]), len(said["value_names"]))
        record = None
        if (profile := plain["profile"][at]) is not None:
            columns = {name: column[at] for name, column in events.items()}
            columns["contexts"] = columns["contexts"].reshape(len(columns["item_ids"]), len(said["context_columns"]))
            record = UserRecord(profile=json.loads(profile), **columns)
        stages = tuple(tuple(one[name] for name in _STAGE) for one in plain["stages"][at])
        context = json.loads(plain["context"][at])
        yield LoggedRequest(**said, **own, context=context, record=record, stages=stages)


def _lists(rows: Sequence[Array], dtype: str) -> pa.Array:
    """One list a row, of arrays of any shape."""
    offsets = np.zeros(len(rows) + 1, np.int32)
    np.cumsum([row.size for row in rows], out=offsets[1:])
    flat = [np.asarray(row, dtype).reshape(-1) for row in rows]
    values = pa.array(np.concatenate(flat) if flat else np.zeros(0, dtype))
    return pa.ListArray.from_arrays(pa.array(offsets), values)


def _slices(column: pa.Array) -> list[Array]:
    """The arrays of a column of lists without nulls."""
    values = column.values.to_numpy()
    return [values[start:end] for start, end in pairwise(column.offsets.to_pylist())]
