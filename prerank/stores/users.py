"""One record a user, by key: the profile and every event of the log, in one LMDB file that is replaced whole.

Not known here: events that came since; `stores.live` adds them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import lmdb
import pyarrow as pa

from prerank.errors import DataError
from prerank.stores.environments import SharedEnvironment, share
from prerank.stores.records import UserRecord as UserRecord
from prerank.stores.user_file import META, Meta, id_of, key_of, write_users
from prerank.stores.user_file import Events as Events
from prerank.stores.user_record import UserRecords, read_meta
from prerank.types import Given

_AGAIN = "load it again from the tables with `prerank publish`"


class UserStore:
    """An open store. Threads may share one; it keeps reading the file it opened when that is replaced.

    `until_ms` is the time of its last event: what happened until then, it knows.
    """

    is_near = True

    def __init__(self, shared: SharedEnvironment, path: Path, meta: Meta) -> None:
        self._shared: SharedEnvironment | None = shared
        self._path = path
        self._num_users = meta.num_users
        self._records = UserRecords(meta, str(path), _AGAIN)
        self.columns: tuple[str, ...] = (meta.user_id, *meta.columns)
        self.labels: tuple[str, ...] = tuple(meta.labels)
        self.contexts: tuple[str, ...] = tuple(meta.contexts)
        self.until_ms: int = meta.until_ms

    @classmethod
    def open(cls, path: Path) -> UserStore:
        """The store at `path`, to read. Raises DataError if there is none, or it is damaged or of another format."""
        if not path.is_file():
            raise DataError(
                f"{path}: expected a user store (one LMDB file), found none; {_AGAIN}, or name with --users the Redis "
                "that has them"
            )
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
        return self._records.record(user_id, self._value(user_id))

    def profile(self, user_id: int) -> Mapping[str, Given] | None:
        """The user's profile alone, or None for one the store does not have. Raises DataError on a damaged record."""
        return self._records.profile(user_id, self._value(user_id))

    def _value(self, user_id: int) -> bytes | None:
        try:
            with self._env.begin() as transaction:
                return transaction.get(key_of(user_id))
        except lmdb.Error as error:
            raise DataError(f"{self._path}: the user store is damaged: {error}; {_AGAIN}") from None

    def tidy(self) -> int:
        """`until_ms`: a file that was replaced goes by itself, and one process serves from it."""
        return self.until_ms

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
    except lmdb.Error as error:
        raise DataError(f"{path}: the user store is damaged: {error}; {_AGAIN}") from None
    if plain is None:
        raise DataError(f"{path}: an LMDB file, but not a user store: it has no {META.decode()!r}; {_AGAIN}")
    return read_meta(plain, str(path), _AGAIN)
