import gzip
import os
from datetime import datetime
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prerank.config import parse_config
from prerank.data import logs, sources
from prerank.data.calendar import day_numbers, iso_day, spans
from prerank.data.logs import ADAPTERS, Adapter, find_tables, open_tables
from prerank.data.sources import Within, find
from prerank.errors import DataError
from prerank.types import day_number
from tests.data import world


def rows(batches):
    return [row for batch in batches for row in batch.to_pylist()]


def opened(folder, **data):
    return open_tables(world.config(**data), folder, folder / "work")


# days


@pytest.mark.parametrize(
    "zone", ["UTC", "Asia/Shanghai", "America/New_York", "America/Havana", "America/Sao_Paulo", "Asia/Kathmandu"]
)
def test_a_moments_day_is_what_its_zones_clock_shows(zone):
    moments = np.random.default_rng(0).integers(1_000_000_000_000, 1_700_000_000_000, 2000)
    shown = [datetime.fromtimestamp(t / 1000, ZoneInfo(zone)).date().isoformat() for t in moments.tolist()]
    assert [iso_day(n) for n in day_numbers(moments, zone).tolist()] == shown


def test_a_day_of_a_changing_clock_has_23_or_25_hours():
    (spring,) = spans(["2022-03-13"], "America/New_York")
    (autumn,) = spans(["2022-11-06"], "America/New_York")
    assert (spring[1] - spring[0], autumn[1] - autumn[0]) == (23 * 3_600_000, 25 * 3_600_000)


def test_neighbouring_days_are_one_span_and_others_are_not():
    found = spans(["2022-04-27", "2022-04-25", "2022-04-26", "2022-05-01"], "UTC")
    assert found == [
        (world.START_MS, world.START_MS + 3 * world.DAY_MS),
        (world.START_MS + 6 * world.DAY_MS, world.START_MS + 7 * world.DAY_MS),
    ]


def test_moments_outside_the_calendar_are_its_first_or_last_day():
    assert day_numbers(np.array([-1, 0, 10**15]), "UTC").tolist() == [-1, 0, day_number("2100-12-31")]


# the log


def test_the_log_streams_in_file_order_with_its_columns_and_the_day(tmp_path):
    tables = opened(world.write(tmp_path))
    batches = list(tables.impressions(["is_click", "user_id"]))
    assert {tuple(b.schema.names) for b in batches} == {("is_click", "user_id", "day")}
    assert {b.schema.field("day").type for b in batches} == {pa.int32()}
    expected = world.impressions().select(["is_click", "user_id"]).to_pylist()
    assert [{k: r[k] for k in ("is_click", "user_id")} for r in rows(batches)] == expected
    days = [r["day"] for r in rows(batches)]
    assert days == [day_number("2022-04-25") + n // 200 for n in range(600)]


def test_a_day_is_of_the_funnels_zone(tmp_path):
    tables = opened(world.write(tmp_path), timezone="Asia/Shanghai")
    only = rows(tables.impressions(["time_ms"], ["2022-04-25"]))
    assert len(only) == 134  # the 16 hours from 08:00 to midnight in Shanghai: 133 intervals of 7.2 minutes
    assert max(r["time_ms"] for r in only) < world.START_MS + 16 * 3_600_000


def test_no_batch_is_larger_than_asked_for(tmp_path):
    tables = opened(world.write(tmp_path, row_group=600))
    sizes = [b.num_rows for b in tables.impressions(["user_id"], batch_rows=64)]
    assert max(sizes) <= 64
    assert sum(sizes) == 600


def test_row_groups_of_other_days_are_not_read(tmp_path, monkeypatch):
    world.write(tmp_path, row_group=50)
    read = []
    original = pq.ParquetFile.iter_batches

    def counting(self, *args, **kwargs):
        read.extend(kwargs["row_groups"])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(sources.pq.ParquetFile, "iter_batches", counting)
    found = rows(opened(tmp_path).impressions(["user_id"], ["2022-04-26"]))
    assert (len(found), read) == (200, [4, 5, 6, 7])


def test_a_row_group_without_statistics_is_read(tmp_path):
    world.write(tmp_path)
    pq.write_table(world.impressions(), tmp_path / "impressions.parquet", write_statistics=False)
    assert len(rows(opened(tmp_path).impressions(["user_id"], ["2022-04-26", "2022-04-27"]))) == 400


def test_a_group_without_the_column_is_read(tmp_path):
    world.write(tmp_path)
    group = pq.ParquetFile(tmp_path / "users.parquet").metadata.row_group(0)
    assert Within("time_ms", [(0, 1)]).may_be_in(group)


def test_a_null_time_has_no_day_and_is_of_no_day(tmp_path):
    log = world.put_at(world.impressions(), "time_ms", 3, None)
    tables = opened(world.write(tmp_path, impressions=log))
    assert rows(tables.impressions(["user_id"]))[3]["day"] is None
    assert len(rows(tables.impressions(["user_id"], ["2022-04-25"]))) == 199


def test_no_days_is_no_rows(tmp_path):
    assert rows(opened(world.write(tmp_path)).impressions(["user_id"], [])) == []


def test_a_glob_is_one_table_in_the_order_of_names(tmp_path):
    world.write(tmp_path)
    log = world.impressions()
    (tmp_path / "impressions.parquet").unlink()
    for name, part in (("b", log.slice(200, 400)), ("a", log.slice(0, 200))):
        pq.write_table(part, tmp_path / f"impressions_{name}.parquet")
    assert [r["time_ms"] for r in rows(opened(tmp_path).impressions(["time_ms"]))] == log["time_ms"].to_pylist()


def test_files_of_wider_and_narrower_types_are_read_as_the_wider(tmp_path):
    world.write(tmp_path)
    log = world.impressions()
    pq.write_table(world.put(log, "user_id", log["user_id"].cast(pa.int16())), tmp_path / "impressions_0.parquet")
    assert {b.schema.field("user_id").type for b in opened(tmp_path).impressions(["user_id"])} == {pa.int64()}


def test_users_and_items_come_whole(tmp_path):
    tables = opened(world.write(tmp_path))
    assert tables.users().equals(world.users())
    assert tables.items(["item_id", "tags"]).equals(world.items().select(["item_id", "tags"]))


def test_a_missing_column_names_the_nearest(tmp_path):
    tables = opened(world.write(tmp_path))
    with pytest.raises(
        DataError, match=r"impressions: no column 'surfaces'; did you mean \"surface\"\?; it has user_id"
    ):
        list(tables.impressions(["surfaces"]))


def test_a_log_column_named_day_is_refused(tmp_path):
    tables = opened(world.write(tmp_path, impressions=world.put(world.impressions(), "day", [1] * 600)))
    with pytest.raises(DataError, match=r"impressions\.day: prerank computes this name from the time; rename"):
        list(tables.impressions(["day"]))


@pytest.mark.parametrize("days", [None, ["2022-04-25"]])
def test_a_time_that_is_not_integer_is_refused(tmp_path, days):
    log = world.impressions()
    log = world.put(log, "time_ms", log["time_ms"].cast(pa.timestamp("ms")))
    tables = opened(world.write(tmp_path, impressions=log))
    with pytest.raises(DataError, match=r"impressions\.time_ms: expected integer milliseconds \(UTC\), got timestamp"):
        list(tables.impressions(["user_id"], days))


def test_a_missing_time_column_is_refused(tmp_path):
    tables = opened(world.write(tmp_path), time="time")
    with pytest.raises(DataError, match=r"no time column 'time'; did you mean \"time_ms\"\?; set \[data\]\.time"):
        list(tables.impressions(["user_id"]))


# history


def history() -> pa.Table:
    return pa.table({"user_id": [1, 1], "item_id": [2, 3], "time_ms": [world.START_MS - 2, world.START_MS - 1]})


def test_a_label_the_history_does_not_have_is_null_of_the_logs_type(tmp_path):
    tables = opened(world.write(tmp_path, history=history()), history="history.parquet")
    (batch,) = tables.history(["user_id", "item_id", "time_ms", "is_click"])
    assert batch.schema.field("is_click").type == pa.int8()
    assert batch.column("is_click").to_pylist() == [None, None]
    assert batch.column("day").to_pylist() == [day_number("2022-04-24")] * 2


def test_history_columns_have_the_logs_types(tmp_path):
    older = world.put(history(), "is_click", pa.array([0, 1], pa.int64()))
    tables = opened(world.write(tmp_path, history=older), history="history.parquet")
    (batch,) = tables.history(["is_click"])
    assert batch.column("is_click").type == pa.int8()
    assert batch.column("is_click").to_pylist() == [0, 1]


def test_no_history_is_no_events(tmp_path):
    assert list(opened(world.write(tmp_path)).history(["user_id"])) == []


def test_a_history_without_a_key_is_refused(tmp_path):
    tables = opened(world.write(tmp_path, history=history().drop("item_id")), history="history.parquet")
    with pytest.raises(DataError, match="history: no column 'item_id'"):
        list(tables.history(["user_id", "item_id"]))


def test_a_history_value_that_does_not_fit_the_log_is_refused(tmp_path):
    older = world.put(history(), "is_click", pa.array([0, 1000], pa.int64()))
    tables = opened(world.write(tmp_path, history=older), history="history.parquet")
    with pytest.raises(DataError, match=r"history\.is_click: expected the log's type, int8"):
        list(tables.history(["is_click"]))


# CSV


def test_csv_and_parquet_are_the_same_log(tmp_path):
    world.write(tmp_path)
    world.write_csv(tmp_path, "log", world.impressions())
    columns = ["user_id", "time_ms", "is_click", "surface", "slot"]
    from_csv = rows(opened(tmp_path, impressions="log.csv").impressions(columns, ["2022-04-26"]))
    assert from_csv == rows(opened(tmp_path).impressions(columns, ["2022-04-26"]))
    (tmp_path / "log.csv.gz").write_bytes(gzip.compress((tmp_path / "log.csv").read_bytes()))
    assert rows(opened(tmp_path, impressions="log.csv.gz").impressions(columns, ["2022-04-26"])) == from_csv


def test_csv_types_are_inferred_and_dates_and_countries_stay_text(tmp_path):
    (tmp_path / "t.csv").write_text(
        "id,when,country,price,flag,none\n1,2022-01-01,NA,,true,\n2,2022-01-02,,2.5,false,\n"
    )
    source = find("users", "t.csv", tmp_path)
    expected = ["int64", "string", "string", "double", "bool", "string"]
    assert [str(f.type) for f in source.schema] == expected
    assert source.table(["country", "price"], 10).to_pylist() == [
        {"country": "NA", "price": None},
        {"country": None, "price": 2.5},
    ]


def test_a_bag_with_a_separator_stays_text_in_csv(tmp_path):
    world.write(tmp_path)
    (tmp_path / "items.csv").write_text("item_id,tags\n1,12\n2,7\n")
    plain = world.plain(items="items.csv")
    plain["features"]["item"] = {"tags": {"kind": "bag", "separator": "|"}}
    plain["utility"] = {"click": {"value": 1.0}}
    tables = open_tables(parse_config(plain, "tiny.toml"), tmp_path, tmp_path / "work")
    assert tables.items().column("tags").to_pylist() == ["12", "7"]


def test_a_csv_value_against_its_inferred_type_is_refused_with_the_types(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CSV_BLOCK", 64)
    (tmp_path / "t.csv").write_text("id\n" + "1\n" * 100 + "one\n")
    source = find("users", "t.csv", tmp_path)
    with pytest.raises(
        DataError, match=r"(?s)users: .*t\.csv cannot be read on: .*'one'.*types were inferred.*id int64"
    ):
        source.table(None, 10)


# what cannot be opened


def test_every_table_that_is_not_there_is_named_at_once(tmp_path):
    with pytest.raises(DataError) as told:
        opened(world.write(tmp_path), users="user.parquet", items="item*.csv")
    assert "users: no file matches" in str(told.value)
    assert "items: no file matches" in str(told.value)
    assert "set [data].items" in str(told.value)


def test_a_table_that_is_not_there_does_not_hide_the_others(tmp_path):
    tables = find_tables(world.config(users="user.parquet"), world.write(tmp_path), tmp_path / "work")
    assert tables.items().num_rows == world.ITEMS
    with pytest.raises(DataError, match="users: no file matches"):
        tables.users()


def test_an_unknown_format_is_refused(tmp_path):
    (tmp_path / "users.json").write_text("{}")
    with pytest.raises(DataError, match=r"users: expected one of \.parquet, \.pq, \.csv, \.csv\.gz, got .*users\.json"):
        find("users", "users.json", tmp_path)


def test_two_formats_in_one_table_are_refused(tmp_path):
    world.write_csv(world.write(tmp_path), "users", world.users())
    with pytest.raises(DataError, match=r"users: expected files of one format, got users\.csv, users\.parquet"):
        find("users", "users.*", tmp_path)


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "users.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match=r"users: .*users\.parquet is not readable as parquet"):
        find("users", "users.parquet", tmp_path)


def test_types_that_do_not_meet_are_refused_by_file(tmp_path):
    pq.write_table(pa.table({"user_id": [1]}), tmp_path / "u1.parquet")
    pq.write_table(pa.table({"user_id": ["a"]}), tmp_path / "u2.parquet")
    with pytest.raises(DataError, match=r"users\.user_id: int64 in u1\.parquet but string in u2\.parquet"):
        find("users", "u*.parquet", tmp_path)


def test_a_column_named_twice_is_refused(tmp_path):
    pq.write_table(pa.table([[1], [2]], names=["a", "a"]), tmp_path / "u.parquet")
    with pytest.raises(DataError, match=r"u\.parquet has more than one column 'a'"):
        find("users", "u.parquet", tmp_path)


# fingerprints and adapters


def test_the_fingerprint_changes_with_a_file_and_only_then(tmp_path):
    world.write(tmp_path)
    before = opened(tmp_path).fingerprint()
    assert opened(tmp_path).fingerprint() == before
    os.utime(tmp_path / "items.parquet", ns=(1, 1))
    assert opened(tmp_path).fingerprint() != before


def test_an_adapter_runs_once_for_each_state_of_its_files(tmp_path, monkeypatch):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "log.txt").write_text("1")
    runs = []

    def convert(folder, out):
        runs.append((folder / "log.txt").read_text())
        world.write(out)

    monkeypatch.setitem(ADAPTERS, "toy", Adapter(lambda folder: [folder / "log.txt"], convert, 1))
    config = world.config(adapter="toy")
    first = open_tables(config, raw, tmp_path / "work")
    again = open_tables(config, raw, tmp_path / "work")
    assert (runs, first.fingerprint()) == (["1"], again.fingerprint())
    (raw / "log.txt").write_text("22")
    assert open_tables(config, raw, tmp_path / "work").fingerprint() != first.fingerprint()
    assert runs == ["1", "22"]
    assert first.users().num_rows == world.USERS


def test_an_adapter_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def convert(folder, out):
        (out / "users.parquet").write_text("half")
        raise DataError("no more")

    monkeypatch.setitem(ADAPTERS, "toy", Adapter(lambda folder: [], convert, 1))
    with pytest.raises(DataError, match="no more"):
        open_tables(world.config(adapter="toy"), tmp_path, tmp_path / "work")
    assert list((tmp_path / "work" / "tables").iterdir()) == []


def test_an_unknown_adapter_names_the_nearest(tmp_path):
    with pytest.raises(DataError, match=r"data\.adapter: expected one of kuairand, got 'kuairnd'; did you mean"):
        open_tables(world.config(adapter="kuairnd"), tmp_path, tmp_path / "work")
    assert logs.ADAPTERS.keys() == {"kuairand"}
