"""Which days a retrain is of: those of the funnel file, moved so that validate ends with the newest complete day.

A day is complete where the log goes on after it, or into its last hour. Lengths and gaps stay; the test days come to
lie after the log, so what a retrain says of quality is what its gates measured on the validate days.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import date, timedelta

import numpy as np
import pyarrow.compute as pc

from prerank.config import Config
from prerank.data.calendar import day_numbers, iso_day, spans
from prerank.data.logs import Tables
from prerank.errors import ConfigError, DataError

_HOUR_MS = 3_600_000


def newest_complete_day(config: Config, tables: Tables) -> str:
    """The ISO day. Raises DataError where the log has no row, or where that day is before the funnel file's own."""
    latest: int | None = None
    for batch in tables.impressions([config.data.time]):
        found = pc.max(batch.column(config.data.time)).as_py()
        latest = found if latest is None else max(latest, found or latest)
    if latest is None:
        raise DataError("the impressions table has no rows; check [data].impressions")
    day = _day_of(latest, config.data.timezone)
    (_, end), *_ = spans([day], config.data.timezone)
    if latest < end - _HOUR_MS:
        day = (date.fromisoformat(day) - timedelta(days=1)).isoformat()
    last = config.data.validate[1]
    if day < last:
        raise DataError(
            f"the newest complete day of the log is {day}, and [data].validate ends on {last}: there is nothing newer "
            "to train for; bring the log up to date, or name earlier days in the funnel file"
        )
    return day


def moved(config: Config, day: str) -> Config:
    """The same funnel with train, validate and test moved by as many days, so that validate ends with the ISO `day`.

    Raises ConfigError for what is no ISO day.
    """
    try:
        date.fromisoformat(day)
    except ValueError:
        raise ConfigError(f"expected a day such as {config.data.validate[1]}, got {day!r}") from None
    later = date.fromisoformat(day) - date.fromisoformat(config.data.validate[1])
    train, validate, test = (
        _later(days, later) for days in (config.data.train, config.data.validate, config.data.test)
    )
    return replace(config, data=replace(config.data, train=train, validate=validate, test=test))


def _later(days: tuple[str, str], by: timedelta) -> tuple[str, str]:
    first, last = ((date.fromisoformat(day) + by).isoformat() for day in days)
    return first, last


def _day_of(time_ms: int, timezone: str) -> str:
    return iso_day(int(day_numbers(np.array([time_ms]), timezone)[0]))
