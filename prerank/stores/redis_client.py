"""A Redis or Valkey that several processes share: asked once, in time, and left alone for a while where it fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, TypeAlias, TypeVar
from urllib.parse import urlsplit, urlunsplit

from prerank.errors import DataError, StoreFailed
from prerank.stores.breaker import Breaker

if TYPE_CHECKING:
    import redis

T = TypeVar("T")
Script: TypeAlias = Callable[[Sequence[str], Sequence[str | bytes | int]], Any]
"""A Lua script: its keys and its arguments to what it returns, or false as None."""
_PATIENCE_S = 10.0


class RedisClient:
    """One server at a `url` such as "redis://host:6379/0". Threads may share one.

    It waits `timeout_s` for a connection, and as long for an answer; options in the url, such as ?socket_timeout=0.02,
    come before that. After several failures in a row it is left alone for a while. `where` is the url without its
    password, for errors. Raises DataError for a url that is none, and without the library.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        self.where = _without_password(url)
        try:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError:
            raise DataError(f"{self.where}: expected the library redis; install prerank[redis]") from None
        self._errors: type[Exception] = redis.RedisError
        self._breaker = Breaker(self.where)
        # the library would try three times more, each as long again, and might take an event twice
        once = Retry(NoBackoff(), 0)
        try:
            self._client: redis.Redis = redis.Redis.from_url(
                url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=once
            )
        except ValueError as error:
            raise DataError(f"{self.where}: expected a url such as redis://host:6379/0: {error}") from None

    @classmethod
    def open(cls, url: str, timeout_s: float) -> Self:
        """The server, if it answers. Raises StoreFailed if it does not, and DataError as the constructor."""
        found = cls(url, timeout_s)
        try:
            found._client.ping()
        except found._errors as error:
            found.close()
            raise StoreFailed(f"{found.where}: expected a Redis that answers: {error}") from None
        return found

    def ask(self, failing: str, asked: Callable[[redis.Redis], T]) -> T:
        """What `asked` gives of the client.

        Raises StoreFailed, which says what was `failing`, where the server does not answer or with an error, and
        CircuitOpen where it failed too often just now.
        """
        try:
            with self._breaker:
                return asked(self._client)
        except self._errors as error:
            raise StoreFailed(f"{self.where}: {failing}: {error}") from None

    def script(self, source: str, failing: str) -> Script:
        """A Lua script to run, all of it at one moment; the server is sent `source` where it does not have it."""
        registered = self._client.register_script(source)
        return lambda keys, arguments: self.ask(failing, lambda _: registered(keys, arguments))

    def close(self) -> None:
        """Let go of the connections."""
        self._client.close()


@dataclass(frozen=True, slots=True)
class RedisPair:
    """One server by two ways, either of which may be left alone: `reads` for what requests wait for, `writes` else."""

    reads: RedisClient
    writes: RedisClient

    @classmethod
    def open(cls, url: str, timeout_s: float) -> Self:
        """The server, if it answers; a request waits `timeout_s` for it. Raises as `RedisClient.open`."""
        return cls(RedisClient(url, timeout_s), RedisClient.open(url, _PATIENCE_S))

    def close(self) -> None:
        """Let go of the connections, once or more."""
        self.reads.close()
        self.writes.close()


def _without_password(url: str) -> str:
    try:
        parts = urlsplit(url)
    except ValueError:
        return "the url of a Redis"
    user, at, host = parts.netloc.rpartition("@")
    netloc = f"{user.partition(':')[0]}:***@{host}" if at else host
    return urlunsplit(parts._replace(netloc=netloc, query=""))
