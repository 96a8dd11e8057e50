"""Where a load of the log puts users: a file of the store, or a Redis; and of what those that are there were loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from prerank.errors import DataError, StoreFailed
from prerank.stores.records import Users
from prerank.stores.redis_client import RedisPair
from prerank.stores.redis_users import RedisUsers
from prerank.stores.user_file import Events
from prerank.stores.users import UserStore

USERS = "users.lmdb"
"""The file of a funnel's folder that has its users, where no Redis has them."""
_TIMEOUT_S = 30.0


def has_users(home: Path, redis: str | None) -> bool:
    """Whether there is a user store to ask: one at the url `redis`, which is believed, or the file in `home`."""
    return redis is not None or (home / USERS).exists()


def check_answers(redis: str) -> None:
    """Raises StoreFailed where no Redis answers at this url, and DataError for one that is none."""
    RedisPair.open(redis, _TIMEOUT_S).close()


@contextmanager
def open_users(home: Path, funnel: str, redis: str | None) -> Iterator[Users]:
    """The users of `funnel` as they were loaded last, from the url `redis` or the file in `home`.

    Raises DataError where they are not there or damaged, StoreFailed for a Redis that does not answer.
    """
    if redis is None:
        path = home / USERS
        if not path.exists():
            raise DataError(f"{path}: no user store, so nothing can be served as it was trained; load the users first")
        with UserStore.open(path) as users:
            yield users
        return
    pair = RedisPair.open(redis, _TIMEOUT_S)
    try:
        with RedisUsers.open(pair, funnel) as far:
            yield far
    finally:
        pair.close()


class UserFile:
    """The user store in a file, with what it was loaded of beside it."""

    def __init__(self, path: Path) -> None:
        self._path, self._mark = path, path.with_name(f"{path.name}.key")

    def loaded(self) -> str | None:
        """What it was loaded of; None where there is none, or half of one."""
        return self._mark.read_text() if self._path.exists() and self._mark.exists() else None

    def columns(self) -> tuple[str, ...]:
        """Of the store that is about to be replaced; none where there is none, or one that cannot be read."""
        if not self._path.exists():
            return ()
        try:
            with UserStore.open(self._path) as store:
                return store.columns
        except DataError:
            return ()

    def write(
        self,
        key: str,
        users: pa.Table,
        events: Iterable[Events],
        labels: Sequence[str],
        contexts: Sequence[str],
        user_id: str,
    ) -> None:
        """Replace it."""
        self._mark.unlink(missing_ok=True)
        UserStore.write(self._path, users, events, labels=labels, contexts=contexts, user_id=user_id)
        self._mark.write_text(key)

    def close(self) -> None:
        """Nothing is open."""


class UserRedis:
    """The user store in a Redis, which says itself what it was loaded of."""

    def __init__(self, url: str, funnel: str) -> None:
        self._pair, self._funnel = RedisPair.open(url, _TIMEOUT_S), funnel

    def loaded(self) -> str | None:
        """What it was loaded of; None where there is none."""
        return RedisUsers.loaded_of(self._pair.writes, self._funnel)

    def columns(self) -> tuple[str, ...]:
        """As `UserFile.columns`."""
        try:
            with RedisUsers.open(self._pair, self._funnel) as store:
                return store.columns
        except StoreFailed:
            raise
        except DataError:
            return ()

    def write(
        self,
        key: str,
        users: pa.Table,
        events: Iterable[Events],
        labels: Sequence[str],
        contexts: Sequence[str],
        user_id: str,
    ) -> None:
        """Replace it."""
        RedisUsers.write(
            self._pair.writes,
            self._funnel,
            users,
            events,
            labels=labels,
            contexts=contexts,
            user_id=user_id,
            loaded=key,
        )

    def close(self) -> None:
        """Let go of the connections."""
        self._pair.close()
