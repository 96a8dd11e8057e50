"""Where a funnel looks up users and items that are not in memory: files of its store, or a Redis that servers share."""

from __future__ import annotations

from pathlib import Path

from prerank.config import Config
from prerank.stores.live import LiveUsers
from prerank.stores.redis_live import connect_users
from prerank.stores.redis_tail import RedisTail
from prerank.stores.tail import TAIL, LmdbTail, TailStore

_USERS_WAIT_S = 0.1
"""The longest that a request waits for a Redis that has the users, in seconds."""
_DEADLINES_SHARE = 0.25
"""Of the default deadline, so much at most: there must be time to answer as for a new user."""


def open_users(store: Path, config: Config, url: str | None) -> LiveUsers:
    """Users and what they did since, at a `url` or in the folder `store`. Raises DataError as these do."""
    if url is None:
        return LiveUsers.open(store / "users.lmdb", store / "events.lmdb")
    timeout_s = min(_USERS_WAIT_S, _DEADLINES_SHARE * config.serve.deadline_ms / 1000)
    return connect_users(url, config.name, timeout_s)


def open_tail(store: Path, config: Config, url: str | None) -> TailStore:
    """The items that are not resident, at a `url` or in the folder `store`. Raises DataError as these do."""
    if url is None:
        return LmdbTail.open(store / TAIL)
    # longer than a request waits: what comes late is for the next one
    return RedisTail.open(url, config.name, max(0.1, 4 * config.inventory.fetch_ms / 1000))
