"""One suite for every place where items are that are not in memory."""

import decimal
import time
from collections.abc import Iterator
from pathlib import Path

import lmdb
import pyarrow as pa
import pytest

from prerank.errors import DataError
from prerank.stores.redis_tail import RedisTail
from prerank.stores.tail import LmdbTail, TailStore
from prerank.stores.user_file import key_of
from tests.stores.redis_server import redis_server

ITEMS = pa.table(
    {
        "id": [7, -3, 2**60, 0],
        "brand": ["a", None, "ü", ""],
        "price": [1.5, 2.0, None, -1.0],
        "tags": [["x", "y"], [], None, ["z"]],
        "vector": [[0.1, 0.2], [0.3, 0.4], [0.5, 0.6], [0.7, 0.8]],
        "cost": [decimal.Decimal("1.25"), None, decimal.Decimal("3.50"), decimal.Decimal("0.00")],
    }
)
COLUMNS = ["brand", "price", "tags", "vector", "cost"]


@pytest.fixture(params=["lmdb", "redis"])
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[TailStore]:
    if request.param == "lmdb":
        LmdbTail.write(tmp_path / "tail.lmdb", ITEMS, "id", COLUMNS)
        with LmdbTail.open(tmp_path / "tail.lmdb") as store:
            yield store
        return
    with redis_server(tmp_path) as url:
        pytest.importorskip("redis")
        store = RedisTail.open(url, "market", 5.0)
        store.write(ITEMS, "id", COLUMNS)
        yield store
        store.close()


def test_every_item_comes_back_as_the_table_has_it_and_a_stranger_as_none(stored: TailStore) -> None:
    rows = {row.pop("id"): row for row in ITEMS.to_pylist()}
    expected = {i: {**row, "cost": None if row["cost"] is None else float(row["cost"])} for i, row in rows.items()}
    asked = [2**60, 5, -3, 7, 0, -(2**63)]
    assert stored.get(asked) == [expected.get(one) for one in asked]
    assert stored.get([]) == []


def test_more_than_the_first_map_holds_is_written(tmp_path: Path) -> None:
    num = 40_000
    items = pa.table({"id": range(num), "text": ["x" * 2000] * num})
    told: list[int] = []
    LmdbTail.write(tmp_path / "t", items, "id", ["text"], lambda what, done, total, unit: told.append(done))
    assert told[-1] == num
    with LmdbTail.open(tmp_path / "t") as store:
        first, last = store.get([0, num - 1])
        assert first == last == {"text": "x" * 2000}
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def test_who_reads_keeps_the_file_he_opened(tmp_path: Path) -> None:
    LmdbTail.write(tmp_path / "t", ITEMS, "id", ["brand"])
    with LmdbTail.open(tmp_path / "t") as old:
        LmdbTail.write(tmp_path / "t", ITEMS.slice(0, 1), "id", ["price"])
        assert old.get([0]) == [{"brand": ""}]
        with LmdbTail.open(tmp_path / "t") as new:
            assert new.get([0, 7]) == [None, {"price": 1.5}]


def test_what_is_no_store_is_refused_and_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"t: expected the items that are not in memory .* `prerank publish`"):
        LmdbTail.open(tmp_path / "t")
    (tmp_path / "t").write_bytes(b"no database at all" * 1000)
    with pytest.raises(DataError, match="but it is not one"):
        LmdbTail.open(tmp_path / "t")
    with lmdb.open(str(tmp_path / "d"), subdir=False) as env, env.begin(write=True) as turn:
        turn.put(key_of(1), b"[1, 2]")
    with LmdbTail.open(tmp_path / "d") as store, pytest.raises(DataError, match="d: expected a JSON object of columns"):
        store.get([1])


def test_a_redis_that_does_not_answer_is_said_in_time() -> None:
    pytest.importorskip("redis")
    start = time.monotonic()
    with pytest.raises(DataError, match=r"redis://127.0.0.1:1/0: expected a Redis that answers"):
        RedisTail.open("redis://127.0.0.1:1/0", "market", 0.1)
    with pytest.raises(DataError, match="expected a url such as redis://host:6379/0"):
        RedisTail.open("http://somewhere", "market", 0.1)
    assert time.monotonic() - start < 5


def test_a_redis_that_goes_away_is_an_error_of_ours(tmp_path: Path) -> None:
    pytest.importorskip("redis")
    with redis_server(tmp_path) as url:
        store = RedisTail.open(url, "market", 0.2)
        store.write(ITEMS, "id", COLUMNS)
    with pytest.raises(DataError, match="items cannot be read"):
        store.get([7])
    with pytest.raises(DataError, match="items cannot be written"):
        store.write(ITEMS, "id", COLUMNS)
