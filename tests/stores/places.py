"""Where users and their events can be, each as the tests of all of them need it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import lmdb
import pyarrow as pa
import pytest
import redis

from prerank.stores.event_rows import MOST_KEPT
from prerank.stores.events import EventStore
from prerank.stores.live import LiveEvents, LiveUsers, LoadedUsers
from prerank.stores.redis_client import RedisPair
from prerank.stores.redis_events import RedisEvents
from prerank.stores.redis_live import connect_users
from prerank.stores.redis_users import RedisUsers
from prerank.stores.user_file import Events
from prerank.stores.users import UserStore

FUNNEL = "tiny"


class Place(Protocol):
    """A home for one funnel's users and events."""

    def write(self, users: pa.Table, events: Iterable[Events], **options: Any) -> None:
        """See `UserStore.write`."""
        ...

    def users(self) -> LoadedUsers:
        """Opened once more."""
        ...

    def events(self, names: Sequence[str], contexts: Sequence[str] = (), most_kept: int = MOST_KEPT) -> LiveEvents:
        """Opened once more."""
        ...

    def live(self) -> LiveUsers:
        """Both, opened once more."""
        ...

    def put_user(self, key: bytes, value: bytes) -> None:
        """A record of the store of users as it is, behind its back."""
        ...

    def put_events(self, key: bytes, value: bytes) -> None:
        """The same of events."""
        ...


class Files:
    """Two LMDB files of a folder."""

    def __init__(self, folder: Path) -> None:
        self.users_path, self.events_path = folder / "users.lmdb", folder / "events.lmdb"

    def write(self, users: pa.Table, events: Iterable[Events], **options: Any) -> None:
        UserStore.write(self.users_path, users, events, **options)

    def users(self) -> UserStore:
        return UserStore.open(self.users_path)

    def events(self, names: Sequence[str], contexts: Sequence[str] = (), most_kept: int = MOST_KEPT) -> EventStore:
        return EventStore.open(self.events_path, names, contexts, most_kept)

    def live(self) -> LiveUsers:
        return LiveUsers.open(self.users_path, self.events_path)

    def put_user(self, key: bytes, value: bytes) -> None:
        _put(self.users_path, key, value)

    def put_events(self, key: bytes, value: bytes) -> None:
        _put(self.events_path, key, value)


def _put(path: Path, key: bytes, value: bytes) -> None:
    with lmdb.open(str(path), subdir=False, lock=False) as env, env.begin(write=True) as turn:
        turn.put(key, value)


class Shared:
    """A Redis, where the funnel is called tiny."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.client = redis.Redis.from_url(url)

    def pair(self, timeout_s: float = 10.0) -> RedisPair:
        return RedisPair.open(self.url, timeout_s)

    def write(self, users: pa.Table, events: Iterable[Events], **options: Any) -> None:
        RedisUsers.write(self.pair().writes, FUNNEL, users, events, **options)

    def users(self) -> RedisUsers:
        return RedisUsers.open(self.pair(), FUNNEL)

    def events(self, names: Sequence[str], contexts: Sequence[str] = (), most_kept: int = MOST_KEPT) -> RedisEvents:
        return RedisEvents.open(self.pair(), FUNNEL, names, contexts, most_kept)

    def live(self) -> LiveUsers:
        return connect_users(self.url, FUNNEL, 10.0)

    def put_user(self, key: bytes, value: bytes) -> None:
        self.client.hset(self.generation(), key, value)

    def put_events(self, key: bytes, value: bytes) -> None:
        self.client.hset(f"prerank:{FUNNEL}:events", key, bytes(8) + value)

    def generation(self) -> str:
        """The hash that is read."""
        named = self.client.get(f"prerank:{FUNNEL}:users")
        assert isinstance(named, bytes)
        return f"prerank:{FUNNEL}:users:{named.decode()}"


@pytest.fixture(params=["lmdb", "redis"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """Each in turn, empty; a skip where there is no Redis."""
    if request.param == "lmdb":
        yield Files(tmp_path)
        return
    yield Shared(request.getfixturevalue("redis_url"))
