"""KuaiRand-Pure as our four tables: every `impressions_*.parquet` of the folder, the histories, users and videos.

Source: Gao et al., KuaiRand, CIKM 2022, doi 10.1145/3511808.3557624. What its files hide, and what we do about it:

- The log repeats rows. A row is dropped when another one, of any file, is the same in everything but `date` and
  `hourmin`, which are themselves unsure.
- `date` and `hourmin` run an hour ahead of `time_ms` on some rows. The day and the hour come from `time_ms`; both
  columns are left out, and rows are in the order of `time_ms`.
- `is_live_streamer` says -124 for missing: null. One-hot positions are floats where some are missing: nullable
  integers. An empty `tag` is an empty list.
- Labels of an impression are not known at its time: `labelled_ms` is its time, the play time and five seconds.
- Counts of fans, follows and friends, and the status of a video, were taken after the log ended: a model that reads
  them has seen the future. They are kept under names that say so, ending in `_at_snapshot`.
- The events before the log have an order and, a user, the time of the last one, but no times of their own. We give
  them times that keep the order (`_history`). Nothing but their order should be read from them.
- Long views of the exposure history are the newest of the long-view history, and the last exposure of a few users is
  the first row of the log: each event is taken once.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
import pyarrow.parquet as pq

from prerank.errors import DataError
from prerank.types import Array

FORM = 2
"""Changes when the tables written change, so that tables of an older form are not taken for them."""
LABELS = ("is_click", "is_like", "is_follow", "is_comment", "is_forward", "is_hate", "long_view")
USERS, VIDEOS, LAST = "user_features_pure.csv", "video_features_basic_pure.csv", "history_users.parquet"
_LATER = ("play_time_ms", "duration_ms", "profile_stay_time", "comment_stay_time", "is_profile_enter", "is_rand")
_MISSING = -124
_REPORTED_MS = 5_000  # after a video ends, until what its user did is known
_HOUR_MS, _HOURS_AHEAD = 3_600_000, 8  # Asia/Shanghai has kept UTC+8 without a break since 1991
_ROW_GROUP = 65_536
_HISTORIES = ("history_before_*.parquet", "longview_positives_before_*.parquet")


def sources(folder: Path) -> list[Path]:
    """The files `convert` reads, in a fixed order. Raises DataError naming every one that is missing."""
    logs = sorted(folder.glob("impressions_*.parquet"))
    missing = [] if logs else ["impressions_*.parquet"]
    missing += [name for name in (USERS, VIDEOS) if not (folder / name).is_file()]
    histories = [f for pattern in _HISTORIES for f in sorted(folder.glob(pattern))]
    if histories:
        missing += [p for p in _HISTORIES if not list(folder.glob(p))]
        missing += [] if (folder / LAST).is_file() else [LAST]
    if missing:
        raise DataError(f"kuairand: {folder} lacks {', '.join(missing)}; see docs/data.md for what is read")
    if len(histories) > len(_HISTORIES) or len({_cut(f) for f in histories}) > 1:
        names = ", ".join(f.name for f in histories)
        raise DataError(f"kuairand: expected one file of each history, before the same day, got {names}")
    last = [folder / LAST] if histories else []
    return [*logs, *histories, *last, folder / USERS, folder / VIDEOS]


def convert(folder: Path, out: Path) -> None:
    """Writes users, items, impressions and history (.parquet) into `out`, each complete or not at all.

    Raises DataError where a file or a column is missing, or the log reaches back into the histories' time.
    """
    files = sources(folder)
    out.mkdir(parents=True, exist_ok=True)
    log = _log([f for f in files if f.name.startswith("impressions_")])
    before = [f for f in files if "_before_" in f.name]
    if before:
        _refuse_overlap(log, _cut(before[0]))
        shown = _read(before[0], ["user_id", "video_id", "pos_from_end", "long_view", "is_like"])
        viewed = _read(before[1], ["user_id", "video_id", "pos_from_end"])
        history = _history(shown, viewed, _read(folder / LAST, ["user_id", "last_time_ms"]), log)
    else:
        history = _no_history()
    _write(_users(folder / USERS), out / "users.parquet")
    _write(_items(folder / VIDEOS), out / "items.parquet")
    _write(history, out / "history.parquet")
    _write(_impressions(log), out / "impressions.parquet")


def _log(files: list[Path]) -> pa.Table:
    """All rows, each event once, by time, user, video; `date` is the smallest of the event's."""
    columns = ["user_id", "video_id", "date", "time_ms", *LABELS, *_LATER, "tab"]
    parts = [_read(f, columns).cast(pa.schema([(c, pa.int64()) for c in columns])) for f in files]
    event = [c for c in columns if c != "date"]
    once = pa.concat_tables(parts).group_by(event).aggregate([("date", "min")]).rename_columns([*event, "date"])
    keys = ["time_ms", "user_id", "video_id", *LABELS, *_LATER, "tab"]
    return once.sort_by([(c, "ascending") for c in keys])


def _impressions(log: pa.Table) -> pa.Table:
    time_ms = log.column("time_ms").to_numpy()
    columns = {
        "user_id": log.column("user_id"),
        "item_id": log.column("video_id"),
        "time_ms": log.column("time_ms"),
        "tab": log.column("tab").cast(pa.int8()),
        "hour": pa.array(((time_ms // _HOUR_MS + _HOURS_AHEAD) % 24).astype(np.int8)),
    }
    columns |= {c: log.column(c).cast(pa.int8()) for c in LABELS}
    columns |= {c: log.column(c) for c in _LATER}
    columns["labelled_ms"] = pa.array(time_ms + log.column("play_time_ms").to_numpy() + _REPORTED_MS)
    return pa.table(columns)


def _history(shown: pa.Table, viewed: pa.Table, last: pa.Table, log: pa.Table) -> pa.Table:
    """Events before the log, by user, oldest first, with times that keep their order.

    A user's newest exposure is at `last_time_ms`, the one before it a millisecond earlier, and so on; the long views
    older than the exposures kept go on from there. What is not known of an event is null.
    """
    users = {name: shown.column(name).to_numpy().astype(np.int64) for name in shown.column_names}
    older = {name: viewed.column(name).to_numpy().astype(np.int64) for name in viewed.column_names}
    num = 1 + max(int(a.max(initial=-1)) for a in (users["user_id"], older["user_id"], last["user_id"].to_numpy()))
    last_ms = np.full(num, -1, dtype=np.int64)
    last_ms[last.column("user_id").to_numpy()] = last.column("last_time_ms").to_numpy()
    _check_positives(users, older, num)

    num_long = np.bincount(users["user_id"], weights=users["long_view"], minlength=num).astype(np.int64)
    depth = np.zeros(num, dtype=np.int64)
    np.maximum.at(depth, users["user_id"], users["pos_from_end"] + 1)
    keep = older["pos_from_end"] >= num_long[older["user_id"]]
    old_user, old_place = older["user_id"][keep], older["pos_from_end"][keep]
    old_place = old_place - num_long[old_user] + depth[old_user]

    user = np.concatenate([old_user, users["user_id"]])
    item = np.concatenate([older["video_id"][keep], users["video_id"]])
    place = np.concatenate([old_place, users["pos_from_end"]])
    unknown = np.arange(len(user)) < len(old_user)
    if (last_ms[user] < 0).any():
        raise DataError(f"kuairand: user {user[last_ms[user] < 0][0]} has a history but no row in {LAST}")
    long_view = np.concatenate([np.ones(len(old_user), np.int8), users["long_view"].astype(np.int8)])
    is_like = np.concatenate([np.zeros(len(old_user), np.int8), users["is_like"].astype(np.int8)])
    table = pa.table(
        {
            "user_id": user,
            "item_id": item,
            "time_ms": last_ms[user] - place,
            "is_click": pa.nulls(len(user), pa.int8()),
            "is_like": pa.array(is_like, mask=unknown),
            "long_view": long_view,
        }
    )
    fresh = ~_in_log(user, item, last_ms[user] - place, log)
    return table.filter(pa.array(fresh)).sort_by([("user_id", "ascending"), ("time_ms", "ascending")])


def _check_positives(shown: dict[str, Array], viewed: dict[str, Array], num_users: int) -> None:
    """Raises DataError unless a user's long views among the exposures are the newest of the long-view history."""
    long = np.flatnonzero(shown["long_view"] == 1)
    long = long[np.lexsort((shown["pos_from_end"][long], shown["user_id"][long]))]
    user = shown["user_id"][long]
    first = np.concatenate([[0], np.cumsum(np.bincount(user, minlength=num_users))])[:-1]
    place = np.arange(len(long)) - first[user]
    width = 1 + int(max(place.max(initial=0), viewed["pos_from_end"].max(initial=0)))
    keys = viewed["user_id"] * width + viewed["pos_from_end"]
    order = np.argsort(keys)
    found = np.searchsorted(keys[order], user * width + place).clip(max=max(len(keys) - 1, 0))
    same = np.zeros(len(long), dtype=bool)
    if len(keys):
        same = (keys[order][found] == user * width + place) & (
            viewed["video_id"][order][found] == shown["video_id"][long]
        )
    if not same.all():
        raise DataError(
            f"kuairand: {int((~same).sum())} long views of the exposure history are not the newest of "
            f"longview_positives, first of user {user[~same][0]}; the two files are not of one log"
        )


def _in_log(user: Array, item: Array, time_ms: Array, log: pa.Table) -> Array:
    """bool [events]: where the log has the same user, video and time."""
    names = ("user_id", "video_id", "time_ms")
    logged = np.rec.fromarrays([log.column(c).to_numpy() for c in names])
    early = logged[logged["f2"] <= time_ms.max(initial=-1)]
    return np.isin(np.rec.fromarrays([user, item, time_ms]), early)


def _no_history() -> pa.Table:
    ids = {c: pa.array([], pa.int64()) for c in ("user_id", "item_id", "time_ms")}
    return pa.table(ids | {c: pa.array([], pa.int8()) for c in ("is_click", "is_like", "long_view")})


def _refuse_overlap(log: pa.Table, cut: str) -> None:
    early = pc.sum(pc.less(log.column("date"), int(cut))).as_py() or 0
    if early:
        raise DataError(
            f"kuairand: {early} rows of impressions_*.parquet are dated before {cut}, the time history_before_{cut}."
            "parquet covers, so they would count twice; remove those rows, or the three history files"
        )


def _users(path: Path) -> pa.Table:
    whole = ["is_lowactive_period", "is_video_author", "register_days", *(f"onehot_feat{n}" for n in range(18))]
    counts = [f"{c}_user_num" for c in ("follow", "fans", "friend")]
    texts = ["user_active_degree", "register_days_range", *(f"{c}_range" for c in counts)]
    raw = _read_csv(path, ["user_id", "is_live_streamer", *whole, *counts, *texts], {c: pa.string() for c in texts})
    columns = {"user_id": raw.column("user_id"), "user_active_degree": raw.column("user_active_degree")}
    streamer = raw.column("is_live_streamer").cast(pa.int32())
    columns["is_live_streamer"] = pc.if_else(pc.equal(streamer, _MISSING), pa.scalar(None, pa.int32()), streamer)
    columns |= {c: raw.column(c).cast(pa.int32()) for c in whole}
    columns["register_days_range"] = raw.column("register_days_range")
    columns |= {f"{c}_at_snapshot": raw.column(c) for c in counts}
    columns |= {f"{c}_range_at_snapshot": raw.column(f"{c}_range") for c in counts}
    return pa.table(columns).sort_by("user_id")


def _items(path: Path) -> pa.Table:
    texts = {c: pa.string() for c in ("video_type", "upload_type", "tag")}
    numbers = ["visible_status", "video_duration", "server_width", "server_height", "music_type"]
    types = texts | {c: pa.float64() for c in numbers} | {"upload_dt": pa.date32()}
    raw = _read_csv(path, ["video_id", "author_id", "music_id", *types], types)
    width, height = raw.column("server_width"), raw.column("server_height")
    known = pc.fill_null(pc.and_(pc.greater(width, 0), pc.greater(height, 0)), False)
    aspect = pc.if_else(known, pc.divide(width, height), pa.scalar(None, pa.float64()))
    return pa.table(
        {
            "item_id": raw.column("video_id"),
            "author_id": raw.column("author_id"),
            "video_type": raw.column("video_type"),
            "upload_type": raw.column("upload_type"),
            "upload_dt": raw.column("upload_dt").cast(pa.string()),
            "upload_day": raw.column("upload_dt").cast(pa.int32()),
            "duration_ms": raw.column("video_duration"),
            "width": width.cast(pa.int32()),
            "height": height.cast(pa.int32()),
            "aspect_ratio": aspect.cast(pa.float32()),
            "music_id": raw.column("music_id"),
            "music_type": raw.column("music_type").cast(pa.int16()),
            "tag": _tags(raw.column("tag")),
            "visible_status_at_snapshot": raw.column("visible_status").cast(pa.int16()),
        }
    ).sort_by("item_id")


def _tags(text: pa.ChunkedArray) -> pa.Array:
    """ "12,65" as [12, 65]; missing is []."""
    lists = [[int(tag) for tag in row.split(",")] if row else [] for row in text.to_pylist()]
    return pa.array(lists, pa.list_(pa.int16()))


def _read(path: Path, columns: list[str]) -> pa.Table:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"kuairand: {path} is not readable as Parquet: {error}") from error
    with file:
        _require(path, columns, file.schema_arrow.names)
        return file.read(columns)


def _read_csv(path: Path, columns: list[str], types: dict[str, pa.DataType]) -> pa.Table:
    convert = csv.ConvertOptions(column_types=types, strings_can_be_null=True)
    try:
        table = csv.read_csv(path, convert_options=convert)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"kuairand: {path} is not readable as CSV: {error}") from error
    _require(path, columns, table.column_names)
    return table


def _require(path: Path, columns: list[str], present: list[str]) -> None:
    missing = [c for c in columns if c not in present]
    if missing:
        raise DataError(f"kuairand: {path} lacks the columns {', '.join(missing)}; it has {', '.join(present)}")


def _cut(file: Path) -> str:
    """The day YYYYMMDD a history file ends before, of its name."""
    named = re.search(r"_before_(\d{8})\.parquet$", file.name)
    if named is None:
        raise DataError(f"kuairand: expected a name such as history_before_20220425.parquet, got {file.name}")
    return named.group(1)


def _write(table: pa.Table, path: Path) -> None:
    building = path.with_name(f".{path.name}")
    pq.write_table(table, building, row_group_size=_ROW_GROUP, compression="zstd")
    os.replace(building, path)
