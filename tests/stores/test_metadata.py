import datetime
import decimal
import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from prerank.errors import DataError
from prerank.stores.metadata import READY, MetadataTable, write_metadata


def write(path: Path, table: pa.Table, max_chunksize: int | None = None) -> Path:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=max_chunksize)
    return path


def items() -> pa.Table:
    return pa.table(
        {
            "item_id": [10, 20, 30, 40],
            "title": ["a", None, "c", "d"],
            "bid": pa.array([1, 2, None, 4], pa.int32()),
            "ctr": [0.5, math.nan, None, math.inf],
            "is_new": [True, False, None, True],
            "tags": [["x"], [], None, ["y", "z"]],
            "genre": pa.array(["g", "h", "g", None]).dictionary_encode(),
        }
    )


@pytest.mark.parametrize("max_chunksize", [None, 1, 3])
def test_rows_come_back_in_the_order_asked_whatever_the_batches(tmp_path: Path, max_chunksize: int | None) -> None:
    table = MetadataTable.open(write(tmp_path / "m.arrow", items(), max_chunksize))
    assert table.num_rows == 4
    taken = table.take(np.array([3, 0, 3]), ["title", "item_id"])
    assert taken == [{"title": "d", "item_id": 40}, {"title": "a", "item_id": 10}, {"title": "d", "item_id": 40}]
    assert list(taken[0]) == ["title", "item_id"]


def test_no_columns_named_means_all_and_every_kind_is_json(tmp_path: Path) -> None:
    table = MetadataTable.open(write(tmp_path / "m.arrow", items()))
    first, second, third, fourth = table.take(np.arange(4))
    assert first == {
        "item_id": 10,
        "title": "a",
        "bid": 1,
        "ctr": 0.5,
        "is_new": True,
        "tags": ["x"],
        "genre": "g",
    }
    assert (second["ctr"], fourth["ctr"], fourth["genre"]) == (None, None, None)
    assert set(third.values()) == {30, "c", None, "g"}
    assert json.loads(json.dumps([dict(one) for one in (first, second, third, fourth)], allow_nan=False))


def test_dates_and_decimals_become_text(tmp_path: Path) -> None:
    table = pa.table({"day": [datetime.date(2022, 4, 25)], "price": [decimal.Decimal("1.50")]})
    assert MetadataTable.open(write(tmp_path / "m", table)).take(np.array([0])) == [
        {"day": "2022-04-25", "price": "1.50"}
    ]


def test_no_rows_are_no_rows(tmp_path: Path) -> None:
    assert MetadataTable.open(write(tmp_path / "m", items())).take(np.array([], np.int64)) == []


def test_an_unknown_column_names_the_nearest(tmp_path: Path) -> None:
    table = MetadataTable.open(write(tmp_path / "m", items()))
    with pytest.raises(DataError, match=r"expected a column of .*, got 'titel'; did you mean \"title\"\?"):
        table.take(np.array([0]), ["titel"])


def test_a_column_json_cannot_carry_is_refused_at_open(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"column 'x' is struct<a: int64>, .* leave it out with \[metadata\] columns"):
        MetadataTable.open(write(tmp_path / "m", pa.table({"x": [{"a": 1}]})))


def test_no_file_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found none"):
        MetadataTable.open(tmp_path / "none.arrow")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.95])
def test_a_damaged_file_is_a_clear_error(tmp_path: Path, share: float) -> None:
    path = write(tmp_path / "m", items())
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(DataError, match="it is not one"):
        MetadataTable.open(path)


def test_a_row_of_another_version_is_our_own_mistake(tmp_path: Path) -> None:
    table = MetadataTable.open(write(tmp_path / "m", items()))
    with pytest.raises(IndexError):
        table.take(np.array([4]))


ALL = ["item_id", "title", "bid", "ctr", "is_new", "tags", "genre"]


def written(path: Path, table: pa.Table, ready: list[str]) -> MetadataTable:
    write_metadata(path, table, ready)
    return MetadataTable.open(path)


@pytest.mark.parametrize("ready", [ALL, ["title"], ["genre", "ctr"], []])
def test_json_is_that_of_the_columns_whether_it_is_ready_or_not(tmp_path: Path, ready: list[str]) -> None:
    table = written(tmp_path / "m", items(), ready)
    assert list(table.columns) == ALL
    rows = np.array([3, 0, 3, 1])
    for names in (ALL, ["title"], ["ctr", "genre"], ["genre", "ctr"]):
        said = [json.loads(bytes(one)) for one in table.take_json(rows, names)]
        assert said == table.take(rows, names)
        assert [list(one) for one in said] == [names] * len(rows)
    assert [bytes(one) for one in table.take_json(rows, [])] == [b"{}"] * len(rows)
    assert table.take_json(np.zeros(0, np.int64), ALL) == []


def test_ready_json_is_found_in_the_file_and_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = written(tmp_path / "m", items(), ["title", "bid"])
    monkeypatch.setattr(table, "take", None)
    assert [bytes(one) for one in table.take_json(np.array([1, 0]), ["title", "bid"])] == [
        b'{"title":null,"bid":2}',
        b'{"title":"a","bid":1}',
    ]


def test_items_that_came_later_are_said_among_those_of_the_file(tmp_path: Path) -> None:
    table = written(tmp_path / "m", items().select(["title", "bid"]), ["title", "bid"])
    table.put([4, 6], pa.table({"title": ["new", None], "bid": pa.array([7, 8], pa.int32())}))
    said = [json.loads(bytes(one)) for one in table.take_json(np.array([6, 0, 4]), ["title", "bid"])]
    assert said == [{"title": None, "bid": 8}, {"title": "a", "bid": 1}, {"title": "new", "bid": 7}]


def test_many_rows_are_each_their_own(tmp_path: Path) -> None:
    num = 20_000  # more than are made at once
    table = written(
        tmp_path / "m", pa.table({"n": range(num), "text": [f"é{n}" * (n % 5) for n in range(num)]}), ["text"]
    )
    rows = np.random.default_rng(0).permutation(num)[:500]
    assert [json.loads(bytes(one))["text"] for one in table.take_json(rows, ["text"])] == [
        f"é{n}" * (n % 5) for n in rows
    ]


def test_a_file_without_ready_json_still_answers(tmp_path: Path) -> None:
    """As one published by an earlier prerank, or one in several batches."""
    for chunks in (None, 2):
        table = MetadataTable.open(write(tmp_path / "m", items(), chunks))
        assert bytes(table.take_json(np.array([2]), ["title", "ctr"])[0]) == b'{"title":"c","ctr":null}'


@pytest.mark.parametrize("rows", [[4], [-1], [0, 400]])
def test_ready_json_of_a_row_of_another_version_is_our_own_mistake(tmp_path: Path, rows: list[int]) -> None:
    with pytest.raises(IndexError):
        written(tmp_path / "m", items(), ALL).take_json(np.array(rows), ALL)


def test_a_column_of_the_name_of_our_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"has a column '{READY}', which is the name of our own; rename it"):
        write_metadata(tmp_path / "m", pa.table({READY: [1]}), [])
    with pytest.raises(DataError, match="got 'titel'"):
        write_metadata(tmp_path / "m", items(), ["titel"])


def test_a_table_of_no_rows_is_written(tmp_path: Path) -> None:
    assert written(tmp_path / "m", items().slice(0, 0), ALL).num_rows == 0
