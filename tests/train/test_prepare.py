"""Prepared arrays are the tables, encoded once, in the order things happened to each user."""

import re
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prerank.data.logs import open_tables
from prerank.errors import DataError
from prerank.schema import IMPRESSION, Counter, History
from prerank.train.examples import UserExamples
from prerank.train.prepare import Prepared, preparation_key, prepare
from prerank.types import day_number
from tests.data import world as three_days


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
    config = replace(world.config, features=replace(world.config.features, context={}, interaction={}))
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


# when labels were known


def known_at(folder, known_ms, **tables) -> Prepared:
    """The three days prepared, their labels known at `known_ms`, an Arrow array aligned with the log's rows."""
    log = three_days.put(three_days.impressions(), "known", known_ms)
    data = {"labelled": "known", **({"history": "history.parquet"} if "history" in tables else {})}
    config = three_days.config(**data)
    three_days.write(folder, impressions=log, **tables)
    return prepare(config, open_tables(config, folder, folder / "work"), folder / "work")


def time_ms() -> np.ndarray:
    return three_days.impressions()["time_ms"].to_numpy()


def test_labels_are_known_when_the_log_says_or_else_at_once(tmp_path):
    late = np.random.default_rng(0).integers(0, 10**7, three_days.ROWS)
    said = np.arange(three_days.ROWS) % 4 > 0
    prepared = known_at(tmp_path, pa.array(time_ms() + late, mask=~said))
    events = prepared.events
    rows = np.lexsort((time_ms(), three_days.impressions()["user_id"].to_numpy()))
    np.testing.assert_array_equal(events["time_ms"], time_ms()[rows])
    np.testing.assert_array_equal(events["known_ms"], (time_ms() + late * said)[rows])
    assert events["known_ms"].dtype == np.int64


@pytest.mark.parametrize("kind", [pa.null(), pa.int64()])
def test_labels_of_which_nothing_is_said_are_known_at_once(tmp_path, kind):
    events = known_at(tmp_path, pa.nulls(three_days.ROWS, kind)).events
    np.testing.assert_array_equal(events["known_ms"], events["time_ms"])


def test_without_labelled_every_label_is_known_at_once(world, trained):
    np.testing.assert_array_equal(trained.prepared.events["known_ms"], trained.prepared.events["time_ms"])


def test_labels_of_a_history_that_does_not_say_are_known_at_once(tmp_path):
    history = three_days.impressions().slice(0, 3).select(["user_id", "item_id", "time_ms", "is_click"])
    history = three_days.put(history, "time_ms", np.full(3, three_days.START_MS - 5))
    events = known_at(tmp_path, pa.array(time_ms() + 7), history=history).events
    np.testing.assert_array_equal(events["known_ms"] - events["time_ms"], np.where(events["logged"], 7, 0))
    assert (~events["logged"]).sum() == 3


def test_labels_known_before_their_impression_are_refused(tmp_path):
    early = time_ms().copy()
    early[[5, 9]] -= 1
    with pytest.raises(
        DataError,
        match=rf"impressions.known: 2 labels are known before their impression, such as {early[5]} of the one at "
        rf"{early[5] + 1}; check \[data\].labelled and \[data\].time",
    ):
        known_at(tmp_path, pa.array(early))


@pytest.mark.parametrize("kind", [pa.float64(), pa.timestamp("ms"), pa.string()])
def test_a_moment_that_is_no_integer_is_refused(tmp_path, kind):
    said = f"impressions.known: expected integer milliseconds (UTC), got {kind}"
    with pytest.raises(DataError, match=re.escape(said)):
        known_at(tmp_path, pa.array(time_ms()).cast(kind))


def test_a_missing_labelled_column_is_refused(tmp_path):
    config = three_days.config(labelled="konwn")
    three_days.write(tmp_path, impressions=three_days.put(three_days.impressions(), "known", time_ms()))
    with pytest.raises(DataError, match="impressions: no column 'konwn'; did you mean \"known\""):
        prepare(config, open_tables(config, tmp_path, tmp_path / "work"), tmp_path / "work")


def test_timelines_are_made_once_and_not_taken_over_by_other_events(tmp_path):
    """A label a second late is in one timeline and not in the other."""
    schema = three_days.config().features
    schema = replace(schema, interaction={"clicks": Counter("is_click", window="1d")})
    prepared = known_at(tmp_path, pa.nulls(three_days.ROWS, pa.int64()))
    made = prepared.timelines(schema)
    assert prepared.timelines(schema) is made
    late = replace(prepared, events={**prepared.events, "known_ms": prepared.events["time_ms"] + 1000})
    np.testing.assert_array_equal(late.timelines(schema)["clicks"].time_ms, made["clicks"].time_ms + 1000)


def test_a_label_is_in_histories_and_counters_from_when_it_was_known_and_an_impression_from_its_own_time(tmp_path):
    """Every label is known two hours late."""
    late = 7_200_000
    prepared = known_at(tmp_path, pa.array(time_ms() + late))
    schema = three_days.config().features
    schema = replace(
        schema,
        user={
            **schema.user,
            "clicked": History(of="item_id", events="is_click", length=9),
            "seen": History(of="item_id", length=9),
        },
        interaction={
            "clicks": Counter("is_click", window="2d"),
            "clicks_by": Counter("is_click", by="tags", window="2d", length=99),
            "shown": Counter(IMPRESSION, window="2d"),
        },
    )
    examples, log = UserExamples(prepared, schema), prepared.events
    for event in (0, 40, 577):
        mine = np.flatnonzero(log["user"] == log["user"][event])
        click = mine[prepared.happened("is_click")[mine]]
        for moment in (log["known_ms"][click[3]] + after for after in (-late, 0, 1)):
            found = {name: f[0].numpy() for name, f in examples.at(np.array([event]), np.array([moment])).items()}
            shown, known = mine[log["time_ms"][mine] < moment], click[log["known_ms"][click] < moment]
            for name, happened in (("seen", shown), ("clicked", known)):
                np.testing.assert_array_equal(
                    found[name][found[name] >= 0], prepared.items["item_id"][log["item"][happened]][-9:]
                )
            assert found["shown"] == (log["time_ms"][shown] >= moment - 2 * 86_400_000).sum()
            lately = known[log["known_ms"][known] >= moment - 2 * 86_400_000]
            assert found["clicks"] == len(lately)
            tags = prepared.items["tags"][log["item"][lately]]
            np.testing.assert_array_equal(found["clicks_by"][found["clicks_by"] >= 0], tags[tags >= 0])
