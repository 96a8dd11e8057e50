"""What an answer is, and what a request must be, for every way in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Annotated

import msgspec

from prerank.config import INDEX
from prerank.errors import RequestError
from prerank.serve.graph import StageReport
from prerank.types import Given, Request

INT64 = range(-(2**63), 2**63)
LAST_TIME_MS = 253_402_300_799_999
"""The end of the year 9999: a `time_ms` past it was not in milliseconds."""


_SAID = msgspec.Meta(extra_json_schema=msgspec.json.schema(dict[str, Given]))


class Winner(msgspec.Struct, frozen=True, gc=False, rename={"said": "metadata"}):
    """One item of an answer. Utility is in micros per impression; None is what a degraded answer did not compute.

    `found_by` are the generators that found it: "index", and those of [generators].
    """

    item_id: int
    utility_micros: float | None
    prob: Mapping[str, float | None]
    said: Annotated[msgspec.Raw, _SAID]  # a JSON object
    found_by: Sequence[str] = (INDEX,)

    @property
    def metadata(self) -> dict[str, Given]:
        """What is said of the item, by column; read of its JSON each time."""
        return _metadata.decode(self.said)


_metadata = msgspec.json.Decoder(dict[str, Given])


@dataclass(frozen=True, slots=True)
class Answer:
    """Winners, best first, from one version; what each stage took; and anything the caller should be told."""

    request_id: str
    version: str
    winners: Sequence[Winner]
    stages: Sequence[StageReport]
    degraded: bool
    notes: Sequence[str]


MOST_EXCLUDED = 10_000
"""The most items that one request may exclude."""


def check_request(request: Request, max_k: int) -> None:
    """Raises RequestError naming the first field out of its range, the range, and what came."""
    _within("user_id", request.user_id, "an int64", request.user_id in INT64)
    _within("k", request.k, f"1 to {max_k}", 1 <= request.k <= max_k)
    _within(
        "time_ms",
        request.time_ms,
        f"UTC milliseconds since 1970, 0 to {LAST_TIME_MS}",
        0 <= request.time_ms <= LAST_TIME_MS,
    )
    if request.deadline_ms is not None:
        holds = isfinite(request.deadline_ms) and request.deadline_ms > 0
        _within("deadline_ms", request.deadline_ms, "a finite number above 0", holds)
    fits = len(request.exclude) <= MOST_EXCLUDED
    _within("exclude", f"{len(request.exclude):,}", f"at most {MOST_EXCLUDED:,} item_ids", fits)
    for item_id in request.exclude:
        _within("exclude", item_id, "int64 item_ids", item_id in INT64)
    for name, given in request.context.items():
        for value in given if isinstance(given, list) else [given]:
            if isinstance(value, float):
                _within(f"context.{name}", value, "a finite number", isfinite(value))


def _within(field: str, value: object, expected: str, holds: bool) -> None:
    if not holds:
        raise RequestError(f"{field}: expected {expected}, got {value}")
