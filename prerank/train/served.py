"""Features as they were served: those of logged requests, made of what was known then, for many requests at once.

It is what serving does for one, by the same fitted transforms and the same Timeline code, in terms of the items and the
vocabularies of whoever trains now.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from prerank.errors import RequestError
from prerank.features.counters import counted, encode
from prerank.features.histories import Timeline
from prerank.features.transforms import Transforms
from prerank.schema import IMPRESSION, Counter
from prerank.stores.contexts import columns_of, digest
from prerank.stores.records import EXPOSED
from prerank.stores.requests import LoggedRequest
from prerank.types import Array, Columns, Given


@dataclass(frozen=True, slots=True)
class Encoded:
    """The features [R, ...] of those `requests` that could be read; of the others how many, by why not."""

    requests: Sequence[LoggedRequest]
    features: Columns
    skipped: Mapping[str, int]


class ServedFeatures:
    """What makes features of logged requests, of `item_ids` int64 [I], ascending, and their encoded features."""

    def __init__(self, transforms: Transforms, item_ids: Array, items: Columns) -> None:
        self._transforms, self._item_ids, self._items = transforms, item_ids, items
        schema = transforms.schema
        self._columns = schema.columns("user")
        self._labels = [event for event in schema.events() if event != IMPRESSION]
        self._on = columns_of(schema)

    def encode(self, requests: Sequence[LoggedRequest]) -> Encoded:
        """All user and context features, histories and counters, as serving made them of each request's record.

        A request whose log lacks what a feature reads is left out.
        """
        kept, rows, skipped = [], [], Tally[str]()
        for one in requests:
            lacks = self._lacks(one)
            if lacks is not None:
                skipped[f"no {lacks} was logged"] += 1
                continue
            try:
                rows.append(self._encoded(one))
            except RequestError as error:
                skipped[str(error)] += 1
                continue
            kept.append(one)
        if not kept:
            return Encoded((), {}, dict(skipped))
        features = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
        features |= _Pasts(self, kept, features).made()
        return Encoded(kept, features, dict(skipped))

    def _lacks(self, one: LoggedRequest) -> str | None:
        """The first thing that a feature reads and that was not logged."""
        profile = one.record.profile if one.record is not None and one.record.profile else self._columns
        for what, needed, found in (
            ("column of the user", self._columns, profile),
            ("label", self._labels, one.labels),
            ("context column", self._on.values(), one.context_columns),
        ):
            for name in needed:
                if name not in found:
                    return f"{what} {name!r}"
        return None

    def _encoded(self, one: LoggedRequest) -> dict[str, Array]:
        profile: Mapping[str, Given] = {} if one.record is None else one.record.profile
        return {**self._transforms.encode_row("user", profile), **self._transforms.encode_row("context", one.context)}

    def codes(self, name: str, item_ids: Array) -> Array:
        """The encoded item feature of each, int [E] or of a bag [E, M]; an item there is none of is the unknown one."""
        places = np.searchsorted(self._item_ids, item_ids).clip(max=len(self._item_ids) - 1)
        found = np.asarray(self._items[name][places])
        unknown = self._item_ids[places] != item_ids
        if unknown.any():
            found = found.copy()
            found[unknown] = 0 if found.ndim == 1 else -1
        return found

    @property
    def transforms(self) -> Transforms:
        """What encodes."""
        return self._transforms

    @property
    def on(self) -> Mapping[str, str]:
        """The context features that counters are on, with their columns."""
        return self._on


class _Pasts:
    """The events of many requests, each one's own, as if each were a user."""

    def __init__(self, served: ServedFeatures, requests: Sequence[LoggedRequest], features: Columns) -> None:
        self._served, self._requests, self._features = served, requests, features
        records = [one.record for one in requests]
        lengths = [0 if one is None else len(one.item_ids) for one in records]
        self._num = len(requests)
        self._owner = np.repeat(np.arange(self._num), lengths)
        self._moment = np.array([one.time_ms for one in requests], np.int64)
        self._item_ids = _joined([one.item_ids for one in records if one is not None], np.int64)
        self._time_ms = _joined([one.time_ms for one in records if one is not None], np.int64)
        self._known_ms = _joined([one.known_ms for one in records if one is not None], np.int64)
        self._flags = _joined([one.flags for one in records if one is not None], np.uint32)
        self._same = {name: self._in_same(name, column) for name, column in served.on.items()}
        self._codes: dict[str, Array] = {}
        self._lines: dict[tuple[str, str, str], Timeline] = {}

    def made(self) -> dict[str, Array]:
        """Every history and every counter."""
        schema, who = self._served.transforms.schema, np.arange(self._num)
        made = {}
        for name, history in schema.histories().items():
            places, moments = self._happened(history.events)
            codes = self._codes_of(history.of)[places]
            line = Timeline.build(self._num, self._owner[places], moments, codes)
            made[name] = line.before(who, self._moment, history.length)
        for name, counter in schema.interaction.items():
            shown = self._line(Counter(on=counter.on if counter.last or counter.share else ""))
            made[name] = encode(counter, self._line(counter), shown, who, self._moment)
        return made

    def _line(self, counter: Counter) -> Timeline:
        key = (counter.count, counter.by, counter.on)
        if key not in self._lines:
            places, moments = self._happened(counter.count, counter.on)
            codes = self._codes_of(counter.by)[places] if counter.by else None
            # the owner is not a place of `Pairs`: what is on another value is left out above
            self._lines[key] = counted(counter, self._num, self._owner[places], moments, codes)
        return self._lines[key]

    def _happened(self, event: str, on: str = "") -> tuple[Array, Array]:
        """The places of the events of one kind, and when each became known."""
        if event == IMPRESSION:
            having, times = (self._flags & EXPOSED) != 0, self._time_ms
        else:
            bits = np.array([one.labels.index(event) for one in self._requests], np.uint32)
            having, times = (self._flags >> bits[self._owner] & np.uint32(1)) != 0, self._known_ms
        places = np.flatnonzero(having & self._same[on] if on else having)
        return places, times[places]

    def _in_same(self, name: str, column: str) -> Array:
        """bool [E]: the events with the value of `column` that their own request has, none where it is not known."""
        found = []
        for one, code in zip(self._requests, self._features[name].tolist(), strict=True):
            if one.record is not None:
                values = one.record.contexts[:, one.context_columns.index(column)]
                is_known = code > 0
                found.append(values == digest(one.context[column]) if is_known else np.zeros(len(values), bool))
        return _joined(found, bool)

    def _codes_of(self, name: str) -> Array:
        if name not in self._codes:
            self._codes[name] = self._served.codes(name, self._item_ids)
        return self._codes[name]


def _joined(parts: Sequence[Array], kind: type) -> Array:
    return np.concatenate(parts) if parts else np.zeros(0, kind)
