"""One record a user, by key: the profile and every event of the log, in one LMDB file that is replaced whole.

Not known here: events that came since; `stores.live` adds them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import lmdb
import msgspec
import numpy as np
import pyarrow as pa

from prerank.errors import DataError
from prerank.stores.environments import SharedEnvironment, share
from prerank.stores.records import UserRecord as UserRecord
from prerank.stores.user_file import FORMAT, HEAD, META, PROFILE, Format, Meta, event_bytes, id_of, key_of, write_users
from prerank.stores.user_file import Events as Events
from prerank.types import Given

_AGAIN = "build it again from the tables with `prerank train`"


class UserStore:
    """An open store. Threads may share one; it keeps reading the file it opened when that is replaced.

    `until_ms` is the time of its last event: what happened until then, it knows.
    """

    def __init__(self, shared: SharedEnvironment, path: Path, meta: Meta) -> None:
        self._shared: SharedEnvironment | None = shared
        self._path = path
        self._num_users = meta.num_users
        self._profile = msgspec.msgpack.Decoder(PROFILE)
        self._user_id = meta.user_id
        self._stored = meta.columns
        self.columns: tuple[str, ...] = (meta.user_id, *meta.columns)
        self.labels: tuple[str, ...] = tuple(meta.labels)
        self.contexts: tuple[str, ...] = tuple(meta.contexts)
        self.until_ms: int = meta.until_ms

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
        path: Path,
        users: pa.Table,
        events: Iterable[Events],
        *,
        labels: Sequence[str],
        contexts: Sequence[str] = (),
        user_id: str = "user_id",
    ) -> None:
        """Replace the store at `path` by `users` (column `user_id`, the rest is the profile) and their `events`.

        `events` come once a user at most, by ascending user_id; times in any order. Users are taken in any order and
        need no events. Each event has a digest (`stores.contexts`) of every context column of `contexts`. Everything is
        built in a file beside and renamed, so a reader sees the old store or the new.
        Raises DataError for an event of a user who is not in `users`, a repeated user, or a column of another kind.
        """
        write_users(path, users, events, labels, contexts, user_id)

    def get(self, user_id: int) -> UserRecord | None:
        """The user's record, or None for one the store does not have. Raises DataError on a damaged record."""
        value = self._value(user_id)
        if value is None:
            return None
        profile = self._decoded(user_id, value)
        num_events, num_contexts = HEAD.unpack_from(value)[0], len(self.contexts)
        columns = np.frombuffer(value, "<i8", (3 + num_contexts) * num_events, HEAD.size)
        columns = columns.reshape(3 + num_contexts, num_events)
        return UserRecord(
            profile=profile,
            item_ids=columns[0],
            time_ms=columns[1],
            known_ms=columns[2],
            flags=np.frombuffer(value, "<u4", num_events, HEAD.size + columns.nbytes),
            contexts=columns[3:].T,
        )

    def profile(self, user_id: int) -> Mapping[str, Given] | None:
        """The user's profile alone, or None for one the store does not have. Raises DataError on a damaged record."""
        value = self._value(user_id)
        return None if value is None else self._decoded(user_id, value)

    def _value(self, user_id: int) -> bytes | None:
        try:
            with self._env.begin() as transaction:
                return transaction.get(key_of(user_id))
        except lmdb.Error as error:
            raise DataError(f"{self._path}: the user store is damaged: {error}; {_AGAIN}") from None

    def _decoded(self, user_id: int, value: bytes) -> dict[str, Given]:
        """The profile of a record, all of whose lengths fit."""
        num_events, num_bytes = HEAD.unpack_from(value) if len(value) >= HEAD.size else (0, 0)
        profile_at = HEAD.size + num_events * event_bytes(len(self.contexts))
        if len(value) != profile_at + num_bytes:
            raise DataError(f"{self._path}: the record of user {user_id} is damaged; {_AGAIN}")
        try:
            profile = dict(zip(self._stored, self._profile.decode(value[profile_at:]), strict=True))
        except ValueError as error:  # msgspec's DecodeError is one
            raise DataError(f"{self._path}: the profile of user {user_id} is damaged: {error}; {_AGAIN}") from None
        return {self._user_id: user_id, **profile}

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
    expected, found = shared.promised_bytes, shared.num_bytes
    if found < expected:
        raise DataError(f"{path}: expected {expected} bytes of user store, found {found}: it is cut short; {_AGAIN}")
    try:
        with env.begin() as transaction:
            plain = transaction.get(META)
        if plain is None:
            raise DataError(f"{path}: an LMDB file, but not a user store: it has no {META.decode()!r}; {_AGAIN}")
        found_format = msgspec.msgpack.decode(plain, type=Format).format
        if found_format != FORMAT:
            raise DataError(f"{path}: expected user store format {FORMAT}, found {found_format}; {_AGAIN}")
        return msgspec.msgpack.decode(plain, type=Meta)
    except (lmdb.Error, msgspec.DecodeError) as error:
        raise DataError(f"{path}: the user store is damaged: {error}; {_AGAIN}") from None
