"""The user store's file: its layout, and how it is written beside and swapped in.

The key is the user_id, big-endian with the sign bit flipped, so keys sort as the ids do. The value is two uint32
(events E, profile bytes), then item_ids int64[E], time_ms int64[E], flags uint32[E], all little-endian, then the
profile as a msgpack list in the order of the store's columns. Names live once, under the key `meta`.
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
from prerank.types import Array

Events: TypeAlias = tuple[int, Array, Array, Array]
"""user_id, item_ids int64 [E], time_ms int64 [E], flags uint32 [E]."""

Plain: TypeAlias = str | int | float | bool | None
PROFILE = list[Plain | list[Plain]]

FORMAT = 1
META = b"meta"
HEAD = struct.Struct("<II")
EVENT_BYTES = 8 + 8 + 4
_KEY = struct.Struct(">Q")
_SIGN = 1 << 63
_USERS_A_COMMIT = 4096
_FIRST_MAP_BYTES = 1 << 26


class Meta(msgspec.Struct, forbid_unknown_fields=True):
    """What holds for every record."""

    format: int
    user_id: str
    columns: list[str]
    labels: list[str]
    num_users: int


def key_of(user_id: int) -> bytes:
    """The key of an int64 user_id."""
    return _KEY.pack(user_id + _SIGN)


def id_of(key: bytes) -> int:
    """The user_id of a key."""
    return int(_KEY.unpack(key)[0]) - _SIGN


def write_users(path: Path, users: pa.Table, events: Iterable[Events], labels: Sequence[str], user_id: str) -> None:
    """See `UserStore.write`."""
    _check_columns(users, user_id, labels)
    if path.is_dir():
        raise DataError(f"{path}: expected a file to replace, found a folder; move it away")
    beside = path.with_name(f"{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        _build(beside, users, events, labels, user_id)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    _sync_folder(path.parent)


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
    if len(labels) > 32:
        raise DataError(f"labels: expected at most 32, one bit each, found {len(labels)}")


def _is_plain(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if is_list or pa.types.is_dictionary(kind):
        return _is_plain(kind.value_type)
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    return bool(is_text or is_number or pa.types.is_boolean(kind) or pa.types.is_null(kind))


def _build(path: Path, users: pa.Table, events: Iterable[Events], labels: Sequence[str], user_id: str) -> None:
    columns = [name for name in users.column_names if name != user_id]
    meta = Meta(format=FORMAT, user_id=user_id, columns=columns, labels=list(labels), num_users=users.num_rows)
    env = lmdb.open(str(path), subdir=False, lock=False, sync=False, metasync=False, map_size=_FIRST_MAP_BYTES)
    with contextlib.closing(env):
        chunk: list[tuple[bytes, bytes]] = []
        for pair in _records(users, columns, user_id, events):
            chunk.append(pair)
            if len(chunk) == _USERS_A_COMMIT:
                _append(env, chunk)
                chunk = []
        _append(env, chunk)
        with env.begin(write=True) as transaction:
            transaction.put(META, msgspec.msgpack.encode(meta))
        env.sync(True)


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
    users: pa.Table, columns: list[str], user_id: str, events: Iterable[Events]
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
                mine, upcoming = _by_time(upcoming), next(pending, None)
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


def _by_time(events: Events) -> list[Array]:
    user_id, item_ids, time_ms, flags = events
    if not len(item_ids) == len(time_ms) == len(flags):
        raise DataError(
            f"events of user {user_id}: expected columns of one length, found "
            f"{len(item_ids)} item_ids, {len(time_ms)} times and {len(flags)} flags"
        )
    order = np.argsort(time_ms, kind="stable")
    return [item_ids.astype("<i8")[order], time_ms.astype("<i8")[order], flags.astype("<u4")[order]]


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
