"""A user's live events as rows, the same in every store of events: made, merged, read and cut short.

A value is a byte, how many context columns C its rows have, and the user's latest events as rows of `row_of(C)`, oldest
first. An event's name, and a context column, is a place in the store's own lists, which only grow, so that a user store
with other labels or columns reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from hashlib import blake2b

import msgspec
import numpy as np

from prerank.errors import DataError
from prerank.stores.contexts import UNKNOWN, digest
from prerank.stores.records import BEFORE_ALL_MS
from prerank.stores.user_file import Format
from prerank.types import Array, Given

FORMAT = 1
MOST_KEPT = 1_000
"""The latest events of a user that are kept; the log has the rest when it is loaded again."""
MOST_NAMES = 255


@dataclass(frozen=True, slots=True)
class LiveEvent:
    """What one user did with one item at `time_ms` (UTC): `event` is "impression" or a label.

    A second event of the user with the same `event_id` is the first one sent again; an empty one is nobody's.
    `context` is that of the request that the item was shown for, by column, as far as it is known.
    """

    user_id: int
    item_id: int
    event: str
    time_ms: int
    event_id: str = ""
    context: Mapping[str, Given] = field(default_factory=dict)


@cache
def row_of(num_contexts: int) -> np.dtype[np.void]:
    """One event: 25 bytes, and 8 a context column.

    `digest` is that of the event_id, 0 without one; `event` a place in the store's names; `contexts` int64 [C], in the
    order of its context columns, the digest of each value, 0 where it is not known.
    """
    plain = [("item_id", "<i8"), ("time_ms", "<i8"), ("digest", "<u8"), ("event", "u1")]
    return np.dtype([*plain, ("contexts", "<i8", (num_contexts,))])


class EventMeta(msgspec.Struct):
    """What holds for every row of a store: its lists, and until when its events were swept."""

    format: int
    names: list[str]
    swept_ms: int
    contexts: list[str] = []

    @classmethod
    def new(cls) -> EventMeta:
        """Of an empty store."""
        return cls(FORMAT, [], BEFORE_ALL_MS)

    @classmethod
    def read(cls, plain: bytes | memoryview[int], where: str, again: str) -> EventMeta:
        """As `encoded` gave it. Raises DataError for damage and another format; `again` says what to do."""
        try:
            found = msgspec.msgpack.decode(plain, type=Format).format
            if found != FORMAT:
                raise DataError(f"{where}: expected event store format {FORMAT}, found {found}; {again}")
            return msgspec.msgpack.decode(plain, type=cls)
        except msgspec.DecodeError as error:
            raise DataError(f"{where}: the store of events is damaged: {error}; {again}") from None

    def encoded(self) -> bytes:
        """As it is stored."""
        return msgspec.msgpack.encode(self)

    def grow(self, names: Sequence[str], contexts: Sequence[str], where: str, again: str) -> None:
        """Give each of these a place, if it has none. Raises DataError for more than there are places."""
        self.names += [name for name in names if name not in self.names]
        self.contexts += [column for column in contexts if column not in self.contexts]
        for what, found in (("names of events", self.names), ("context columns", self.contexts)):
            if len(found) > MOST_NAMES:
                raise DataError(f"{where}: expected at most {MOST_NAMES} {what} ever; {again}")


class EventRows:
    """The rows of one store with the lists of `meta`, which is called `where`; `again` says what to do about damage.

    Of an event's context the columns `kept` are known, and of a user the latest `most_kept` events.
    """

    def __init__(self, meta: EventMeta, kept: Sequence[str], most_kept: int, where: str, again: str) -> None:
        self.names, self.contexts = tuple(meta.names), tuple(meta.contexts)
        self._place = {name: place for place, name in enumerate(self.names)}
        self._kept, self._most_kept = frozenset(kept), most_kept
        self._where, self._again = where, again

    def of(self, events: Sequence[LiveEvent]) -> dict[int, Array]:
        """The events' rows by user, in the order that they came."""
        by_user: dict[int, list[tuple[int, int, int, int, tuple[int, ...]]]] = {}
        for one in events:
            row = (one.item_id, one.time_ms, _digest(one.event_id), self._place[one.event], self._contexts_of(one))
            by_user.setdefault(one.user_id, []).append(row)
        return {user_id: np.array(rows, row_of(len(self.contexts))) for user_id, rows in by_user.items()}

    def read(self, value: bytes | None, user_id: int) -> Array:
        """A stored value's rows [E], none of none. Raises DataError on damage."""
        if not value:
            return np.zeros(0, row_of(0))
        row = row_of(value[0])
        if (len(value) - 1) % row.itemsize:
            raise DataError(f"{self._where}: the events of user {user_id} are damaged; {self._again}")
        return np.frombuffer(value, row, offset=1)

    def merged(self, value: bytes | None, come: Array, user_id: int) -> tuple[bytes | None, int]:
        """A stored value with the rows that come, None where there is nothing new; and how many of those were sent
        before. Raises DataError on damage."""
        before = self.read(value, user_id)
        fresh = _fresh(before, come)
        if not len(fresh):
            return None, len(come)
        num_contexts = max(_num_contexts(before), _num_contexts(fresh))
        rows = np.concatenate([_widened(before, num_contexts), _widened(fresh, num_contexts)])
        kept = rows[np.argsort(rows["time_ms"], kind="stable")][-self._most_kept :]
        return _packed(kept), len(come) - len(fresh)

    def swept(self, value: bytes, until_ms: int, user_id: int) -> tuple[bytes | None, int]:
        """A stored value without what happened until then, None where nothing is left; and how many rows went."""
        rows = self.read(value, user_id)
        later = rows[rows["time_ms"] > until_ms]
        return (_packed(later) if len(later) else None), len(rows) - len(later)

    def _contexts_of(self, one: LiveEvent) -> tuple[int, ...]:
        if not one.context:
            return (UNKNOWN,) * len(self.contexts)
        return tuple(digest(one.context.get(name)) if name in self._kept else UNKNOWN for name in self.contexts)


def _num_contexts(rows: Array) -> int:
    return int(rows["contexts"].shape[1])


def _packed(rows: Array) -> bytes:
    return bytes([_num_contexts(rows)]) + rows.tobytes()


def _widened(rows: Array, num_contexts: int) -> Array:
    """The rows with more context columns, of which nothing is known."""
    found = _num_contexts(rows)
    if found == num_contexts:
        return rows
    wide = np.zeros(len(rows), row_of(num_contexts))
    for name in ("item_id", "time_ms", "digest", "event"):
        wide[name] = rows[name]
    wide["contexts"][:, :found] = rows["contexts"]
    return wide


def _digest(event_id: str) -> int:
    """64 bits of the id, never 0; two of the few ids a user has kept agree by chance once in 10^14 events."""
    if not event_id:
        return 0
    return int.from_bytes(blake2b(event_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()) or 1


def _fresh(before: Array, come: Array) -> Array:
    """Those of the rows that come whose event_id neither was there before nor came earlier."""
    named = come["digest"] != 0
    if not named.any():
        return come
    is_first = np.zeros(len(come), bool)
    is_first[np.unique(come["digest"], return_index=True)[1]] = True
    again = named & (~is_first | np.isin(come["digest"], before["digest"]))
    return np.asarray(come[~again])
