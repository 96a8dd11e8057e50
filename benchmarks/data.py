"""What do checking, streaming and encoding the data cost, in seconds and in memory?

A made-up log of 5M rows in ten files, one a day; KuaiRand-Pure where it is there; a million items; one request's row;
a million histories of 50 events.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import date, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.machine import REPOSITORY, in_own_process, say, times_ms
from benchmarks.result import Row
from benchmarks.run import Measured, Options, run
from prerank.config import Config, load_config, parse_config
from prerank.data.check import check
from prerank.data.logs import open_tables
from prerank.features.histories import Timeline
from prerank.features.transforms import Transforms
from prerank.schema import Bag, Category, Embedding, FeatureSchema, Number, Value
from prerank.types import Array

FULL, QUICK = 1, 10  # the quick version is this many times smaller
LOG_ROWS, NUM_USERS, NUM_ITEMS, NUM_DAYS = 5_000_000, 200_000, 100_000, 10
ENCODED_ITEMS, NUM_MOMENTS, NUM_EVENTS, LENGTH = 1_000_000, 1_000_000, 5_000_000, 50
NAIVE_MOMENTS = 20_000
FIRST_DAY, DAY_MS = date(2026, 1, 5), 86_400_000
STREAMED = ["user_id", "item_id", "time_ms", "is_click"]
SEED = 7


def measure(options: Options, ceilings: Mapping[str, float]) -> Measured:
    smaller = QUICK if options.quick else FULL
    rows: list[Row] = []
    with TemporaryDirectory() as name:
        folder = Path(name)
        rows += _log_rows(folder, LOG_ROWS // smaller)
        rows += _kuairand_rows(options.data, folder)
    say("data: encoding items, rows and histories")
    rows += _item_rows(ENCODED_ITEMS // smaller)
    rows += _request_rows(5_000)
    rows += _history_rows(NUM_MOMENTS // smaller, NUM_EVENTS // smaller)
    # the histories' arithmetic at best: every event gathered is read once and written once
    copied = 2 * 4 * LENGTH * (NUM_MOMENTS // smaller) / ceilings["copy_gb_s"] / 1e6
    config = {"log_rows": LOG_ROWS // smaller, "users": NUM_USERS, "items": NUM_ITEMS, "days": NUM_DAYS, "seed": SEED}
    return Measured(rows, config, {"histories_copied_ms": round(copied, 2)})


# the log


def _log_rows(folder: Path, num_rows: int) -> Iterator[Row]:
    say(f"data: writing a log of {num_rows:,} rows")
    _write_log(folder, num_rows)
    say("data: streaming and checking it, each in a process of its own")
    whole = in_own_process(_read_whole, folder, repeats=3)
    stream = in_own_process(_stream, folder, NUM_DAYS, repeats=3)
    one_day = in_own_process(_stream, folder, 1, repeats=3)
    checked = in_own_process(_check, folder)
    against = "pyarrow, all at once"
    yield Row.of("stream four columns", stream.seconds, "s", stream.made, against, stream.seconds / whole.seconds)
    above, theirs = stream.above_imports_mib, whole.above_imports_mib
    yield Row.of("stream four columns: memory above imports", above, "MiB", stream.made, against, above / theirs)
    yield Row.of("read four columns, pyarrow, all at once", whole.seconds, "s", whole.made)
    yield Row.of("read four columns, pyarrow, all at once: memory above imports", theirs, "MiB", whole.made)
    yield Row.of("stream one day of ten", one_day.seconds, "s", one_day.made)
    yield Row.of("check", checked.seconds, "s", num_rows)
    yield Row.of("check: memory above imports", checked.above_imports_mib, "MiB", num_rows)
    yield Row.of("check: problems in a sound log", checked.made, "problems", num_rows)


def _stream(folder: Path, days: int) -> int:
    config = _config()
    wanted = None if days == NUM_DAYS else _days()[:days]
    tables = open_tables(config, folder, folder)
    return sum(batch.num_rows for batch in tables.impressions(STREAMED, wanted))


def _read_whole(folder: Path) -> int:
    files = sorted(folder.glob("impressions-*.parquet"))
    return sum(table.num_rows for table in [pq.read_table(f, columns=STREAMED) for f in files])


def _check(folder: Path) -> int:
    config = _config()
    return len(check(config, open_tables(config, folder, folder)))


def _days() -> list[str]:
    return [(FIRST_DAY + timedelta(days=n)).isoformat() for n in range(NUM_DAYS)]


def _config() -> Config:
    days = _days()
    plain = {
        "name": "made_up",
        "data": {
            "impressions": "impressions-*.parquet",
            "items": "items.parquet",
            "users": "users.parquet",
            "train": [days[0], days[-3]],
            "validate": [days[-2], days[-2]],
            "test": [days[-1], days[-1]],
        },
        "features": {
            "user": {
                "age": {"kind": "number"},
                "country": {"kind": "category"},
                "clicked": {"kind": "history", "of": "item_id", "events": "is_click"},
            },
            "context": {"surface": {"kind": "category"}, "hour": {"kind": "category"}},
            "item": {
                "item_id": {"kind": "category"},
                "advertiser": {"kind": "category"},
                "bid_micros": {"kind": "value"},
            },
        },
        "tasks": {"click": {"label": "is_click"}},
        "retrieval": {"relevant": "is_click", "targets": {"is_click": 1.0}},
        "utility": {"click": {"value": "bid_micros"}},
    }
    return parse_config(plain, "the benchmark's funnel")


def _write_log(folder: Path, num_rows: int) -> None:
    """Users, items, and one file of impressions a day, in row groups of 100,000 as docs/data.md advises."""
    draw = np.random.default_rng(SEED)
    country = _text(draw, NUM_USERS, 50)
    users = pa.table({"user_id": np.arange(NUM_USERS), "age": draw.uniform(18, 80, NUM_USERS), "country": country})
    pq.write_table(users, folder / "users.parquet")
    advertiser, bid = draw.integers(7_000, size=NUM_ITEMS), draw.integers(10**6, size=NUM_ITEMS)
    items = pa.table({"item_id": np.arange(NUM_ITEMS), "advertiser": advertiser, "bid_micros": bid})
    pq.write_table(items, folder / "items.parquet")
    start_ms = (FIRST_DAY - date(1970, 1, 1)).days * DAY_MS
    for day in range(NUM_DAYS):
        log = _one_day(draw, num_rows // NUM_DAYS, start_ms + day * DAY_MS)
        pq.write_table(log, folder / f"impressions-{day}.parquet", row_group_size=100_000)


def _one_day(draw: np.random.Generator, n: int, start_ms: int) -> pa.Table:
    time_ms = start_ms + np.sort(draw.integers(DAY_MS, size=n))
    columns = {
        "user_id": draw.integers(NUM_USERS, size=n),
        "item_id": draw.integers(NUM_ITEMS, size=n),
        "time_ms": time_ms,
        "is_click": (draw.random(n) < 0.03).astype(np.int8),
        "surface": _text(draw, n, 4),
        "hour": (time_ms // 3_600_000 % 24).astype(np.int8),
        "position": draw.integers(4, size=n).astype(np.int8),
        "bid_micros": draw.integers(10**6, size=n),
    }
    return pa.table(columns)


def _text(draw: np.random.Generator, n: int, names: int) -> pa.Array:
    """A string column of that many different names."""
    codes = pa.array(draw.integers(names, size=n).astype(np.int32))
    words = pa.array([f"name-{k:06d}" for k in range(names)])
    return pa.DictionaryArray.from_arrays(codes, words).cast(pa.string())


# KuaiRand-Pure


def _kuairand_rows(data: Path | None, folder: Path) -> Iterator[Row]:
    if data is None:
        yield Row.skipped("KuaiRand: tables made and checked", "no folder of it; name one by --data or PRERANK_DATA")
        return
    say("data: KuaiRand-Pure")
    config = load_config(REPOSITORY / "examples" / "kuairand" / "funnel.toml")
    started = perf_counter()
    tables = open_tables(config, data, folder / "kuairand")
    made = perf_counter() - started
    n = sum(batch.num_rows for batch in tables.impressions([config.data.time]))
    started = perf_counter()
    errors = sum(problem.severity == "error" for problem in check(config, tables))
    yield Row.of("KuaiRand: tables made", made, "s", n)
    yield Row.of("KuaiRand: check", perf_counter() - started, "s", n)
    yield Row.of("KuaiRand: errors found", errors, "errors", n)


# features

ITEM_FEATURES = FeatureSchema(
    item={
        "item_id": Category(dim=32),
        "advertiser": Category(),
        "campaign": Category(hash=10_000),
        "category": Category(),
        "brand": Category(min_count=2),
        "title": Category(hash=100_000),
        "landing": Category(),
        "tags": Bag(length=4),
        "price": Number(log=True),
        "quality": Number(),
        "vector": Embedding(width=32),
        "bid_micros": Value(),
    }
)


def _item_rows(num_items: int) -> Iterator[Row]:
    items = _items(num_items)
    nothing = pa.table({}), np.zeros(0, np.int64)
    once = items, np.ones(num_items, np.int64)
    started = perf_counter()
    transforms = Transforms.fit(ITEM_FEATURES, users=nothing, items=once, context=())
    fitting = perf_counter() - started
    times = times_ms(lambda: transforms.encode("item", items), 3)
    yield Row.of("fit 12 item features", fitting, "s", num_items)
    yield Row.of("encode 12 item features", float(np.median(times)) / 1000, "s", num_items)


def _items(n: int) -> pa.Table:
    draw = np.random.default_rng(SEED)
    vector = pa.FixedSizeListArray.from_arrays(pa.array(draw.random(n * 32, dtype=np.float32)), 32)
    tags = pa.ListArray.from_arrays(
        pa.array(np.arange(n + 1, dtype=np.int32) * 3), pa.array(draw.integers(500, size=3 * n))
    )
    return pa.table(
        {
            "item_id": draw.permutation(n) * 7919,
            "advertiser": draw.integers(n // 14, size=n),
            "campaign": draw.integers(n // 5, size=n),
            "category": draw.integers(64, size=n),
            "brand": _text(draw, n, 5_000),
            "title": _text(draw, n, 50_000),
            "landing": _text(draw, n, 20_000),
            "tags": tags,
            "price": draw.lognormal(3, 1, n),
            "quality": draw.normal(size=n),
            "vector": vector,
            "bid_micros": draw.integers(10**7, size=n),
        }
    )


def _request_rows(calls: int) -> Iterator[Row]:
    """20 user and 3 context features of one request, against the same by a table of one row."""
    user = {f"name{k}": Category() for k in range(15)} | {f"number{k}": Number(log=k % 2 == 0) for k in range(5)}
    schema = FeatureSchema(user=user, context={"surface": Category(), "hour": Category(), "battery": Number()})
    draw = np.random.default_rng(SEED)
    n = 10_000
    users = pa.table({c: _text(draw, n, 100) if c.startswith("name") else draw.lognormal(2, 1, n) for c in user})
    context = pa.table({"surface": _text(draw, n, 4), "hour": draw.integers(24, size=n), "battery": draw.random(n)})
    nothing = pa.table({}), np.zeros(0, np.int64)
    transforms = Transforms.fit(schema, users=(users, np.ones(n, np.int64)), items=nothing, context=[context])
    person, moment = users.slice(17, 1).to_pylist()[0], context.slice(17, 1).to_pylist()[0]

    def by_row() -> None:
        transforms.encode_row("user", person)
        transforms.encode_row("context", moment)

    def by_table() -> None:
        transforms.encode("user", pa.Table.from_pylist([person]))
        transforms.encode("context", pa.Table.from_pylist([moment]))

    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(10):  # interleaved, so that both see the same machine
        ours += times_ms(by_row, calls // 10, warm_up=20)
        theirs += times_ms(by_table, calls // 100, warm_up=2)
    ratio = float(np.median(ours) / np.median(theirs))
    yield Row.timed("encode_row, 20 user and 3 context features", ours, 1, "a table of one row", ratio)
    yield Row.timed("encode a table of one row, the same features", theirs, 1)


def _history_rows(num_moments: int, num_events: int) -> Iterator[Row]:
    """Against a loop over moments, timed on some of them and scaled up."""
    draw = np.random.default_rng(SEED)
    user = np.sort(draw.integers(NUM_USERS, size=num_events))
    event_ms = draw.integers(NUM_DAYS * DAY_MS, size=num_events)
    built = times_ms(lambda: Timeline.build(NUM_USERS, user, event_ms, user), 1, warm_up=0)
    timeline = Timeline.build(NUM_USERS, user, event_ms, draw.integers(NUM_ITEMS, size=num_events))
    who = draw.integers(NUM_USERS, size=num_moments)
    when = draw.integers(NUM_DAYS * DAY_MS, size=num_moments)
    times = times_ms(lambda: timeline.before(who, when, LENGTH), 5)
    few = min(NAIVE_MOMENTS, num_moments)
    naive_ms = min(times_ms(lambda: _naive_before(timeline, who[:few], when[:few]), 2)) * num_moments / few
    yield Row.of("build a timeline", built[0] / 1000, "s", num_events)
    ratio = float(np.median(times)) / naive_ms
    yield Row.timed(f"histories of {LENGTH} events", times, num_moments, "a loop over moments in Python", ratio)


def _naive_before(timeline: Timeline, user: Array, time_ms: Array) -> Array:
    out = np.full((len(user), LENGTH), -1, np.int32)
    for k, (u, moment) in enumerate(zip(user, time_ms, strict=True)):
        start, stop = timeline.offsets[u], timeline.offsets[u + 1]
        end = start + np.searchsorted(timeline.time_ms[start:stop], moment)
        values = timeline.values[max(start, end - LENGTH) : end]
        out[k, LENGTH - len(values) :] = values
    return out


if __name__ == "__main__":
    run("data", __doc__, measure)
