"""A tiny KuaiRand-Pure with every trap of the real one planted; then a few facts of the real one, where it is."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from prerank.config import parse_config
from prerank.data import kuairand
from prerank.data.calendar import spans
from prerank.data.check import check
from prerank.data.logs import open_tables
from prerank.errors import DataError
from prerank.train.prepare import prepare
from tests.data import world

DAY_0, DAY_1 = spans(["2022-04-25"], "Asia/Shanghai")[0]
HOUR = 3_600_000
SIGNALS = ["is_click", "is_like", "is_follow", "is_comment", "is_forward", "is_hate", "long_view"]
USERS_HEAD = (
    "user_id,user_active_degree,is_lowactive_period,is_live_streamer,is_video_author,follow_user_num,"
    "follow_user_num_range,fans_user_num,fans_user_num_range,friend_user_num,friend_user_num_range,register_days,"
    "register_days_range," + ",".join(f"onehot_feat{n}" for n in range(18))
)
VIDEOS_HEAD = (
    "video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,server_width,server_height,"
    "music_id,music_type,tag"
)


def shown(user, video, time_ms, date=20220425, hourmin=0, **signals):
    row = {"user_id": user, "video_id": video, "date": date, "hourmin": hourmin, "time_ms": time_ms}
    row |= dict.fromkeys([*SIGNALS, "play_time_ms", "duration_ms", "profile_stay_time", "comment_stay_time"], 0)
    return row | {"is_profile_enter": 0, "is_rand": 0, "tab": 1} | signals


def log_file(folder, name, rows):
    pq.write_table(pa.Table.from_pylist(rows), folder / f"impressions_{name}.parquet")


def history_files(folder, exposures, positives, last):
    """exposures: (user, pos_from_end, video, long_view, is_like); positives: (user, video, pos_from_end)."""

    def table(names, rows):
        return pa.table({n: [r[k] for r in rows] for k, n in enumerate(names)})

    before = table(["user_id", "pos_from_end", "video_id", "long_view", "is_like"], exposures)
    pq.write_table(before, folder / "history_before_20220425.parquet")
    views = table(["user_id", "video_id", "pos_from_end"], positives)
    pq.write_table(views, folder / "longview_positives_before_20220425.parquet")
    pq.write_table(table(["user_id", "last_time_ms"], last), folder / "history_users.parquet")


@pytest.fixture
def raw(tmp_path):
    """Two days in two files; three users, three videos."""
    folder = tmp_path / "raw"
    folder.mkdir()
    first = shown(0, 0, DAY_0 + HOUR, is_click=1, long_view=1)
    log_file(
        folder,
        "20220425_20220425",
        [
            shown(1, 1, DAY_0 + 2 * HOUR),
            first,  # out of order
            first,  # repeated
            shown(2, 2, DAY_0 - HOUR // 2, hourmin=0),  # dated 04-25, but half an hour before it
            shown(1, 2, DAY_0 + 3 * HOUR, hourmin=400),  # an hour ahead
            shown(1, 2, DAY_0 + 3 * HOUR, hourmin=300),  # the same event, not ahead
        ],
    )
    log_file(folder, "20220426", [first, shown(0, 1, DAY_1 + HOUR, date=20220426, is_like=1)])  # repeated across files
    history_files(
        folder,
        # user 0: three exposures, two long views; user 2: its last exposure is the log's first row
        [(0, 2, 0, 1, 0), (0, 1, 1, 0, 1), (0, 0, 2, 1, 0), (2, 0, 2, 0, 0), (2, 1, 1, 0, 0)],
        # user 0: the newest two are those above, two are older; user 1 has long views only
        [(0, 2, 0), (0, 0, 1), (0, 1, 2), (0, 2, 3), (1, 0, 0)],
        [(0, DAY_0 - 5000), (1, DAY_0 - 6000), (2, DAY_0 - HOUR // 2)],
    )
    counts = '514,500+,150,"[100,1k)",34,"[30,60)",799,730+'
    hot = ",".join(str(n % 3) for n in range(18))
    holes = ",".join("" if n in (4, *range(12, 18)) else "1" for n in range(18))
    floats = ",".join(f"{n % 2}.0" if n in (4, *range(12, 18)) else "1" for n in range(18))
    lines = [
        f"0,full_active,0,1,1,{counts},{hot}",
        f"1,UNKNOWN,0,-124,0,{counts},{holes}",
        f"2,x,0,1,0,{counts},{floats}",
    ]
    (folder / "user_features_pure.csv").write_text("\n".join([USERS_HEAD, *lines]) + "\n")
    videos = [
        "1,11,AD,2022-04-10,Web,0.0,,720.0,1280.0,5,,",
        "0,10,NORMAL,2022-04-09,Web,0.0,9233.0,960.0,720.0,6,9.0,39",
        '2,12,NORMAL,2022-04-11,Web,0.0,1000.0,0.0,720.0,7,4.0,"12,65"',
    ]
    (folder / "video_features_basic_pure.csv").write_text("\n".join([VIDEOS_HEAD, *videos]) + "\n")
    return folder


@pytest.fixture
def made(raw, tmp_path):
    kuairand.convert(raw, tmp_path / "out")
    return lambda name: pq.read_table(tmp_path / "out" / f"{name}.parquet")


def test_each_event_of_every_file_is_there_once_in_the_order_of_time(made):
    log = made("impressions")
    assert list(zip(*(log[c].to_pylist() for c in ("time_ms", "user_id", "item_id")), strict=True)) == [
        (DAY_0 - HOUR // 2, 2, 2),
        (DAY_0 + HOUR, 0, 0),
        (DAY_0 + 2 * HOUR, 1, 1),
        (DAY_0 + 3 * HOUR, 1, 2),
        (DAY_1 + HOUR, 0, 1),
    ]


def test_the_hour_is_the_clocks_in_shanghai_not_hourmins(made):
    assert made("impressions")["hour"].to_pylist() == [23, 1, 2, 3, 1]


def test_date_and_hourmin_are_left_out_and_signals_are_small(made):
    log = made("impressions")
    assert not {"date", "hourmin", "video_id"} & set(log.column_names)
    assert {str(log.schema.field(c).type) for c in [*SIGNALS, "tab", "hour"]} == {"int8"}
    assert log["is_like"].to_pylist() == [0, 0, 0, 0, 1]


def test_labels_are_known_five_seconds_after_the_video_was_played(raw, tmp_path):
    log_file(raw, "20220427", [shown(0, 2, DAY_1 + 30 * HOUR, date=20220427, play_time_ms=61_234)])
    kuairand.convert(raw, tmp_path / "out")
    log = pq.read_table(tmp_path / "out" / "impressions.parquet")
    assert str(log.schema.field("labelled_ms").type) == "int64"
    after = log["labelled_ms"].to_numpy() - log["time_ms"].to_numpy()
    assert after.tolist() == [5000] * 5 + [66_234]
    assert "labelled_ms" not in pq.read_table(tmp_path / "out" / "history.parquet").column_names


def test_rows_that_differ_in_a_signal_are_two_events(raw, tmp_path):
    log_file(raw, "x", [shown(0, 0, DAY_0 + HOUR, is_click=1, long_view=1, is_like=1)])
    kuairand.convert(raw, tmp_path / "out")
    assert pq.read_table(tmp_path / "out" / "impressions.parquet").num_rows == 6


def test_minus_124_is_missing(made):
    assert made("users")["is_live_streamer"].to_pylist() == [1, None, 1]


def test_one_hot_positions_are_integers_or_null(made):
    users = made("users")
    assert {str(users.schema.field(f"onehot_feat{n}").type) for n in range(18)} == {"int32"}
    assert users["onehot_feat4"].to_pylist() == [1, None, 0]
    assert users["onehot_feat13"].to_pylist() == [1, None, 1]


def test_counts_taken_after_the_log_say_so_in_their_names(made):
    users = made("users")
    assert users["fans_user_num_at_snapshot"].to_pylist() == [150] * 3
    late = [c for c in users.column_names if c.startswith(("follow", "fans", "friend"))]
    assert len(late) == 6
    assert all(c.endswith("_at_snapshot") for c in late)
    assert "visible_status_at_snapshot" in made("items").column_names


def test_videos_keep_what_is_missing_and_are_in_the_order_of_ids(made):
    items = made("items")
    assert items["item_id"].to_pylist() == [0, 1, 2]
    assert items["tag"].to_pylist() == [[39], [], [12, 65]]
    assert items["duration_ms"].to_pylist() == [9233.0, None, 1000.0]
    assert items["music_type"].to_pylist() == [9, None, 4]
    assert items["aspect_ratio"].to_pylist() == [pytest.approx(4 / 3), 0.5625, None]
    assert items["upload_dt"].to_pylist() == ["2022-04-09", "2022-04-10", "2022-04-11"]
    assert np.diff(items["upload_day"].to_numpy()).tolist() == [1, 1]


def test_history_has_each_event_once_in_order_with_made_up_times(made):
    history = made("history")
    columns = ("user_id", "item_id", "time_ms", "is_click", "is_like", "long_view")
    last_0, last_1, last_2 = DAY_0 - 5000, DAY_0 - 6000, DAY_0 - HOUR // 2
    assert list(zip(*(history[c].to_pylist() for c in columns), strict=True)) == [
        (0, 2, last_0 - 4, None, None, 1),  # older than the exposures kept
        (0, 1, last_0 - 3, None, None, 1),
        (0, 0, last_0 - 2, None, 0, 1),
        (0, 1, last_0 - 1, None, 1, 0),
        (0, 2, last_0, None, 0, 1),
        (1, 0, last_1, None, None, 1),
        (2, 1, last_2 - 1, None, 0, 0),  # the newest one is the log's
    ]


def test_history_ends_before_the_first_dated_day(made):
    assert pc.max(made("history")["time_ms"]).as_py() < DAY_0


def test_without_history_files_the_history_is_empty(raw, tmp_path):
    for name in ("history_before_20220425", "longview_positives_before_20220425", "history_users"):
        (raw / f"{name}.parquet").unlink()
    kuairand.convert(raw, tmp_path / "out")
    history = pq.read_table(tmp_path / "out" / "history.parquet")
    assert (history.num_rows, history.column_names[:3]) == (0, ["user_id", "item_id", "time_ms"])


def test_an_empty_history_is_one(raw, tmp_path):
    history_files(raw, [], [], [])
    for name in kuairand.sources(raw):
        if "_before_" in name.name or name.name == kuairand.LAST:
            table = pq.read_table(name)
            pq.write_table(table.cast(pa.schema([(c, pa.int64()) for c in table.column_names])), name)
    kuairand.convert(raw, tmp_path / "out")
    assert pq.read_table(tmp_path / "out" / "history.parquet").num_rows == 0


def test_the_same_files_give_the_same_tables(raw, tmp_path):
    for _ in range(2):
        kuairand.convert(raw, tmp_path / "out")
    kuairand.convert(raw, tmp_path / "other")
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["history.parquet", "impressions.parquet", "items.parquet", "users.parquet"]
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


# refusals


def test_every_missing_file_is_named(raw):
    for name in ("impressions_20220425_20220425", "impressions_20220426", "history_users"):
        (raw / f"{name}.parquet").unlink()
    (raw / "user_features_pure.csv").unlink()
    lacks = r"lacks impressions_\*\.parquet, user_features_pure\.csv, history_users\.parquet; see docs/data\.md"
    with pytest.raises(DataError, match=lacks):
        kuairand.sources(raw)


def test_a_history_without_its_other_half_is_refused(raw):
    (raw / "longview_positives_before_20220425.parquet").unlink()
    with pytest.raises(DataError, match=r"lacks longview_positives_before_\*\.parquet"):
        kuairand.sources(raw)


def test_histories_before_two_days_are_refused(raw):
    path = raw / "longview_positives_before_20220425.parquet"
    path.rename(raw / "longview_positives_before_20220501.parquet")
    with pytest.raises(
        DataError, match="expected one file of each history, before the same day, got history_before_2022"
    ):
        kuairand.sources(raw)


def test_a_history_whose_name_says_no_day_is_refused(raw):
    (raw / "history_before_20220425.parquet").rename(raw / "history_before_april.parquet")
    with pytest.raises(
        DataError, match=r"expected a name such as history_before_20220425\.parquet, got history_before_ap"
    ):
        kuairand.sources(raw)


def test_a_log_that_reaches_into_the_histories_is_refused(raw, tmp_path):
    log_file(raw, "20220424", [shown(0, 0, DAY_0 - 5 * HOUR, date=20220424)])
    with pytest.raises(DataError, match=r"1 rows of impressions_\*\.parquet are dated before 20220425.*count twice"):
        kuairand.convert(raw, tmp_path / "out")


def test_histories_of_different_logs_are_refused(raw, tmp_path):
    history_files(raw, [(0, 0, 1, 1, 0)], [(0, 2, 0)], [(0, DAY_0 - 5000)])
    with pytest.raises(
        DataError, match="1 long views of the exposure history are not the newest of longview_positives"
    ):
        kuairand.convert(raw, tmp_path / "out")


def test_a_user_with_a_history_but_no_last_time_is_refused(raw, tmp_path):
    history_files(raw, [(0, 0, 1, 0, 0)], [(0, 2, 0)], [(1, DAY_0 - 5000)])
    with pytest.raises(DataError, match=r"user 0 has a history but no row in history_users\.parquet"):
        kuairand.convert(raw, tmp_path / "out")


def test_a_file_without_its_columns_is_refused(raw, tmp_path):
    pq.write_table(pa.table({"user_id": [1]}), raw / "impressions_x.parquet")
    with pytest.raises(DataError, match=r"impressions_x\.parquet lacks the columns video_id, date, .*; it has user_id"):
        kuairand.convert(raw, tmp_path / "out")


@pytest.mark.parametrize(("name", "kind"), [("impressions_x.parquet", "Parquet"), ("user_features_pure.csv", "CSV")])
def test_a_damaged_file_is_refused(raw, tmp_path, name, kind):
    (raw / name).write_text("a,b\n1,2,3\n")
    with pytest.raises(DataError, match=f"{name} is not readable as {kind}"):
        kuairand.convert(raw, tmp_path / "out")


# the whole way, on the small folder and on the real one


def funnel(train, validate, test):
    plain = world.plain(
        adapter="kuairand",
        impressions="impressions.parquet",
        history="history.parquet",
        timezone="Asia/Shanghai",
        train=train,
        validate=validate,
        test=test,
    )
    plain["features"] = {
        "user": {"is_live_streamer": {"kind": "category"}, "views": {"kind": "history", "of": "item_id"}},
        "context": {"tab": {"kind": "category"}, "hour": {"kind": "category"}},
        "item": {"item_id": {"kind": "category"}, "author_id": {"kind": "category"}, "tag": {"kind": "bag"}},
    }
    plain["utility"] = {"click": {"value": 1.0}}
    return parse_config(plain, "kuairand.toml")


def test_labels_of_the_log_are_prepared_as_known_when_reported_and_the_historys_at_once(raw, tmp_path):
    log_file(raw, "20220427", [shown(0, 2, DAY_1 + 25 * HOUR, date=20220427, is_click=1, play_time_ms=1000)])
    plain = funnel(["2022-04-25"] * 2, ["2022-04-26"] * 2, ["2022-04-27"] * 2)
    config = replace(plain, data=replace(plain.data, labelled="labelled_ms"))
    tables = open_tables(config, raw, tmp_path / "work")
    assert check(config, tables) == []
    events = prepare(config, tables, tmp_path / "work").events
    after = events["known_ms"] - events["time_ms"]
    assert sorted(after[events["logged"]].tolist()) == [5000] * 5 + [6000]
    assert not after[~events["logged"]].any()


def test_a_days_file_more_is_days_more(raw, tmp_path):
    config = funnel(["2022-04-25"] * 2, ["2022-04-26"] * 2, ["2022-04-27"] * 2)
    told = check(config, open_tables(config, raw, tmp_path / "work"))
    assert [(p.where, p.what) for p in told] == [("data.test", "day without rows")]
    log_file(raw, "20220427", [shown(0, 2, DAY_1 + 25 * HOUR, date=20220427, is_click=1)])
    tables = open_tables(config, raw, tmp_path / "work")
    assert check(config, tables) == []
    assert sum(b.num_rows for b in tables.impressions(["user_id"], config.data.days("test"))) == 1


def real_folder():
    root = Path(__file__).resolve().parents[2]
    data = Path(os.environ.get("PRERANK_DATA") or root.parent / "shared" / "data")
    folder = data / "kuairand_pure"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent; set PRERANK_DATA to the folder that holds kuairand_pure")
    return folder


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    config = funnel(["2022-04-25", "2022-05-02"], ["2022-05-03"] * 2, ["2022-05-04"] * 2)
    return config, open_tables(config, real_folder(), tmp_path_factory.mktemp("kuairand"))


@pytest.mark.realdata
def test_the_real_tables_are_fit_to_train_on(real):
    config, tables = real
    assert [p for p in check(config, tables) if p.severity == "error"] == []
    assert (tables.users().num_rows, tables.items().num_rows) == (27_285, 7_583)


@pytest.mark.realdata
def test_the_real_log_has_no_event_twice(real):
    config, tables = real
    columns = tables.source("impressions").schema.names
    log = pa.Table.from_batches(list(tables.impressions(columns)))
    assert log.group_by(columns).aggregate([]).num_rows == log.num_rows
    assert np.all(np.diff(log["time_ms"].to_numpy()) >= 0)
    days = dict(zip(*np.unique(log["day"].to_numpy(), return_counts=True), strict=True))
    assert len(days) == 11  # ten days, and the last minutes of the day before
    parts = [config.data.days(part) for part in ("train", "validate", "test")]
    split = sum(b.num_rows for days in parts for b in tables.impressions(["user_id"], days))
    assert split == log.num_rows - min(days.values())


@pytest.mark.realdata
def test_the_real_history_is_a_strict_order_and_none_of_it_is_in_the_log(real):
    _, tables = real
    keys = ["user_id", "item_id", "time_ms"]
    history = pa.Table.from_batches(list(tables.history([*keys, "long_view", "is_like"])))
    user, time_ms = history["user_id"].to_numpy(), history["time_ms"].to_numpy()
    assert np.all((np.diff(user) > 0) | (np.diff(time_ms) > 0))
    assert time_ms.max() < DAY_0
    assert pc.sum(history["long_view"]).as_py() == 390_929  # every long view kept, once
    log = pa.Table.from_batches(list(tables.impressions(keys)))
    assert history.join(log, keys=keys, join_type="inner").num_rows == 0
