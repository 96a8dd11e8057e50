"""Events that came since the log was loaded, in a Redis or Valkey that servers share.

They are the hash `prerank:<funnel>:events`: a user's key as in the LMDB file, and before the value of
`stores.event_rows` a stamp of 8 bytes, another at each write. Who writes reads first, merges, and a script writes all
of it if every stamp is still what was read, so that no two writers lose each other's and no event is taken twice.
"""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from operator import methodcaller
from typing import TYPE_CHECKING, Any

from prerank.errors import DataError, StoreFailed
from prerank.stores.event_rows import MOST_KEPT, EventMeta, EventRows, LiveEvent
from prerank.stores.redis_client import RedisPair
from prerank.stores.redis_generations import ID
from prerank.stores.user_file import META, id_of, key_of
from prerank.types import Array

if TYPE_CHECKING:
    import redis

_STAMP = 8
_USERS_A_SWEEP = 512
_MOST_TURNS = 100
_WAIT_S = 0.01
_SWAP = """
if (redis.call('HGET', KEYS[1], ARGV[1]) or '') ~= ARGV[2] then return false end
local differ = {}
for at = 3, #ARGV, 3 do
  local found = redis.call('HGET', KEYS[1], ARGV[at])
  if (found and string.sub(found, 1, 8) or '') ~= ARGV[at + 1] then table.insert(differ, ARGV[at]) end
end
if #differ == 0 then
  for at = 3, #ARGV, 3 do
    if ARGV[at + 2] == '' then
      redis.call('HDEL', KEYS[1], ARGV[at])
    else
      redis.call('HSET', KEYS[1], ARGV[at], ARGV[at + 2])
    end
  end
end
return differ
"""


class RedisEvents:
    """An open store. Threads and processes may share one: they read at once, and of one user they write in turn."""

    def __init__(
        self, pair: RedisPair, funnel: str, names: Sequence[str], contexts: Sequence[str], most_kept: int
    ) -> None:
        self._pair, self._key = pair, f"prerank:{funnel}:events"
        self._where = f"{pair.writes.where} {self._key}"
        self._again = f"delete the key {self._key} and start again: what came since the log was loaded is lost with it"
        self._swap = pair.writes.script(_SWAP, "the events cannot be written")
        self._id, meta = self._joined(names, contexts)
        self._rows = EventRows(meta, contexts, most_kept, self._where, self._again)
        self.names, self.contexts = self._rows.names, self._rows.contexts

    @classmethod
    def open(
        cls,
        pair: RedisPair,
        funnel: str,
        names: Sequence[str],
        contexts: Sequence[str] = (),
        most_kept: int = MOST_KEPT,
    ) -> RedisEvents:
        """The events of `funnel`, for events of these `names`; `most_kept` a user.

        Of an event's context the columns `contexts` are kept, each an integer, text, a boolean or None.
        Raises DataError if what is there is damaged or of another format, StoreFailed without an answer.
        """
        return cls(pair, funnel, names, contexts, most_kept)

    def append(self, events: Sequence[LiveEvent]) -> int:
        """Add all or none; the server has them when this returns. How many were sent before, by their event_id.

        Of one user the latest `most_kept` by time stay; of the same millisecond, those that came last. Raises DataError
        if what is there is damaged, StoreFailed where the server does not take them.
        """
        come = {key_of(user_id): (user_id, rows) for user_id, rows in self._rows.of(events).items()}

        def after(key: bytes, before: bytes) -> tuple[bytes, int]:
            user_id, rows = come[key]
            merged, num_again = self._rows.merged(before, rows, user_id)
            return (before if merged is None else merged), num_again

        return self._rewrite(self._read(come), after)

    def get(self, user_id: int) -> Array:
        """The user's rows [E], oldest first; none of a user without. Raises DataError on damage.

        They are of `row_of` as many columns as there were when the user last had an event, the first of `contexts`; or
        more, where another process knows more.
        """
        key, fields = self.asked(user_id)
        found = self._pair.reads.ask("the user's events cannot be read", methodcaller("hmget", key, fields))
        return self.told(user_id, found)

    def asked(self, user_id: int) -> tuple[str, list[bytes]]:
        """The hash and the fields that are read of a user, for `told`."""
        return self._key, [key_of(user_id), ID]

    def told(self, user_id: int, found: Sequence[bytes | None]) -> Array:
        """What `asked` found, as `get` gives it."""
        value, this = found
        if this != self._id:
            raise self._lost()
        return self._rows.read(value and value[_STAMP:], user_id)

    def sweep(self, until_ms: int) -> int:
        """Forget what happened until then, some users at a time. How many events that were."""
        if self._meta(self._found()[1]).swept_ms >= until_ms:
            return 0

        def after(key: bytes, before: bytes) -> tuple[bytes, int]:
            left, num = self._rows.swept(before, until_ms, id_of(key))
            return left or b"", num

        num_swept, cursor = 0, None
        while cursor != 0:
            scan = methodcaller("hscan", self._key, cursor or 0, count=_USERS_A_SWEEP)
            cursor, found = self._pair.writes.ask("the events cannot be swept", scan)
            num_swept += self._rewrite({key: value for key, value in found.items() if key not in (META, ID)}, after)
        self._remember_sweep(until_ms)
        return num_swept

    def close(self) -> None:
        """Let go of the connections."""
        self._pair.close()

    def _rewrite(self, stored: dict[bytes, bytes | None], after: Callable[[bytes, bytes], tuple[bytes, int]]) -> int:
        """Put what `after` gives of each key and its bytes in their place, empty where nothing is left: all, or none.

        The sum of the numbers that it gives.
        """
        for turn in range(_MOST_TURNS):
            before = {key: (value or b"")[_STAMP:] for key, value in stored.items()}
            done = {key: after(key, value) for key, value in before.items()}
            changed = [(key, stored[key], value) for key, (value, _) in done.items() if value != before[key]]
            differ = self._swapped(changed)
            if not differ:
                return sum(num for _, num in done.values())
            stored |= self._read(differ)
            time.sleep(random.uniform(0, min(turn, 10) * _WAIT_S / 10))
        raise StoreFailed(f"{self._where}: others wrote events of the same users {_MOST_TURNS} times meanwhile")

    def _swapped(self, changes: Sequence[tuple[bytes, bytes | None, bytes]]) -> list[bytes]:
        """Each key's new bytes in place of the value it had, unless one has another by now: those that do."""
        differ = self._tried(changes, self._id) if changes else []
        if differ is None:
            raise self._lost()
        return differ

    def _tried(self, changes: Iterable[tuple[bytes, bytes | None, bytes]], this: bytes) -> list[bytes] | None:
        """As `_swapped`, or None where the store is not `this` one."""
        stamp = secrets.token_bytes(_STAMP)
        arguments = [ID, this]
        for key, value, after in changes:
            arguments += [key, (value or b"")[:_STAMP], stamp + after if after else b""]
        differ: list[bytes] | None = self._swap([self._key], arguments)
        return differ

    def _read(self, keys: Iterable[bytes]) -> dict[bytes, bytes | None]:
        some = list(keys)
        if not some:
            return {}
        found = self._pair.writes.ask("the events cannot be read", methodcaller("hmget", self._key, some))
        return dict(zip(some, found, strict=True))

    def _found(self) -> tuple[bytes | None, bytes | None]:
        """Which store is there, and its lists as they are stored; neither, where there is none."""

        def asked(client: redis.Redis) -> list[Any]:
            both = client.pipeline()
            both.hmget(self._key, [ID, META])
            both.hlen(self._key)
            return both.execute()

        (this, meta), num = self._pair.writes.ask("the events cannot be read", asked)
        if num and None in (this, meta):
            raise DataError(f"{self._where}: a hash, but not a store of events; {self._again}")
        return this, meta

    def _meta(self, stored: bytes | None) -> EventMeta:
        if stored is None:
            return EventMeta.new()
        return EventMeta.read(stored[_STAMP:], self._where, self._again)

    def _joined(self, names: Sequence[str], contexts: Sequence[str]) -> tuple[bytes, EventMeta]:
        """Which store this is, and its lists, with these in them."""
        while True:
            this, stored = self._found()
            meta = self._meta(stored)
            meta.grow(names, contexts, self._where, self._again)
            if this is not None and stored is not None and meta.encoded() == stored[_STAMP:]:
                return this, meta
            # of several that make it or add to it, one does; all look again at what came of it
            made = [(ID, None, b"events")] if this is None else []
            self._tried([(META, stored, meta.encoded()), *made], this or b"")

    def _remember_sweep(self, until_ms: int) -> None:
        differ = [META]
        while differ:
            _, stored = self._found()
            meta = self._meta(stored)
            meta.swept_ms = max(meta.swept_ms, until_ms)
            differ = self._swapped([(META, stored, meta.encoded())])

    def _lost(self) -> StoreFailed:
        return StoreFailed(
            f"{self._where} is not the store of events that was opened: the server lost it, or somebody deleted it; "
            "start again"
        )
