"""The log's users and what they did since, as one: the user store merged with the events that came after it.

What keeps an event that both have from counting twice: the log is right about everything until its last exposure,
`until_ms`, so a live event at or before that is not kept, and ignored where it was. A log may also know labels that
came after it; a live one of the same label and item is ignored, unless the item was shown again in between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np

from prerank.schema import IMPRESSION
from prerank.stores.contexts import UNKNOWN
from prerank.stores.events import EventStore, LiveEvent
from prerank.stores.records import EXPOSED, UserRecord, Users
from prerank.stores.users import UserStore
from prerank.types import Array, Given


@dataclass(frozen=True, slots=True)
class Appended:
    """Of the events given: how many had come before, by event_id, and how many are no later than the log's last."""

    num_repeated: int
    num_logged: int


class LoadedUsers(Users, Protocol):
    """What the log knows; `stores.users.UserStore` is one and `stores.redis_users.RedisUsers` another."""

    @property
    def until_ms(self) -> int:
        """The time of its last event: what happened until then, it knows."""
        ...

    def tidy(self) -> int:
        """Remove what was left of earlier logs. Until when every log that some process reads knows what happened."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


class LiveEvents(Protocol):
    """What came since; `stores.events.EventStore` is one and `stores.redis_events.RedisEvents` another."""

    @property
    def names(self) -> tuple[str, ...]:
        """Those of events, by place."""
        ...

    @property
    def contexts(self) -> tuple[str, ...]:
        """The context columns, by place."""
        ...

    def append(self, events: Sequence[LiveEvent]) -> int:
        """Add all or none. How many were sent before, by their event_id."""
        ...

    def get(self, user_id: int) -> Array:
        """The user's rows [E], oldest first, as `stores.event_rows.row_of` has them."""
        ...

    def sweep(self, until_ms: int) -> int:
        """Forget what happened until then. How many events that were."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


class LiveUsers:
    """Both stores, open. Threads may share one. It closes them.

    `both` reads the two at once where that costs less than one after the other.
    """

    def __init__(
        self,
        users: LoadedUsers,
        events: LiveEvents,
        both: Callable[[int], tuple[UserRecord | None, Array]] | None = None,
    ) -> None:
        self._users, self._events = users, events
        self._both = both or (lambda user_id: (users.get(user_id), events.get(user_id)))
        self.is_near: bool = users.is_near
        self.columns: tuple[str, ...] = users.columns
        self.labels: tuple[str, ...] = users.labels
        self.contexts: tuple[str, ...] = users.contexts
        self.event_names: tuple[str, ...] = (IMPRESSION, *users.labels)
        self.until_ms: int = users.until_ms
        # by place in the event store's names, those that other processes add later included; 0 is none of ours
        self._flags = np.zeros(256, np.uint32)
        bits = {IMPRESSION: EXPOSED} | {label: np.uint32(1 << bit) for bit, label in enumerate(users.labels)}
        for place, name in enumerate(events.names):
            self._flags[place] = bits.get(name, 0)
        self._places = [events.contexts.index(column) for column in users.contexts]

    @classmethod
    def open(cls, users_path: Path, events_path: Path) -> LiveUsers:
        """The user store at `users_path`, and that of live events beside it, which is made if there is none.

        Raises DataError as `UserStore.open` and `EventStore.open` do.
        """
        users = UserStore.open(users_path)
        try:
            return cls(users, EventStore.open(events_path, [IMPRESSION, *users.labels], users.contexts))
        except BaseException:
            users.close()
            raise

    def record(self, events: Sequence[LiveEvent]) -> Appended:
        """Keep all or none of `events`, whose names are among `event_names`; the store has them when this returns.

        Of their context the columns `contexts` are kept, each an integer, text, a boolean or None.
        Raises DataError where they cannot be written.
        """
        fresh = [one for one in events if one.time_ms > self.until_ms]
        return Appended(self._events.append(fresh) if fresh else 0, len(events) - len(fresh))

    def profile(self, user_id: int) -> Mapping[str, Given] | None:
        """The user's profile alone, or None of one that the log does not know. Raises DataError on a damaged record."""
        return self._users.profile(user_id)

    def get(self, user_id: int) -> UserRecord | None:
        """What is known of the user, or None if nothing. Raises DataError on a damaged record."""
        record, rows = self._both(user_id)
        if not len(rows):
            return record
        flags = self._flags.take(rows["event"])
        counts = (rows["time_ms"] > self.until_ms) & (flags != 0)
        if record is not None and counts.any():
            counts[_logged(record, rows, flags, self.until_ms)] = False
        if not counts.any():
            return record
        rows, flags = rows[counts], flags[counts]
        item_ids, time_ms, contexts = rows["item_id"].copy(), rows["time_ms"].copy(), self._contexts_of(rows)
        if record is None:
            return UserRecord({}, item_ids, time_ms, time_ms, flags, contexts)
        # every live event is later than the log's last, so the order is that of time already
        return UserRecord(
            profile=record.profile,
            item_ids=np.concatenate([record.item_ids, item_ids]),
            time_ms=np.concatenate([record.time_ms, time_ms]),
            known_ms=np.concatenate([record.known_ms, time_ms]),
            flags=np.concatenate([record.flags, flags]),
            contexts=np.concatenate([record.contexts, contexts]),
        )

    def sweep(self) -> int:
        """Forget the live events that the log has by now, and say how many.

        With files this is not for a process that reads beside a server: that may hold an older log, and would miss
        them. A Redis knows who holds which.
        """
        return self._events.sweep(self._users.tidy())

    def close(self) -> None:
        """Let go of both; nothing is answered any more."""
        self._users.close()
        self._events.close()

    def _contexts_of(self, rows: Array) -> Array:
        """int64 [E, C] in the order of `contexts`; rows from before a column was known have no value of it."""
        stored = rows["contexts"]
        found = np.full((len(rows), len(self._places)), UNKNOWN, np.int64)
        for at, place in enumerate(self._places):
            if place < stored.shape[1]:
                found[:, at] = stored[:, place]
        return found

    def __enter__(self) -> LiveUsers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _logged(record: UserRecord, rows: Array, flags: Array, until_ms: int) -> list[int]:
    """The positions of live labels that the log has too, from exposures before `until_ms` that were labelled after."""
    late = np.flatnonzero(record.known_ms > until_ms)
    found = []
    for at in np.flatnonzero(np.isin(rows["item_id"], record.item_ids[late])).tolist() if len(late) else []:
        item_id, before = rows["item_id"][at], (rows["time_ms"] > until_ms) & (rows["time_ms"] <= rows["time_ms"][at])
        shown_again = (before & (rows["item_id"] == item_id) & (flags == EXPOSED)).any()
        of_item = record.flags[late[record.item_ids[late] == item_id]]
        if not shown_again and flags[at] != EXPOSED and (of_item & flags[at]).any():
            found.append(at)
    return found
