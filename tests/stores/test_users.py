import struct
from collections.abc import Iterator
from pathlib import Path

import lmdb
import msgspec
import numpy as np
import pyarrow as pa
import pytest

from prerank.errors import DataError
from prerank.stores import user_file
from prerank.stores.records import BEFORE_ALL_MS
from prerank.stores.user_file import Events, key_of
from prerank.stores.users import UserStore


def event(user_id: int, *rows: tuple[int, int, int], late_ms: int = 0) -> Events:
    """Item, time and flags of each; labels were known `late_ms` later."""
    columns = np.array(rows, np.int64).reshape(-1, 3).T
    return user_id, columns[0], columns[1], columns[1] + late_ms, columns[2].astype(np.uint32)


def world() -> pa.Table:
    return pa.table(
        {
            "user_id": pa.array([7, -3, 2**40], pa.int64()),
            "country": ["de", None, "fr"],
            "age": pa.array([31, 4, None], pa.int16()),
            "spend": [0.5, 1.5, 2.5],
            "is_new": [True, False, None],
            "likes": [["a", "b"], [], None],
            "vector": pa.array([[1.0, 2.0]] * 3, pa.list_(pa.float32(), 2)),
        }
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "users.lmdb"
    UserStore.write(
        path, world(), [event(-3, (11, 500, 1), (10, 400, 3), late_ms=30), event(7)], labels=["click", "buy"]
    )
    return path


def raw(path: Path, pairs: dict[bytes, bytes]) -> None:
    with lmdb.open(str(path), subdir=False, lock=False) as env, env.begin(write=True) as transaction:
        for key, value in pairs.items():
            transaction.put(key, value)


def test_what_is_written_is_read(path: Path) -> None:
    with UserStore.open(path) as store:
        assert store.columns == ("user_id", "country", "age", "spend", "is_new", "likes", "vector")
        assert store.labels == ("click", "buy")
        assert len(store) == 3
        record = store.get(-3)
        assert record is not None
        assert record.profile == {
            "user_id": -3,
            "country": None,
            "age": 4,
            "spend": 1.5,
            "is_new": False,
            "likes": [],
            "vector": [1.0, 2.0],
        }
        seven = store.get(7)
        assert seven is not None
        assert seven.profile["likes"] == ["a", "b"]
        assert len(seven.item_ids) == len(seven.time_ms) == len(seven.flags) == 0


def test_events_come_back_oldest_first_with_their_types(path: Path) -> None:
    with UserStore.open(path) as store:
        record = store.get(-3)
    assert record is not None
    assert record.item_ids.tolist() == [10, 11]
    assert record.time_ms.tolist() == [400, 500]
    assert record.known_ms.tolist() == [430, 530]
    assert record.flags.tolist() == [3, 1]
    kinds = [column.dtype for column in (record.item_ids, record.time_ms, record.known_ms, record.flags)]
    assert kinds == [np.int64, np.int64, np.int64, np.uint32]


def test_a_store_says_when_its_last_event_was(path: Path, tmp_path: Path) -> None:
    with UserStore.open(path) as store:
        assert store.until_ms == 500
    UserStore.write(tmp_path / "s", world(), [event(7)], labels=[])
    with UserStore.open(tmp_path / "s") as store:
        assert store.until_ms == BEFORE_ALL_MS


def test_events_of_one_moment_keep_their_order(tmp_path: Path) -> None:
    UserStore.write(tmp_path / "s", world(), [event(7, (3, 9, 0), (1, 9, 0), (2, 8, 0))], labels=[])
    with UserStore.open(tmp_path / "s") as store:
        record = store.get(7)
    assert record is not None
    assert record.item_ids.tolist() == [2, 3, 1]


def test_a_stranger_is_none_over_the_whole_range_of_ids(path: Path) -> None:
    with UserStore.open(path) as store:
        assert [store.get(u) for u in (0, 8, -(2**63), 2**63 - 1)] == [None] * 4


def test_the_last_and_the_first_id_there_can_be_are_users_as_others(tmp_path: Path) -> None:
    ends = [-(2**63), 2**63 - 1]
    UserStore.write(tmp_path / "s", pa.table({"user_id": ends}), [], labels=[])
    with UserStore.open(tmp_path / "s") as store:
        assert list(store.user_ids()) == ends
        assert store.get(ends[0]) is not None


def test_users_are_stored_by_ascending_id_whatever_the_tables_order(path: Path) -> None:
    with UserStore.open(path) as store:
        assert list(store.user_ids()) == [-3, 7, 2**40]


def test_the_map_grows_to_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_file, "_FIRST_MAP_BYTES", 1 << 16)
    monkeypatch.setattr(user_file, "_USERS_A_COMMIT", 16)
    table = pa.table({"user_id": range(200)})
    times = np.arange(300)
    UserStore.write(
        tmp_path / "s", table, ((u, times + u, times, times, times.astype(np.uint32)) for u in range(200)), labels=[]
    )
    assert (tmp_path / "s").stat().st_size > 1 << 20
    with UserStore.open(tmp_path / "s") as store:
        for user_id in range(200):
            record = store.get(user_id)
            assert record is not None
            assert np.array_equal(record.item_ids, times + user_id)


def test_a_reader_keeps_its_store_when_another_replaces_it(path: Path) -> None:
    with UserStore.open(path) as old:
        UserStore.write(path, pa.table({"user_id": [7], "country": ["it"]}), [], labels=[])
        with UserStore.open(path) as new:
            before, after = old.get(7), new.get(7)
        assert before is not None
        assert after is not None
        assert before.profile["country"] == "de"
        assert after.profile == {"user_id": 7, "country": "it"}
        assert old.get(-3) is not None


def test_one_store_may_be_open_many_times_and_each_closes_alone(path: Path) -> None:
    first, second = UserStore.open(path), UserStore.open(path)
    first.close()
    first.close()
    assert second.get(7) is not None
    second.close()
    with UserStore.open(path) as third:
        assert third.get(7) is not None


def test_a_closed_store_is_our_own_mistake_to_ask(path: Path) -> None:
    store = UserStore.open(path)
    store.close()
    with pytest.raises(AssertionError, match="the store is closed"):
        store.get(7)


def test_a_write_that_fails_leaves_the_old_store_and_nothing_beside(path: Path) -> None:
    def breaks() -> Iterator[Events]:
        yield event(-3)
        raise RuntimeError("the log ended")

    with pytest.raises(RuntimeError, match="the log ended"):
        UserStore.write(path, world(), breaks(), labels=[])
    assert [p.name for p in path.parent.iterdir()] == ["users.lmdb"]
    with UserStore.open(path) as store:
        assert store.labels == ("click", "buy")


@pytest.mark.parametrize(
    ("events", "says"),
    [
        ([event(8)], "events of user 8: the users table has no such user"),
        ([event(2**41)], "events of user 2199023255552: the users table has no such user"),
        ([event(7), event(-3)], "found -3 after 7"),
        ([event(7), event(7)], "found 7 after 7"),
        (
            [(7, np.zeros(2), np.zeros(1), np.zeros(3), np.zeros(2))],
            "2 item_ids, 1 times, 3 times of knowing and 2 flags",
        ),
        ([event(7, (1, 9, 0), late_ms=-1)], "user 7: expected labels known at their event or later, found some before"),
    ],
)
def test_events_that_cannot_be_joined_are_refused(tmp_path: Path, events: list[Events], says: str) -> None:
    with pytest.raises(DataError, match=says):
        UserStore.write(tmp_path / "s", world(), events, labels=[])


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"uid": [1]}, r"expected a column 'user_id', found \['uid'\]"),
        ({"user_id": ["a"]}, "expected integers without nulls, found string"),
        ({"user_id": [1, None]}, "expected integers without nulls, found int64 with 1"),
        ({"user_id": [1, 2, 1]}, "expected each user once, found 1 again"),
        (
            {"user_id": [1], "x": [{"a": 1}]},
            "users.x: expected text, numbers, booleans or lists of these, found struct",
        ),
    ],
)
def test_tables_that_cannot_be_stored_are_refused(tmp_path: Path, table: dict[str, list[object]], says: str) -> None:
    with pytest.raises(DataError, match=says):
        UserStore.write(tmp_path / "s", pa.table(table), [], labels=[])


def test_more_labels_than_bits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected at most 31, one bit each, found 32"):
        UserStore.write(tmp_path / "s", world(), [], labels=[f"l{n}" for n in range(32)])


def test_a_folder_in_the_way_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a file to replace, found a folder"):
        UserStore.write(tmp_path, world(), [], labels=[])


def test_no_store_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected a user store .* found none"):
        UserStore.open(tmp_path / "none")


@pytest.mark.parametrize("content", [b"", b"hello", b"\x00" * 20_000, bytes(range(256)) * 100])
def test_a_file_that_is_no_lmdb_is_a_clear_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "s").write_bytes(content)
    with pytest.raises(DataError, match="but it is not one"):
        UserStore.open(tmp_path / "s")


@pytest.mark.parametrize("share", [0.3, 0.6, 0.99])
def test_a_file_cut_short_is_a_clear_error_and_no_crash(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(DataError, match=r"it is cut short|it is not one"):
        UserStore.open(path)


def test_another_lmdb_file_is_a_clear_error(tmp_path: Path) -> None:
    raw(tmp_path / "s", {b"other": b"1"})
    with pytest.raises(DataError, match="an LMDB file, but not a user store"):
        UserStore.open(tmp_path / "s")


@pytest.mark.parametrize("other", [1, 9])
def test_another_format_is_a_clear_error(tmp_path: Path, other: int) -> None:
    """The first one too, which had neither `known_ms` nor `until_ms`."""
    meta = {"format": other, "user_id": "u", "columns": [], "labels": [], "num_users": 0}
    raw(tmp_path / "s", {b"meta": msgspec.msgpack.encode(meta)})
    with pytest.raises(DataError, match=f"expected user store format 2, found {other}"):
        UserStore.open(tmp_path / "s")


def test_damaged_names_are_a_clear_error(tmp_path: Path) -> None:
    raw(tmp_path / "s", {b"meta": b"\xc1"})
    with pytest.raises(DataError, match="the user store is damaged"):
        UserStore.open(tmp_path / "s")


@pytest.mark.parametrize("value", [b"", b"abc", struct.pack("<II", 3, 0), struct.pack("<II", 0, 9) + b"123"])
def test_a_damaged_record_is_a_clear_error(path: Path, value: bytes) -> None:
    raw(path, {key_of(7): value})
    with UserStore.open(path) as store, pytest.raises(DataError, match="the record of user 7 is damaged"):
        store.get(7)


@pytest.mark.parametrize("profile", [b"\xc1", msgspec.msgpack.encode({"a": 1}), msgspec.msgpack.encode([1])])
def test_a_damaged_profile_is_a_clear_error(path: Path, profile: bytes) -> None:
    raw(path, {key_of(7): struct.pack("<II", 0, len(profile)) + profile})
    with UserStore.open(path) as store, pytest.raises(DataError, match="the profile of user 7 is damaged"):
        store.get(7)


def test_a_damaged_page_is_a_clear_error_for_its_users(tmp_path: Path) -> None:
    path, page = tmp_path / "s", 4096
    UserStore.write(path, pa.table({"user_id": range(3000), "age": range(3000)}), [], labels=[])
    content = bytearray(path.read_bytes())
    content[10 * page : 11 * page] = bytes(page)
    path.write_bytes(content)
    with UserStore.open(path) as store:
        answers = [damage_of(store, user_id) for user_id in range(3000)]
    damaged = [told for told in answers if told]
    assert 0 < len(damaged) < 3000
    assert all("the user store is damaged" in told for told in damaged)


def damage_of(store: UserStore, user_id: int) -> str:
    try:
        assert store.get(user_id) is not None
    except DataError as error:
        return str(error)
    return ""
