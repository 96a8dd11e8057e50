"""What happened, as a caller says it: what an event must be, for every way in, and what is told of those taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from prerank._toml import nearest
from prerank.errors import RequestError
from prerank.features.reading import shown
from prerank.features.transforms import Transforms
from prerank.serve.answer import INT64, LAST_TIME_MS
from prerank.stores.events import LiveEvent

MOST_EVENTS = 1_000
"""The most events of one call."""
LONGEST_EVENT_ID = 128
AHEAD_MS = 60_000
"""How far before our clock a caller's may be."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """The events of one call, all of them taken: `accepted`, and how many of those are which.

    `unknown_items` are of items that this version does not have; the next one may. `repeated` came before, by their
    event_id, and `already_logged` are no later than the last exposure of the log: neither is counted a second time.
    """

    accepted: int
    unknown_items: int
    repeated: int
    already_logged: int


def check_events(events: Sequence[LiveEvent], names: Sequence[str], now_ms: int) -> None:
    """Raises RequestError naming the first event's field that is wrong, what it must be, and what came."""
    if not 1 <= len(events) <= MOST_EVENTS:
        raise RequestError(f"events: expected 1 to {MOST_EVENTS:,} of them, got {len(events):,}; send more calls")
    known = set(names)
    for at, one in enumerate(events):
        if one.event not in known:
            _wrong(at, "event", f"one of {list(names)}", f"{one.event!r}{nearest(one.event, names)}")
        for field, value in (("user_id", one.user_id), ("item_id", one.item_id)):
            if value not in INT64:
                _wrong(at, field, "an int64", value)
        if not 0 <= one.time_ms <= LAST_TIME_MS:
            _wrong(at, "time_ms", f"UTC milliseconds since 1970, 0 to {LAST_TIME_MS}", one.time_ms)
        if one.time_ms > now_ms + AHEAD_MS:
            _wrong(at, "time_ms", f"at most a minute after now, {now_ms} by the clock of the server", one.time_ms)
        if len(one.event_id) > LONGEST_EVENT_ID:
            _wrong(at, "event_id", f"at most {LONGEST_EVENT_ID} characters", f"{len(one.event_id)}")


def check_contexts(
    events: Sequence[LiveEvent], transforms: Transforms, kept: Sequence[str], targeted: Sequence[str] = ()
) -> None:
    """Raises RequestError naming the first event's context field that is wrong, what it must be, and what came.

    The fields are the version's context columns, those `targeted` too; of `kept`, which the store has, the values are
    checked as well.
    """
    columns = transforms.schema.columns("context")
    known = list(dict.fromkeys([*columns, *kept, *targeted]))
    missing = dict.fromkeys(columns)
    right: set[tuple[str, object, type]] = set()
    for at, one in enumerate(events):
        for column, value in one.context.items():
            if column not in known:
                _wrong(at, "context", f"fields of {known}", f"{column!r}{nearest(column, known)}")
            if column not in kept:
                continue
            if not isinstance(value, str | int | None):
                _wrong(at, f"context.{column}", "an integer, text, true or false, or null", shown(value))
            if (column, value, type(value)) in right:
                continue
            try:
                transforms.encode_row("context", {**missing, column: value})
            except RequestError as error:
                raise RequestError(f"events[{at}].{error}") from None
            right.add((column, value, type(value)))


def _wrong(at: int, field: str, expected: str, came: object) -> NoReturn:
    raise RequestError(f"events[{at}].{field}: expected {expected}, got {came}")
