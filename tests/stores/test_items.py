import time
from pathlib import Path

import lmdb
import pytest

from prerank.errors import DataError
from prerank.stores.items import ItemStore
from prerank.stores.user_file import key_of
from prerank.types import ItemChange


def test_changes_are_merged_and_read_back_by_rising_item_id(tmp_path: Path) -> None:
    path = tmp_path / "items.lmdb"
    with ItemStore.open(path) as store:
        store.put([ItemChange(7, on=False), ItemChange(-3, values={"bid": 2.0})])
        store.put([ItemChange(7, pacing=0.5, values={"bid": 1.5}), ItemChange(7, values={"worth": 3.0})])
    with ItemStore.open(path) as again:
        assert [one.change for one in again.all()] == [
            ItemChange(-3, values={"bid": 2.0}),
            ItemChange(7, on=False, pacing=0.5, values={"bid": 1.5, "worth": 3.0}),
        ]


def test_an_item_that_comes_is_anew_and_says_when_and_one_that_leaves_is_nothing_else(tmp_path: Path) -> None:
    with ItemStore.open(tmp_path / "items.lmdb") as store:
        before = time.time_ns()
        store.put([ItemChange(7, on=False, values={"bid": 2.0}), ItemChange(8, pacing=0.5), ItemChange(9, pacing=0.5)])
        after = store.put([ItemChange(7, columns={"bid": 9, "tags": ["a", None]}), ItemChange(8, removed=True)])
        assert after == [ItemChange(7, on=False, columns={"bid": 9, "tags": ["a", None]}), ItemChange(8, removed=True)]
        assert store.put([ItemChange(7, values={"bid": 3.0}), ItemChange(7, pacing=2.0)]) == [
            ItemChange(7, on=False, pacing=2.0, values={"bid": 3.0}, columns={"bid": 9, "tags": ["a", None]})
        ]
        times = {one.change.item_id: one.time_ns for one in store.all()}
        assert before <= times[7] == times[8] <= time.time_ns()
        assert times[9] == 0


def test_a_file_that_is_no_store_is_refused_and_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "items.lmdb"
    path.write_bytes(b"not a database at all, but long enough to be read as one" * 100)
    with pytest.raises(DataError, match=r"not a store of items: .*; move it away to start an empty one"):
        ItemStore.open(path)


def test_a_record_that_is_damaged_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "items.lmdb"
    with lmdb.open(str(path), subdir=False) as env, env.begin(write=True) as turn:
        turn.put(key_of(1), b'{"on": 3}')
    with ItemStore.open(path) as store, pytest.raises(DataError, match="a record is damaged"):
        list(store.all())
