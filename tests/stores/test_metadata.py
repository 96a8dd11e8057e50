import datetime
import decimal
import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from prerank.errors import DataError
from prerank.stores.metadata import MetadataTable


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
