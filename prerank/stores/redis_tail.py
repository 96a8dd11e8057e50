"""The items that a version does not hold in memory, in a Redis or Valkey that servers share.

A key is `prerank:<funnel>:item:<item_id>`, its value as in `stores.tail`; whoever has fresher columns may set it.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import methodcaller
from typing import Any

import pyarrow as pa

from prerank.stores.redis_client import RedisClient
from prerank.stores.tail import Row, decode_row, encoded_rows
from prerank.types import Report, silent

_ITEMS_AT_ONCE = 1 << 12


class RedisTail:
    """A `TailStore` of one funnel, on a server that `client` asks. Threads may share one."""

    def __init__(self, client: RedisClient, funnel: str) -> None:
        self._client, self._prefix = client, f"prerank:{funnel}:item:"

    @classmethod
    def open(cls, url: str, funnel: str, timeout_s: float) -> RedisTail:
        """The store, if it answers. Raises DataError if it does not, or `url` is none."""
        return cls(RedisClient.open(url, timeout_s), funnel)

    def write(self, items: pa.Table, item_id: str, columns: Sequence[str], report: Report = silent) -> None:
        """Set every item's columns; those of items that are no more stay. Raises DataError where it cannot."""
        for start in range(0, items.num_rows, _ITEMS_AT_ONCE):
            some = encoded_rows(items.slice(start, _ITEMS_AT_ONCE), item_id, columns)
            named: dict[Any, Any] = {self._key(one): value for one, value in some}
            self._client.ask("items cannot be written", methodcaller("mset", named))
            report("store items", min(start + _ITEMS_AT_ONCE, items.num_rows), items.num_rows, "items")

    def get(self, item_ids: Sequence[int]) -> list[Row | None]:
        """See `TailStore.get`; one round trip. Raises CircuitOpen where it failed too often just now."""
        if not item_ids:
            return []
        keys, where = [self._key(one) for one in item_ids], self._client.where
        found = self._client.ask("items cannot be read", lambda client: client.mget(keys))
        assert isinstance(found, list)
        return [decode_row(content, where) if isinstance(content, bytes) else None for content in found]

    def close(self) -> None:
        """Let go of the connections."""
        self._client.close()

    def _key(self, item_id: int) -> str:
        return f"{self._prefix}{item_id}"
