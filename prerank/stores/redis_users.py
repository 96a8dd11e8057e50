"""One record a user in a Redis or Valkey that servers share: the profile and every event of the log.

A record is a field of a generation's hash (`stores.redis_generations`), its key and its bytes as in the LMDB file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from operator import methodcaller
from types import TracebackType
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from prerank.errors import DataError, StoreFailed
from prerank.stores.records import UserRecord
from prerank.stores.redis_client import RedisClient, RedisPair
from prerank.stores.redis_generations import HOLD_S, ID, LOADED, Generations, Hold
from prerank.stores.user_file import Events, Joined, Meta, key_of
from prerank.stores.user_record import UserRecords, read_meta
from prerank.types import Given

if TYPE_CHECKING:
    import redis

_BYTES_AT_ONCE = 1 << 20  # the server answers nobody while it takes a command
FUNNELS = "prerank:funnels"
"""The set of the funnels whose users are in a Redis."""


class RedisUsers:
    """An open store. Threads may share one; it keeps reading the generation that it opened, which it holds.

    `until_ms` is the time of its last event: what happened until then, it knows.
    """

    is_near = False

    def __init__(self, pair: RedisPair, generations: Generations, generation: str, meta: Meta, hold: Hold) -> None:
        self._pair, self._generations, self._hold = pair, generations, hold
        self._generation, self._key = generation.encode(), generations.key(generation)
        self._again = _again(pair.writes.where)
        self._records = UserRecords(meta, f"{pair.reads.where} {self._key}", self._again)
        self._num_users = meta.num_users
        self.columns: tuple[str, ...] = (meta.user_id, *meta.columns)
        self.labels: tuple[str, ...] = tuple(meta.labels)
        self.contexts: tuple[str, ...] = tuple(meta.contexts)
        self.until_ms: int = meta.until_ms

    @classmethod
    def open(cls, pair: RedisPair, funnel: str) -> RedisUsers:
        """The users of `funnel` as they were loaded last.

        Raises DataError if there are none, or they are damaged or of another format; StoreFailed without an answer.
        """
        generations, where = Generations(pair.writes, funnel), pair.writes.where
        opened = generations.open()
        if opened is None:
            others = sorted(
                one.decode() for one in pair.writes.ask("cannot be read", methodcaller("smembers", FUNNELS))
            )
            raise DataError(
                f"{where}: expected the users of funnel {funnel!r}, found "
                f"{'those of ' + ', '.join(others) if others else 'none'}; {_again(where)}"
            )
        generation, meta, hold = opened
        try:
            return cls(
                pair, generations, generation, read_meta(meta, f"{where} {generations.name}", _again(where)), hold
            )
        except BaseException:
            hold.let_go()
            raise

    @staticmethod
    def write(
        client: RedisClient,
        funnel: str,
        users: pa.Table,
        events: Iterable[Events],
        *,
        labels: Sequence[str],
        contexts: Sequence[str] = (),
        user_id: str = "user_id",
        loaded: str = "",
    ) -> None:
        """Replace the users of `funnel`; see `UserStore.write`. `loaded` says of what, for `loaded_of`.

        They are a new generation, which is read when it is whole; those before are removed when nobody reads them.
        Raises DataError as `UserStore.write`, and StoreFailed where the server does not take them: then the users
        before are there as they were.
        """
        joined = Joined(users, events, labels, contexts, user_id)
        generations = Generations(client, funnel)
        generations.tidy()
        generation, hold = generations.begin()
        try:
            key = generations.key(generation)
            for some in _batches(joined):
                client.ask("the users cannot be written", methodcaller("hset", key, mapping=some))
            generations.finish(generation, users.num_rows, joined.meta(), loaded)
            client.ask("the users cannot be written", methodcaller("sadd", FUNNELS, funnel))
        finally:
            hold.let_go()
            with suppress(StoreFailed):  # what is left is removed by the next load, or the next version that serves
                generations.tidy()

    @staticmethod
    def loaded_of(client: RedisClient, funnel: str) -> str | None:
        """What `write` was told that the users of `funnel` are loaded of; None where there are none."""
        generations = Generations(client, funnel)

        def asked(client: redis.Redis) -> str | None:
            name: Any = client.get(generations.name)
            found: Any = None if name is None else client.hget(generations.key(name.decode()), LOADED.decode())
            return None if found is None else str(found.decode())

        return client.ask("the users cannot be read", asked)

    def get(self, user_id: int) -> UserRecord | None:
        """The user's record, or None for one the store does not have. Raises DataError on a damaged record."""
        return self._records.record(user_id, self._value(user_id))

    def profile(self, user_id: int) -> Mapping[str, Given] | None:
        """The user's profile alone, or None for one the store does not have. Raises DataError on a damaged record."""
        return self._records.profile(user_id, self._value(user_id))

    def asked(self, user_id: int) -> tuple[str, list[bytes]]:
        """The hash and the fields that are read of a user, for `told`."""
        return self._key, [key_of(user_id), ID]

    def told(self, user_id: int, found: Sequence[bytes | None]) -> UserRecord | None:
        """What `asked` found, as `get` gives it."""
        return self._records.record(user_id, self._checked(found))

    def tidy(self) -> int:
        """Remove generations that nobody reads any more. Until when each that is left knows what happened."""
        metas = [meta for meta in self._generations.tidy() if meta]
        return min([self.until_ms, *(read_meta(meta, self._generations.name, self._again).until_ms for meta in metas)])

    def __len__(self) -> int:
        return self._num_users

    def close(self) -> None:
        """Let go of the generation and of the connections."""
        self._hold.let_go()
        self._pair.close()

    def _value(self, user_id: int) -> bytes | None:
        key, fields = self.asked(user_id)
        return self._checked(self._pair.reads.ask("the user cannot be read", methodcaller("hmget", key, fields)))

    def _checked(self, found: Sequence[bytes | None]) -> bytes | None:
        value, generation = found
        if generation != self._generation:
            raise StoreFailed(
                f"{self._pair.reads.where}: {self._key} is no longer there: the server lost it, or it was replaced "
                f"when this process had not said for {HOLD_S} s that it reads it; {self._again}, and start again"
            )
        return value

    def __enter__(self) -> RedisUsers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _again(where: str) -> str:
    return f"load them with `prerank publish --users {where}`"


def _batches(joined: Joined) -> Iterator[dict[bytes, bytes]]:
    """Keys and values in commands of about a megabyte."""
    some: dict[bytes, bytes] = {}
    num_bytes = 0
    for key, value in joined:
        some[key] = value
        num_bytes += len(value)
        if num_bytes >= _BYTES_AT_ONCE:
            yield some
            some, num_bytes = {}, 0
    if some:
        yield some
