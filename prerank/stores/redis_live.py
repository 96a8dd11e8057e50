"""The log's users and what they did since, both in a Redis or Valkey that servers share, read in one round trip."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prerank.schema import IMPRESSION
from prerank.stores.live import LiveUsers
from prerank.stores.records import UserRecord
from prerank.stores.redis_client import RedisPair
from prerank.stores.redis_events import RedisEvents
from prerank.stores.redis_users import RedisUsers
from prerank.types import Array

if TYPE_CHECKING:
    import redis


def connect_users(url: str, funnel: str, timeout_s: float) -> LiveUsers:
    """The users of `funnel` on the server at `url`, and their live events; a request waits `timeout_s` for them.

    Raises DataError as `RedisUsers.open` and `RedisEvents.open` do.
    """
    pair = RedisPair.open(url, timeout_s)
    try:
        users = RedisUsers.open(pair, funnel)
        try:
            events = RedisEvents.open(pair, funnel, [IMPRESSION, *users.labels], users.contexts)
        except BaseException:
            users.close()
            raise
    except BaseException:
        pair.close()
        raise

    def both(user_id: int) -> tuple[UserRecord | None, Array]:
        def asked(client: redis.Redis) -> list[Any]:
            # not of one moment: an event that comes in between is there or is not, as it would be
            pipe = client.pipeline(transaction=False)
            for store in (users, events):
                key, fields = store.asked(user_id)
                pipe.hmget(key, fields)
            return pipe.execute()

        of_log, since = pair.reads.ask("the user cannot be read", asked)
        return users.told(user_id, of_log), events.told(user_id, since)

    return LiveUsers(users, events, both)
