"""Days of one time zone: where each begins in UTC milliseconds, and which day a moment is in.

Reading by day and naming the day of a row use the same table of midnights, so they cannot disagree, also where a
clock changes. Zones come from `zoneinfo`, hence from the tzdata package where the system has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, datetime, timedelta
from functools import lru_cache
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa

from prerank.types import Array, day_number

FIRST_MS = 631_152_000_000
"""1990-01-01 UTC: a log's earliest plausible moment."""
LAST_MS = 4_102_444_800_000
"""2100-01-01 UTC: past a log's last plausible moment."""

_FIRST_DAY, _LAST_DAY = date(1970, 1, 1), date(2100, 12, 31)
_EPOCH = date(1970, 1, 1)


@lru_cache(maxsize=4)
def _midnights(timezone: str) -> Array:
    """UTC ms of each local midnight from 1970 to 2100, int64 [days], ascending."""
    zone = ZoneInfo(timezone)
    num_days = (_LAST_DAY - _FIRST_DAY).days + 1
    days = (_FIRST_DAY + timedelta(days=n) for n in range(num_days))
    starts = np.fromiter((int(datetime(d.year, d.month, d.day, tzinfo=zone).timestamp()) for d in days), np.int64)
    starts *= 1000
    return starts


def day_numbers(time_ms: Array, timezone: str) -> Array:
    """Days since 1970-01-01 in `timezone` of each moment, int32 [rows], from UTC ms int64 [rows].

    Moments before 1970 are day -1 and moments after 2100 its last: `prerank check` names both.
    """
    numbers: Array = (np.searchsorted(_midnights(timezone), time_ms, side="right") - 1).astype(np.int32)
    return numbers


def spans(days: Sequence[str], timezone: str) -> list[tuple[int, int]]:
    """UTC ms [first, past the last) of each run of neighbouring ISO days, ascending."""
    starts = _midnights(timezone)
    found: list[tuple[int, int]] = []
    for number in sorted({day_number(d) for d in days}):
        begin, end = int(starts[number]), int(starts[number + 1])
        if found and found[-1][1] == begin:
            begin, _ = found.pop()
        found.append((begin, end))
    return found


def day_column(time_ms: pa.Array, timezone: str) -> pa.Array:
    """`day_numbers` of an Arrow integer column; null where the moment is null."""
    missing = time_ms.is_null().to_numpy(zero_copy_only=False)
    moments = time_ms.cast(pa.int64()).fill_null(0).to_numpy(zero_copy_only=False)
    return pa.array(day_numbers(moments, timezone), mask=missing)


def iso_day(number: int) -> str:
    """ "YYYY-MM-DD" of a day number."""
    return (_EPOCH + timedelta(days=number)).isoformat()
