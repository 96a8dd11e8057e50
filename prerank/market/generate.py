"""A simulated ad market: writes the tables a user would bring, and beside them the truth no user has.

`generate_market` gives users, ads and impressions of any size from 100 to 20 million ads; `MarketTruth` answers, for
any pair of them, the true probability of a click. `docs/market.md` says what is in it and where each number comes from.
It does not know how the tables are read or learned from.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prerank.errors import DataError
from prerank.market import marginals as m
from prerank.market.log import LoggedRows, MarketLog
from prerank.market.spec import resolve_spec
from prerank.market.tables import (
    IMPRESSIONS_SCHEMA,
    ITEMS_SCHEMA,
    ROW_GROUP,
    TRUTH_SCHEMA,
    USERS_SCHEMA,
    impression_batch,
    item_batch,
    truth_batch,
    user_batch,
)
from prerank.market.truth import MarketTruth, best_rank_error

__all__ = ["MarketSummary", "MarketTruth", "best_rank_error", "generate_market"]

Progress = Callable[[str, float], None]

_TABLES: Final = {
    "users.parquet": USERS_SCHEMA,
    "items.parquet": ITEMS_SCHEMA,
    "impressions.parquet": IMPRESSIONS_SCHEMA,
    "truth.parquet": TRUTH_SCHEMA,
}
_RECORD: Final = "market.json"


@dataclass(frozen=True, slots=True)
class MarketSummary:
    """What was written: sizes, and the marginals that came out."""

    out: Path
    num_users: int
    num_ads: int
    num_campaigns: int
    num_advertisers: int
    num_requests: int
    num_impressions: int
    num_clicks: int
    num_conversions: int
    click_rate: dict[str, float]  # by surface
    spend_micros: int
    active_campaign_days: int  # with at least one click
    exhausted_campaign_days: int  # whose budget ran out


def generate_market(
    out: Path,
    *,
    num_ads: int,
    seed: int = 7,
    num_users: int | None = None,
    num_impressions: int | None = None,
    days: int = 10,
    first_day: str = "2026-01-05",
    progress: Progress | None = None,
) -> MarketSummary:
    """Write a market of `num_ads` ads into the folder `out` and say what is in it.

    Writes `users.parquet`, `items.parquet`, `impressions.parquet` (in order of `time_ms`), `truth.parquet` (row by row
    the true probabilities of the impressions; never for a learner) and `market.json`, in row groups of at most 100,000
    rows. The same arguments give the same tables. `days` are UTC days from `first_day` (YYYY-MM-DD). By default there
    are 600,000 * (num_ads / 100,000) ** 0.25 impressions and one user per 30 of them; the impressions are fewer than
    asked only where budgets and targeting leave nothing to show. `progress` is called with a table's name and the
    fraction of it done.

    Each file gets its name only when all are whole, `market.json` last; a market that was in `out` is replaced.
    Raises DataError for an argument out of range or where `out` cannot be a folder.
    """
    spec = resolve_spec(num_ads, seed, num_users, num_impressions, days, first_day)
    report = progress or _silent
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise DataError(f"{out} must be a folder to write a market into, and a file is in the way: {error}") from error
    truth = MarketTruth(spec)
    with _all_or_nothing(out) as tables:
        _write_users(truth, tables["users.parquet"], report)
        _write_items(truth, tables["items.parquet"], report)
        summary = _write_log(truth, tables["impressions.parquet"], tables["truth.parquet"], report, out)
        (out / _partial(_RECORD)).write_text(_record(truth, summary), encoding="utf-8")
    return summary


class _Table:
    """One Parquet file that grows by batches of any size; written in whole row groups."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        # Dictionaries of numbers that rarely repeat cost time and save nothing.
        words = [field.name for field in schema if pa.types.is_string(field.type) and field.name != "landing_url"]
        self._writer = pq.ParquetWriter(path, schema, compression="zstd", compression_level=1, use_dictionary=words)
        self._waiting: list[pa.RecordBatch] = []
        self._num_waiting = 0
        self._schema = schema

    def append(self, batch: pa.RecordBatch) -> None:
        self._waiting.append(batch)
        self._num_waiting += len(batch)
        if self._num_waiting >= ROW_GROUP:
            table = pa.Table.from_batches(self._waiting, self._schema)
            whole = len(table) // ROW_GROUP * ROW_GROUP
            self._writer.write_table(table.slice(0, whole), row_group_size=ROW_GROUP)
            self._waiting = table.slice(whole).combine_chunks().to_batches()
            self._num_waiting = len(table) - whole

    def close(self) -> None:
        if self._waiting:
            self._writer.write_table(pa.Table.from_batches(self._waiting, self._schema), row_group_size=ROW_GROUP)
            self._waiting = []
        self._writer.close()


@contextmanager
def _all_or_nothing(out: Path) -> Iterator[dict[str, _Table]]:
    """The tables under partial names; renamed when the block ends well, removed when it does not."""
    names = [*_TABLES, _RECORD]
    tables: dict[str, _Table] = {}
    try:
        for name, schema in _TABLES.items():
            tables[name] = _Table(out / _partial(name), schema)
        yield tables
        for table in tables.values():
            table.close()
        # Without its record an old market counts as absent, so no moment shows a mixture of two.
        (out / _RECORD).unlink(missing_ok=True)
        for name in names:
            os.replace(out / _partial(name), out / name)
    finally:
        for name in names:
            (out / _partial(name)).unlink(missing_ok=True)


def _write_users(truth: MarketTruth, table: _Table, report: Progress) -> None:
    for first in range(0, truth.spec.num_users, ROW_GROUP):
        last = min(first + ROW_GROUP, truth.spec.num_users)
        table.append(user_batch(truth, np.arange(first, last)))
        report("users", last / truth.spec.num_users)


def _write_items(truth: MarketTruth, table: _Table, report: Progress) -> None:
    for first in range(0, truth.spec.num_ads, ROW_GROUP):
        last = min(first + ROW_GROUP, truth.spec.num_ads)
        table.append(item_batch(truth, np.arange(first, last)))
        report("items", last / truth.spec.num_ads)


def _write_log(truth: MarketTruth, impressions: _Table, truths: _Table, report: Progress, out: Path) -> MarketSummary:
    log = MarketLog(truth)
    count = _Counts()
    for rows in log.hours():
        impressions.append(impression_batch(rows, count.rows))
        truths.append(truth_batch(rows, count.rows))
        count.add(rows)
        report("impressions", min(1.0, count.rows / truth.spec.num_impressions))
    return MarketSummary(
        out=out,
        num_users=truth.spec.num_users,
        num_ads=truth.spec.num_ads,
        num_campaigns=len(truth.ads.campaigns.log_bid),
        num_advertisers=truth.spec.num_advertisers,
        num_requests=log.num_requests,
        num_impressions=count.rows,
        num_clicks=int(count.clicks.sum()),
        num_conversions=count.conversions,
        click_rate=dict(zip(m.SURFACES, (count.clicks / np.maximum(count.shown, 1)).tolist(), strict=True)),
        spend_micros=count.spend_micros,
        active_campaign_days=log.active_campaign_days,
        exhausted_campaign_days=log.exhausted_campaign_days,
    )


class _Counts:
    """Running sums over the hours."""

    def __init__(self) -> None:
        self.rows = self.conversions = self.spend_micros = 0
        self.shown = np.zeros(len(m.SURFACES), np.int64)
        self.clicks = np.zeros(len(m.SURFACES), np.int64)

    def add(self, rows: LoggedRows) -> None:
        self.rows += len(rows)
        self.conversions += int(rows.is_conversion.sum())
        self.spend_micros += int(rows.bid_micros[rows.is_click].sum())
        self.shown += np.bincount(rows.surface, minlength=len(m.SURFACES))
        self.clicks += np.bincount(rows.surface[rows.is_click], minlength=len(m.SURFACES))


def _record(truth: MarketTruth, summary: MarketSummary) -> str:
    result = asdict(summary)
    del result["out"]
    record = {
        "generator_version": m.GENERATOR_VERSION,
        "arguments": asdict(truth.spec),
        "result": result,
        "probes": truth.probes(),
    }
    return json.dumps(record, indent=2) + "\n"


def _partial(name: str) -> str:
    return f".{name}.partial"


def _silent(table: str, fraction: float) -> None:
    pass
