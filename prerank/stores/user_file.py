"""A user's record as bytes, and the user store's file: how it is written beside and swapped in.

The key is the user_id, big-endian with the sign bit flipped, so keys sort as the ids do. The value is two uint32
(events E, profile bytes), then item_ids, time_ms, known_ms and each context column int64[E], flags uint32[E], all
little-endian, then the profile as a msgpack list in the order of the store's columns. Names live once, under the key
`meta`.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import lmdb
import msgspec
import numpy as np
import pyarrow as pa

from prerank.errors import DataError
from prerank.stores.environments import sync_folder
from prerank.stores.records import BEFORE_ALL_MS, MOST_LABELS
from prerank.types import Array

Events: TypeAlias = tuple[int, Array, Array, Array, Array, *tuple[Array, ...]]
"""user_id, then item_ids, time_ms and known_ms int64 [E], flags uint32 [E], and int64 [E] of each context column of the
store, as a UserRecord has them."""

Plain: TypeAlias = str | int | float | bool | None
PROFILE = list[Plain | list[Plain]]

FORMAT = 2
META = b"meta"
HEAD = struct.Struct("<II")
_KEY = struct.Struct(">Q")
_SIGN = 1 << 63
_USERS_A_COMMIT = 4096
_FIRST_MAP_BYTES = 1 << 26


class Format(msgspec.Struct):
    """The one thing that every format says of itself."""

    format: int


class Meta(msgspec.Struct, forbid_unknown_fields=True):
    """What holds for every record; `until_ms` is the time of the last event of all, `contexts` are context columns."""

    format: int
    user_id: str
    columns: list[str]
    labels: list[str]
    num_users: int
    until_ms: int
    contexts: list[str] = []


def event_bytes(num_contexts: int) -> int:
    """Of each event of a record: three int64, flags, and an int64 a context column."""
    return 3 * 8 + 4 + 8 * num_contexts


def key_of(user_id: int) -> bytes:
    """The key of an int64 user_id."""
    return _KEY.pack(user_id + _SIGN)


def id_of(key: bytes) -> int:
    """The user_id of a key."""
    return int(_KEY.unpack(key)[0]) - _SIGN


def write_users(
    path: Path,
    users: pa.Table,
    events: Iterable[Events],
    labels: Sequence[str],
    contexts: Sequence[str],
    user_id: str,
) -> None:
    """See `UserStore.write`."""
    joined = Joined(users, events, labels, contexts, user_id)
    if path.is_dir():
        raise DataError(f"{path}: expected a file to replace, found a folder; move it away")
    beside = path.with_name(f"{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        _build(beside, joined)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    sync_folder(path.parent)


def _check_columns(users: pa.Table, user_id: str, labels: Sequence[str]) -> None:
    if user_id not in users.column_names:
        raise DataError(f"users: expected a column {user_id!r}, found {users.column_names}")
    column = users[user_id]
    if not pa.types.is_integer(column.type) or column.null_count:
        raise DataError(
            f"users.{user_id}: expected integers without nulls, found {column.type} with {column.null_count}"
        )
    for field in users.schema:
        if not _is_plain(field.type):
            raise DataError(
                f"users.{field.name}: expected text, numbers, booleans or lists of these, found {field.type}"
            )
    if len(labels) > MOST_LABELS:
        raise DataError(f"labels: expected at most {MOST_LABELS}, one bit each, found {len(labels)}")


def _is_plain(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if is_list or pa.types.is_dictionary(kind):
        return _is_plain(kind.value_type)
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    return bool(is_text or is_number or pa.types.is_boolean(kind) or pa.types.is_null(kind))


def _build(path: Path, joined: Joined) -> None:
    env = lmdb.open(str(path), subdir=False, lock=False, sync=False, metasync=False, map_size=_FIRST_MAP_BYTES)
    with contextlib.closing(env):
        chunk: list[tuple[bytes, bytes]] = []
        for pair in joined:
            chunk.append(pair)
            if len(chunk) == _USERS_A_COMMIT:
                _append(env, chunk)
                chunk = []
        _append(env, chunk)
        with env.begin(write=True) as transaction:
            transaction.put(META, joined.meta())
        env.sync(True)


class Joined:
    """The users with their events: key and value of each by ascending id, and of all `meta` when they have come.

    Raises DataError at construction for a column or labels that cannot be stored, and as they come for what
    `UserStore.write` says.
    """

    def __init__(
        self, users: pa.Table, events: Iterable[Events], labels: Sequence[str], contexts: Sequence[str], user_id: str
    ) -> None:
        _check_columns(users, user_id, labels)
        self._users, self._events, self._user_id = users, events, user_id
        self._labels, self._contexts = list(labels), list(contexts)
        self._columns = [name for name in users.column_names if name != user_id]
        self._until_ms = BEFORE_ALL_MS

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        return _records(self._users, self._columns, self._user_id, self._watched(), self._contexts)

    def meta(self) -> bytes:
        """See `Meta`."""
        columns, num_users = self._columns, self._users.num_rows
        found = Meta(FORMAT, self._user_id, columns, self._labels, num_users, self._until_ms, self._contexts)
        return msgspec.msgpack.encode(found)

    def _watched(self) -> Iterator[Events]:
        for one in self._events:
            self._until_ms = max(self._until_ms, int(one[2].max(initial=BEFORE_ALL_MS)))
            yield one


def _append(env: lmdb.Environment, chunk: list[tuple[bytes, bytes]]) -> None:
    while True:
        try:
            with env.begin(write=True) as transaction:
                for key, value in chunk:
                    transaction.put(key, value, append=True)
                return
        except lmdb.MapFullError:
            env.set_mapsize(env.info()["map_size"] * 2)


def _records(
    users: pa.Table, columns: list[str], user_id: str, events: Iterable[Events], contexts: Sequence[str]
) -> Iterator[tuple[bytes, bytes]]:
    """Key and value of each user by ascending id: the sorted users joined with the sorted events."""
    encode = msgspec.msgpack.Encoder().encode
    pending = _ascending(events)
    upcoming = next(pending, None)
    before: int | None = None
    for ids, profiles in _profiles(users, columns, user_id):
        for this, profile in zip(ids, profiles, strict=True):
            if this == before:
                raise DataError(f"users.{user_id}: expected each user once, found {this} again")
            _check_known(upcoming, this)
            before, packed = this, encode(profile)
            mine: Sequence[Array] = ()
            if upcoming is not None and upcoming[0] == this:
                mine, upcoming = _by_time(upcoming, contexts), next(pending, None)
            num_events = len(mine[0]) if mine else 0
            head = HEAD.pack(num_events, len(packed))
            yield key_of(this), b"".join([head, *(column.tobytes() for column in mine), packed])
    _check_known(upcoming, None)


def _check_known(upcoming: Events | None, user_id: int | None) -> None:
    if upcoming is not None and (user_id is None or upcoming[0] < user_id):
        raise DataError(f"events of user {upcoming[0]}: the users table has no such user; add the row or drop them")


def _profiles(users: pa.Table, columns: list[str], user_id: str) -> Iterator[tuple[list[int], Iterator[list[object]]]]:
    ids = users[user_id].to_numpy()
    order = None if bool(np.all(ids[1:] >= ids[:-1])) else np.argsort(ids, kind="stable")
    for start in range(0, users.num_rows, _USERS_A_COMMIT):
        end = start + _USERS_A_COMMIT
        part = users.slice(start, _USERS_A_COMMIT) if order is None else users.take(pa.array(order[start:end]))
        rows = zip(*(part[name].to_pylist() for name in columns), strict=True) if columns else [()] * part.num_rows
        yield part[user_id].to_pylist(), (list(row) for row in rows)


def _ascending(events: Iterable[Events]) -> Iterator[Events]:
    before: int | None = None
    for one in events:
        if before is not None and one[0] <= before:
            raise DataError(f"events: expected each user once, by ascending user_id, found {one[0]} after {before}")
        before = one[0]
        yield one


def _by_time(events: Events, contexts: Sequence[str]) -> list[Array]:
    user_id, item_ids, time_ms, known_ms, flags, *given = events
    if not len(item_ids) == len(time_ms) == len(known_ms) == len(flags):
        raise DataError(
            f"events of user {user_id}: expected columns of one length, found {len(item_ids)} item_ids, "
            f"{len(time_ms)} times, {len(known_ms)} times of knowing and {len(flags)} flags"
        )
    if [len(column) for column in given] != [len(item_ids)] * len(contexts):
        raise DataError(
            f"events of user {user_id}: expected {len(item_ids)} values of each of the context columns "
            f"{list(contexts)}, found {[len(column) for column in given]}"
        )
    if (known_ms < time_ms).any():
        raise DataError(f"events of user {user_id}: expected labels known at their event or later, found some before")
    order = np.argsort(time_ms, kind="stable")
    whole = [column.astype("<i8")[order] for column in (item_ids, time_ms, known_ms, *given)]
    return [*whole, flags.astype("<u4")[order]]
