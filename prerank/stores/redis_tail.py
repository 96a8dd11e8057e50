"""The items that a version does not hold in memory, in a Redis or Valkey that servers share.

A key is `prerank:<funnel>:item:<item_id>`, its value as in `stores.tail`; whoever has fresher columns may set it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pyarrow as pa

from prerank.errors import DataError
from prerank.stores.breaker import Breaker
from prerank.stores.tail import Row, decode_row, encoded_rows
from prerank.types import Report, silent

if TYPE_CHECKING:
    import redis

_ITEMS_AT_ONCE = 1 << 12


class RedisTail:
    """A `TailStore` of one funnel at a `url` such as "redis://host:6379/0". Threads may share one.

    It waits `timeout_s` for an answer; after several that failed in a row it is left alone for a while.
    """

    def __init__(self, url: str, funnel: str, timeout_s: float) -> None:
        try:
            import redis
        except ImportError:
            raise DataError(f"{url}: expected the library redis; install prerank[redis]") from None
        self._errors: type[Exception] = redis.RedisError
        self._url, self._prefix = url, f"prerank:{funnel}:item:"
        self._breaker = Breaker(url)
        try:
            self._client: redis.Redis = redis.Redis.from_url(
                url, socket_timeout=timeout_s, socket_connect_timeout=max(timeout_s, 0.2)
            )
        except ValueError as error:
            raise DataError(f"{url}: expected a url such as redis://host:6379/0: {error}") from None

    @classmethod
    def open(cls, url: str, funnel: str, timeout_s: float) -> RedisTail:
        """The store, if it answers. Raises DataError if it does not, or `url` is none."""
        store = cls(url, funnel, timeout_s)
        try:
            store._client.ping()
        except store._errors as error:
            raise DataError(f"{url}: expected a Redis that answers: {error}") from None
        return store

    def write(self, items: pa.Table, item_id: str, columns: Sequence[str], report: Report = silent) -> None:
        """Set every item's columns; those of items that are no more stay. Raises DataError where it cannot."""
        try:
            for start in range(0, items.num_rows, _ITEMS_AT_ONCE):
                some = encoded_rows(items.slice(start, _ITEMS_AT_ONCE), item_id, columns)
                self._client.mset({self._key(one): value for one, value in some})
                report("store items", min(start + _ITEMS_AT_ONCE, items.num_rows), items.num_rows, "items")
        except self._errors as error:
            raise DataError(f"{self._url}: items cannot be written: {error}") from None

    def get(self, item_ids: Sequence[int]) -> list[Row | None]:
        """See `TailStore.get`; one round trip. Raises CircuitOpen where it failed too often just now."""
        if not item_ids:
            return []
        try:
            with self._breaker:
                found = self._client.mget([self._key(one) for one in item_ids])
        except self._errors as error:
            raise DataError(f"{self._url}: items cannot be read: {error}") from None
        assert isinstance(found, list)
        return [decode_row(content, self._url) if isinstance(content, bytes) else None for content in found]

    def close(self) -> None:
        """Let go of the connections."""
        self._client.close()

    def _key(self, item_id: int) -> str:
        return f"{self._prefix}{item_id}"
