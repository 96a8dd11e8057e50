from collections.abc import Iterator
from pathlib import Path

import lmdb
import numpy as np
import pyarrow as pa
import pytest

from prerank.errors import DataError
from prerank.stores import user_file
from prerank.stores.user_file import Events
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


def test_a_folder_in_the_way_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a file to replace, found a folder"):
        UserStore.write(tmp_path, world(), [], labels=[])


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
