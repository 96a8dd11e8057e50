"""One record a user, by key: the profile and every event, in one LMDB file that is replaced whole.

Not known here: a store that takes single events while it is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import lmdb
import msgspec
import numpy as np
import pyarrow as pa

from prerank.errors import DataError
from prerank.stores.environments import SharedEnvironment, share
from prerank.stores.user_file import EVENT_BYTES, FORMAT, HEAD, META, PROFILE, Meta, id_of, key_of, write_users
from prerank.stores.user_file import Events as Events
from prerank.types import Array, Given

_AGAIN = "build it again from the tables with `prerank train`"


@dataclass(frozen=True, slots=True)
class UserRecord:
    """What is known of one user: the profile by column, the user_id's own included, and every impression, oldest first.

    item_ids int64 [E]; time_ms int64 [E]; flags uint32 [E], bit j set where label j of the store holds. Read-only.
    """

    profile: Mapping[str, Given]
    item_ids: Array
    time_ms: Array
    flags: Array


class UserStore:
    """An open store. Threads may share one; it keeps reading the file it opened when that is replaced."""

    def __init__(self, shared: SharedEnvironment, path: Path, meta: Meta) -> None:
        self._shared: SharedEnvironment | None = shared
        self._path = path
        self._num_users = meta.num_users
        self._profile = msgspec.msgpack.Decoder(PROFILE)
        self._user_id = meta.user_id
        self._stored = meta.columns
        self.columns: tuple[str, ...] = (meta.user_id, *meta.columns)
        self.labels: tuple[str, ...] = tuple(meta.labels)

    @classmethod
    def open(cls, path: Path) -> UserStore:
        """The store at `path`, to read. Raises DataError if there is none, or it is damaged or of another format."""
        if not path.is_file():
            raise DataError(f"{path}: expected a user store (one LMDB file), found none; {_AGAIN}")
        try:
            shared = share(path)
        except (lmdb.Error, OSError) as error:
            raise DataError(f"{path}: expected a user store (one LMDB file), but it is not one: {error}") from None
        try:
            return cls(shared, path, _read_meta(shared, path))
        except BaseException:
            shared.release()
            raise

    @staticmethod
    def write(
        path: Path, users: pa.Table, events: Iterable[Events], *, labels: Sequence[str], user_id: str = "user_id"
    ) -> None:
        """Replace the store at `path` by `users` (column `user_id`, the rest is the profile) and their `events`.

        `events` come once a user at most, by ascending user_id; times in any order. Users are taken in any order and
        need no events. Everything is built in a file beside and renamed, so a reader sees the old store or the new.
        Raises DataError for an event of a user who is not in `users`, a repeated user, or a column of another kind.
        """
        write_users(path, users, events, labels, user_id)

    def get(self, user_id: int) -> UserRecord | None:
        """The user's record, or None for one the store does not have. Raises DataError on a damaged record."""
        try:
            with self._env.begin() as transaction:
                value = transaction.get(key_of(user_id))
        except lmdb.Error as error:
            raise DataError(f"{self._path}: the user store is damaged: {error}; {_AGAIN}") from None
        if value is None:
            return None
        num_events, num_bytes = HEAD.unpack_from(value) if len(value) >= HEAD.size else (0, 0)
        profile_at = HEAD.size + num_events * EVENT_BYTES
        if len(value) != profile_at + num_bytes:
            raise DataError(f"{self._path}: the record of user {user_id} is damaged; {_AGAIN}")
        try:
            profile = dict(zip(self._stored, self._profile.decode(value[profile_at:]), strict=True))
        except ValueError as error:  # msgspec's DecodeError is one
            raise DataError(f"{self._path}: the profile of user {user_id} is damaged: {error}; {_AGAIN}") from None
        return UserRecord(
            profile={self._user_id: user_id, **profile},
            item_ids=np.frombuffer(value, "<i8", num_events, HEAD.size),
            time_ms=np.frombuffer(value, "<i8", num_events, HEAD.size + 8 * num_events),
            flags=np.frombuffer(value, "<u4", num_events, HEAD.size + 16 * num_events),
        )

    def user_ids(self) -> Iterator[int]:
        """Every user_id, ascending."""
        with self._env.begin() as transaction, transaction.cursor() as cursor:
            for key in cursor.iternext(values=False):
                if key != META:
                    yield id_of(key)

    def __len__(self) -> int:
        return self._num_users

    def close(self) -> None:
        """Let go of the file; the store answers no more."""
        if self._shared is not None:
            self._shared.release()
            self._shared = None

    @property
    def _env(self) -> lmdb.Environment:
        assert self._shared is not None, "the store is closed"
        return self._shared.env

    def __enter__(self) -> UserStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _read_meta(shared: SharedEnvironment, path: Path) -> Meta:
    env = shared.env
    # reading a page past the end of a mapped file kills the process, so the length is checked before any page is
    expected, found = (env.info()["last_pgno"] + 1) * env.stat()["psize"], shared.num_bytes
    if found < expected:
        raise DataError(f"{path}: expected {expected} bytes of user store, found {found}: it is cut short; {_AGAIN}")
    try:
        with env.begin() as transaction:
            plain = transaction.get(META)
        if plain is None:
            raise DataError(f"{path}: an LMDB file, but not a user store: it has no {META.decode()!r}; {_AGAIN}")
        meta = msgspec.msgpack.decode(plain, type=Meta)
    except (lmdb.Error, msgspec.DecodeError) as error:
        raise DataError(f"{path}: the user store is damaged: {error}; {_AGAIN}") from None
    if meta.format != FORMAT:
        raise DataError(f"{path}: expected user store format {FORMAT}, found {meta.format}; {_AGAIN}")
    return meta
