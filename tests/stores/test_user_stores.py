"""One suite for every place where users are kept: what the log knows of each."""

import struct
from collections.abc import Iterator

import msgspec
import numpy as np
import pyarrow as pa
import pytest

from prerank.errors import DataError
from prerank.stores.records import BEFORE_ALL_MS
from prerank.stores.user_file import META, Events, key_of
from tests.stores.places import Place
from tests.stores.places import place as place
from tests.stores.test_users import event, world

LOG = [event(-3, (11, 500, 1), (10, 400, 3), late_ms=30), event(7)]


@pytest.fixture
def filled(place: Place) -> Place:
    place.write(world(), LOG, labels=["click", "buy"])
    return place


def test_what_is_written_is_read(filled: Place) -> None:
    store = filled.users()
    assert store.columns == ("user_id", "country", "age", "spend", "is_new", "likes", "vector")
    assert store.labels == ("click", "buy")
    assert len(store) == 3
    record = store.get(-3)
    assert record is not None
    assert record.profile == store.profile(-3)
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
    store.close()


def test_events_come_back_oldest_first_with_their_types(filled: Place) -> None:
    store = filled.users()
    record = store.get(-3)
    store.close()
    assert record is not None
    assert record.item_ids.tolist() == [10, 11]
    assert record.time_ms.tolist() == [400, 500]
    assert record.known_ms.tolist() == [430, 530]
    assert record.flags.tolist() == [3, 1]
    kinds = [column.dtype for column in (record.item_ids, record.time_ms, record.known_ms, record.flags)]
    assert kinds == [np.int64, np.int64, np.int64, np.uint32]


def test_a_store_says_when_its_last_event_was(place: Place) -> None:
    for events, until_ms in ((LOG, 500), ([event(7)], BEFORE_ALL_MS)):
        place.write(world(), events, labels=["click", "buy"])
        store = place.users()
        assert store.until_ms == store.tidy() == until_ms
        store.close()


def test_each_event_has_its_context_columns(place: Place) -> None:
    tabs, surfaces = np.array([5, 6]), np.array([-1, 0])
    place.write(world(), [(*event(7, (1, 20, 1), (2, 10, 1)), tabs, surfaces)], labels=["l"], contexts=["tab", "on"])
    store = place.users()
    record = store.get(7)
    assert record is not None
    assert (store.contexts, record.contexts.tolist()) == (("tab", "on"), [[6, 0], [5, -1]])
    store.close()


def test_events_of_one_moment_keep_their_order(place: Place) -> None:
    place.write(world(), [event(7, (3, 9, 0), (1, 9, 0), (2, 8, 0))], labels=[])
    store = place.users()
    record = store.get(7)
    store.close()
    assert record is not None
    assert record.item_ids.tolist() == [2, 3, 1]


def test_a_stranger_is_none_over_the_whole_range_of_ids(filled: Place) -> None:
    store = filled.users()
    for user in (0, 8, -(2**63), 2**63 - 1):
        assert store.get(user) is None
        assert store.profile(user) is None
    store.close()


def test_the_last_and_the_first_id_there_can_be_are_users_as_others(place: Place) -> None:
    ends = [-(2**63), 2**63 - 1]
    place.write(pa.table({"user_id": ends}), [], labels=[])
    store = place.users()
    assert [store.profile(one) for one in ends] == [{"user_id": one} for one in ends]
    store.close()


def test_a_reader_keeps_its_store_when_another_replaces_it(filled: Place) -> None:
    old = filled.users()
    filled.write(pa.table({"user_id": [7], "country": ["it"]}), [], labels=[])
    new = filled.users()
    before, after = old.get(7), new.get(7)
    assert before is not None
    assert after is not None
    assert before.profile["country"] == "de"
    assert after.profile == {"user_id": 7, "country": "it"}
    assert old.get(-3) is not None
    assert new.get(-3) is None
    old.close()
    assert new.profile(7) == {"user_id": 7, "country": "it"}
    new.close()


def test_one_store_may_be_open_many_times_and_each_closes_alone(filled: Place) -> None:
    first, second = filled.users(), filled.users()
    first.close()
    first.close()
    assert second.get(7) is not None
    second.close()
    third = filled.users()
    assert third.get(7) is not None
    third.close()


def test_a_write_that_fails_leaves_the_store_that_was_there(filled: Place) -> None:
    def breaks() -> Iterator[Events]:
        yield event(-3)
        raise RuntimeError("the log ended")

    with pytest.raises(RuntimeError, match="the log ended"):
        filled.write(world(), breaks(), labels=[])
    store = filled.users()
    assert store.labels == ("click", "buy")
    assert store.get(-3) is not None
    store.close()


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
def test_events_that_cannot_be_joined_are_refused(place: Place, events: list[Events], says: str) -> None:
    with pytest.raises(DataError, match=says):
        place.write(world(), events, labels=[])


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
def test_tables_that_cannot_be_stored_are_refused(place: Place, table: dict[str, list[object]], says: str) -> None:
    with pytest.raises(DataError, match=says):
        place.write(pa.table(table), [], labels=[])


def test_more_labels_than_bits_are_refused(place: Place) -> None:
    with pytest.raises(DataError, match="expected at most 31, one bit each, found 32"):
        place.write(world(), [], labels=[f"l{n}" for n in range(32)])


def test_no_store_is_a_clear_error(place: Place) -> None:
    with pytest.raises(DataError, match=r"expected (a user store|the users of funnel 'tiny').*found none.*publish"):
        place.users()


@pytest.mark.parametrize("other", [1, 9])
def test_another_format_is_a_clear_error(filled: Place, other: int) -> None:
    """The first one too, which had neither `known_ms` nor `until_ms`."""
    meta = {"format": other, "user_id": "u", "columns": [], "labels": [], "num_users": 0}
    filled.put_user(META, msgspec.msgpack.encode(meta))
    with pytest.raises(DataError, match=f"expected user store format 2, found {other}; load"):
        filled.users()


@pytest.mark.parametrize("meta", [b"\xc1", b"", msgspec.msgpack.encode({"format": 2})])
def test_damaged_names_are_a_clear_error(filled: Place, meta: bytes) -> None:
    filled.put_user(META, meta)
    with pytest.raises(DataError, match="the user store is damaged"):
        filled.users()


@pytest.mark.parametrize("value", [b"", b"abc", struct.pack("<II", 3, 0), struct.pack("<II", 0, 9) + b"123"])
def test_a_damaged_record_is_a_clear_error(filled: Place, value: bytes) -> None:
    filled.put_user(key_of(7), value)
    store = filled.users()
    for read in (store.get, store.profile):
        with pytest.raises(DataError, match="the record of user 7 is damaged"):
            read(7)
    assert store.get(-3) is not None
    store.close()


@pytest.mark.parametrize("profile", [b"\xc1", msgspec.msgpack.encode({"a": 1}), msgspec.msgpack.encode([1])])
def test_a_damaged_profile_is_a_clear_error(filled: Place, profile: bytes) -> None:
    filled.put_user(key_of(7), struct.pack("<II", 0, len(profile)) + profile)
    store = filled.users()
    with pytest.raises(DataError, match="the profile of user 7 is damaged"):
        store.get(7)
    store.close()
