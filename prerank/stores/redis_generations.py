"""Which of a funnel's user stores in a Redis is read: each load of the log is a generation of its own, a hash.

`prerank:<funnel>:users` names the one that is opened, and is set when a generation is whole, so nobody sees half of
one. `...:generations` are all there are, those that were never finished too. `...:held` says who uses which, until when
(seconds UTC, by the server's clock): a generation that nobody holds and that is not named is removed.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Sequence
from datetime import UTC, datetime

from prerank.errors import DataError, StoreFailed
from prerank.stores.redis_client import RedisClient
from prerank.stores.user_file import META

ID = b"id"
"""The field of a hash that says which one it is; no key of a user has two bytes."""
LOADED = b"loaded"
"""The field that says of what a generation was loaded."""
HOLD_S = 60
"""Who did not say for so long that he holds a generation does not."""
_BEAT_S = 15.0

_OPEN = """
local generation = redis.call('GET', KEYS[1])
if not generation then return false end
redis.call('ZADD', KEYS[2], redis.call('TIME')[1] + ARGV[2], generation .. ' ' .. ARGV[1])
return {generation, redis.call('HGET', KEYS[1] .. ':' .. generation, ARGV[3])}
"""
_HOLD = "return redis.call('ZADD', KEYS[2], redis.call('TIME')[1] + ARGV[2], ARGV[1])"
_BEGIN = """
redis.call('SADD', KEYS[3], ARGV[3])
return redis.call('ZADD', KEYS[2], redis.call('TIME')[1] + ARGV[2], ARGV[1])
"""
_FINISH = """
local hash = KEYS[1] .. ':' .. ARGV[1]
if redis.call('HLEN', hash) ~= tonumber(ARGV[2]) then return false end
redis.call('HSET', hash, unpack(ARGV, 3))
redis.call('SET', KEYS[1], ARGV[1])
return 1
"""
_TIDY = """
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', redis.call('TIME')[1])
local used = {}
for _, member in ipairs(redis.call('ZRANGE', KEYS[2], 0, -1)) do used[string.match(member, '^%S+')] = true end
used[redis.call('GET', KEYS[1]) or ''] = true
local metas = {}
for _, generation in ipairs(redis.call('SMEMBERS', KEYS[3])) do
  local hash = KEYS[1] .. ':' .. generation
  if used[generation] then
    table.insert(metas, redis.call('HGET', hash, ARGV[1]) or '')
  else
    redis.call('UNLINK', hash)
    redis.call('SREM', KEYS[3], generation)
  end
end
return metas
"""


class Generations:
    """Those of one funnel, on a server that `client` asks; each call is of one moment, whoever else calls."""

    def __init__(self, client: RedisClient, funnel: str) -> None:
        self.name = f"prerank:{funnel}:users"
        self._client, self._keys = client, [self.name, f"{self.name}:held", f"{self.name}:generations"]
        reading, writing = "the users cannot be opened", "the users cannot be written"
        self._open, self._hold = client.script(_OPEN, reading), client.script(_HOLD, reading)
        self._begin, self._finish = client.script(_BEGIN, writing), client.script(_FINISH, writing)
        self._tidy = client.script(_TIDY, "what is left of earlier users cannot be removed")

    def key(self, generation: str) -> str:
        """The hash that a generation is."""
        return f"{self.name}:{generation}"

    def open(self) -> tuple[str, bytes, Hold] | None:
        """The generation that is named, its `meta`, and that it is held; None where none is."""
        token = secrets.token_hex(8)
        found = self._open(self._keys, [token, HOLD_S, META])
        if found is None:
            return None
        generation = found[0].decode()
        return generation, found[1] or b"", Hold(self, f"{generation} {token}")

    def begin(self) -> tuple[str, Hold]:
        """A new one to be filled, and that it is held meanwhile."""
        generation = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(4)}"
        member = f"{generation} {secrets.token_hex(8)}"
        self._begin(self._keys, [member, HOLD_S, generation])
        return generation, Hold(self, member)

    def finish(self, generation: str, num_users: int, meta: bytes, loaded: str) -> None:
        """Let who opens from now on read this one, which has all of its users. Raises DataError where it has not."""
        fields: Sequence[str | bytes] = (META, meta, ID, generation, LOADED, loaded)
        if not self._finish(self._keys, [generation, num_users, *fields]):
            raise DataError(
                f"{self._client.where}: expected {num_users} users in {self.key(generation)}, which was changed or "
                "removed while it was written; load them again"
            )

    def tidy(self) -> list[bytes]:
        """Remove what nobody uses; the `meta` of each that is left, empty of one that is being filled."""
        return list(self._tidy(self._keys, [META]))

    def hold(self, member: str) -> None:
        """Say again that somebody uses one."""
        self._hold(self._keys, [member, HOLD_S])

    def leave(self, member: str) -> None:
        """Say that he does no more."""
        self._client.ask("a hold cannot be given up", lambda client: client.zrem(self._keys[1], member))


class Hold:
    """That this process uses a generation, said again and again until it is let go."""

    def __init__(self, generations: Generations, member: str) -> None:
        self._generations, self._member, self._beat_s = generations, member, _BEAT_S
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="holds-users", daemon=True)
        self._thread.start()

    def let_go(self) -> None:
        """Use it no more. Where the server cannot be told, the hold ends by itself."""
        if self._ending.is_set():
            return
        self._ending.set()
        self._thread.join()
        try:
            self._generations.leave(self._member)
        except StoreFailed:
            return

    def _beat(self) -> None:
        while not self._ending.wait(self._beat_s):
            try:
                self._generations.hold(self._member)
            except StoreFailed:
                continue  # whoever reads meanwhile hears of it
