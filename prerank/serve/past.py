"""One user's events as the histories and counters that features read, by the code that training runs on all users."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from prerank.bundle.item_table import ItemTable
from prerank.features.counters import counted, encode, reads_shown
from prerank.features.histories import Timeline
from prerank.schema import IMPRESSION, Counter, History
from prerank.stores.records import EXPOSED, UserRecord
from prerank.types import Array

_ONLY = np.zeros(1, np.int64)
"""The one user of a request's timelines."""


class Past:
    """What `record`'s user did strictly before `time_ms`, in terms of one version's items.

    An impression counts from its own time, a label from when it was known. An item that `items` does not have is the
    unknown item: 0 of a category, no member of a bag. `same` is, by context feature that counters are `on`, bool [E]:
    where the event's context had the value that the request has. What two features share is made once.
    """

    def __init__(
        self,
        record: UserRecord,
        labels: Sequence[str],
        items: ItemTable,
        time_ms: int,
        same: Mapping[str, Array] | None = None,
    ) -> None:
        self._record, self._labels, self._items, self._same = record, labels, items, same or {}
        self._moment = np.array([time_ms], np.int64)
        rows = items.rows_among(record.item_ids)
        unknown = rows < 0
        self._rows, self._unknown = rows, unknown if unknown.any() else None
        self.num_unknown = 0
        if self._unknown is not None:
            self._rows = rows.clip(min=0)
            self.num_unknown = int((unknown & (record.time_ms < time_ms)).sum())
        self._events: dict[tuple[str, str], tuple[Array, Array]] = {}
        self._codes: dict[str, Array] = {}
        self._lines: dict[tuple[str, str, str], Timeline] = {}

    @property
    def num_events(self) -> int:
        """How many there are in all."""
        return len(self._record.time_ms)

    def history(self, history: History) -> Array:
        """int32 [1, L], as `Timeline.before` gives it."""
        places, moments = self._happened(history.events)
        line = Timeline.build(1, np.zeros(len(places), np.int64), moments, self._codes_of(history.of)[places])
        return line.before(_ONLY, self._moment, history.length)

    def counter(self, counter: Counter) -> Array:
        """int32 [1, L] or [1], of a share float32 [1], as `features.counters.encode` gives it."""
        shown = self._line(Counter(on=counter.on)) if reads_shown(counter) else None
        return encode(counter, self._line(counter), shown, _ONLY, self._moment)

    def _line(self, counter: Counter) -> Timeline:
        """The events a counter reads; counters of several windows share it."""
        key = (counter.count, counter.by, counter.on)
        if key not in self._lines:
            places, moments = self._happened(counter.count, counter.on)
            codes = self._codes_of(counter.by)[places] if counter.by else None
            self._lines[key] = counted(counter, 1, np.zeros(len(places), np.int64), moments, codes)
        return self._lines[key]

    def _happened(self, event: str, on: str = "") -> tuple[Array, Array]:
        """The places among the record's events of one kind, int64 [E'], and when each became known."""
        key = (event, on)
        if key not in self._events:
            is_shown = event == IMPRESSION
            bit = EXPOSED if is_shown else np.uint32(1 << self._labels.index(event))
            having = (self._record.flags & bit) != 0
            places = np.flatnonzero(having & self._same[on] if on else having)
            times = self._record.time_ms if is_shown else self._record.known_ms
            self._events[key] = places, times[places]
        return self._events[key]

    def _codes_of(self, name: str) -> Array:
        """The encoded item feature of each event, int32 [E] or of a bag [E, M]."""
        if name not in self._codes:
            codes = self._items.codes(name, self._rows).astype(np.int32)
            if self._unknown is not None:
                codes[self._unknown] = 0 if codes.ndim == 1 else -1
            self._codes[name] = codes
        return self._codes[name]
