"""Prepared arrays are the tables, encoded once, in the order things happened to each user."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prerank.data.logs import open_tables
from prerank.errors import DataError
from prerank.train.prepare import preparation_key, prepare
from prerank.types import day_number


def test_events_are_the_log_ordered_by_user_then_time(world, trained):
    prepared = trained.prepared
    table = pq.read_table(world.data / "impressions.parquet")
    order = np.lexsort((table["time_ms"].to_numpy(), table["user_id"].to_numpy()))
    log = {name: table[name].to_numpy()[order] for name in ("user_id", "item_id", "time_ms", "is_click")}
    events = prepared.events
    np.testing.assert_array_equal(prepared.user_ids[events["user"]], log["user_id"])
    np.testing.assert_array_equal(prepared.item_ids[events["item"]], log["item_id"])
    np.testing.assert_array_equal(events["time_ms"], log["time_ms"])
    np.testing.assert_array_equal(prepared.happened("is_click"), log["is_click"] == 1)
    np.testing.assert_array_equal(events["day"], log["time_ms"] // 86_400_000)


def test_ids_ascend_and_features_follow_them(world, trained):
    prepared = trained.prepared
    items = pq.read_table(world.data / "items.parquet").sort_by("item_id")
    np.testing.assert_array_equal(prepared.item_ids, items["item_id"].to_numpy())
    np.testing.assert_array_equal(prepared.items["bid_micros"], items["bid_micros"].to_numpy())
    assert (np.diff(prepared.user_ids) > 0).all()


def test_transforms_know_nothing_of_later_days(world, trained):
    """A segment whose users all come after the training days is the unknown one."""
    log = pq.read_table(world.data / "impressions.parquet")
    end_ms = (day_number(world.config.data.train[1]) + 1) * 86_400_000
    before = np.unique(log["user_id"].to_numpy()[log["time_ms"].to_numpy() < end_ms])
    users = pq.read_table(world.data / "users.parquet")
    known = np.unique(users["segment"].to_numpy()[np.isin(users["user_id"].to_numpy(), before)])
    assert len(known) < len(np.unique(users["segment"].to_numpy()))
    assert trained.prepared.transforms.sizes()["user.segment"] == 1 + len(known)


def test_the_same_inputs_are_prepared_once(world, trained, tmp_path):
    tables = world.tables()
    prepare(world.config, tables, tmp_path)
    made = next(tmp_path.glob("prepared-*"))
    before = made.stat().st_ctime_ns
    prepare(world.config, tables, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [made.name]
    assert made.stat().st_ctime_ns == before


def test_a_key_changes_with_features_and_days_but_not_with_the_models(world):
    config, tables = world.config, world.tables()
    key = preparation_key(config, tables)
    assert key == preparation_key(replace(config, ranker=replace(config.ranker, dim=3)), tables)
    assert key != preparation_key(replace(config, data=replace(config.data, test=("2026-01-14", "2026-01-15"))), tables)


def test_an_id_of_no_table_is_refused_by_name(world, tmp_path):
    for name in ("users", "impressions"):
        (tmp_path / f"{name}.parquet").write_bytes((world.data / f"{name}.parquet").read_bytes())
    items = pq.read_table(world.data / "items.parquet")
    pq.write_table(items.slice(1), tmp_path / "items.parquet")
    with pytest.raises(DataError, match=r"the log's item_id \d+ is not in the items table.*run `prerank check`"):
        prepare(world.config, open_tables(world.config, tmp_path, tmp_path / "work"), tmp_path / "work")


def test_an_empty_log_is_refused(world, tmp_path):
    for name in ("users", "items"):
        (tmp_path / f"{name}.parquet").write_bytes((world.data / f"{name}.parquet").read_bytes())
    log = pq.read_table(world.data / "impressions.parquet")
    pq.write_table(log.slice(0, 0), tmp_path / "impressions.parquet")
    config = replace(world.config, features=replace(world.config.features, context={}))
    with pytest.raises(DataError, match="the impressions table has no rows"):
        prepare(config, open_tables(config, tmp_path, tmp_path / "work"), tmp_path / "work")


def test_history_events_come_before_the_log_and_are_not_logged(world, tmp_path):
    for name in ("users", "items"):
        (tmp_path / f"{name}.parquet").write_bytes((world.data / f"{name}.parquet").read_bytes())
    log = pq.read_table(world.data / "impressions.parquet")
    pq.write_table(log.slice(100), tmp_path / "impressions.parquet")
    keys = log.slice(0, 100).select(["user_id", "item_id", "time_ms"])
    pq.write_table(keys.append_column("is_click", pa.nulls(100, pa.int8())), tmp_path / "history.parquet")
    config = replace(world.config, data=replace(world.config.data, history="history.parquet"))
    prepared = prepare(config, open_tables(config, tmp_path, tmp_path / "work"), tmp_path / "work")
    old = ~prepared.events["logged"]
    assert old.sum() == 100
    assert not prepared.happened("is_click")[old].any()
    assert (prepared.events["surface"][old] == 0).all()
    assert not prepared.of_days(world.config.data.days("train"))[old].any()
