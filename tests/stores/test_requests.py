"""A log of requests comes back as it was written, and nothing else is taken for one."""

import re
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prerank.errors import DataError
from prerank.stores.records import EXPOSED, UserRecord
from prerank.stores.request_files import read_requests, request_files, write_requests
from prerank.stores.requests import LoggedRequest, as_of, digest_of

RECORD = UserRecord(
    profile={"user_id": 7, "country": "de", "topics": ["a", None], "age": 3.25, "premium": True, "big": 2**63},
    item_ids=np.array([100, -5, 102]),
    time_ms=np.array([10, 20, 30]),
    known_ms=np.array([10, 25, 31]),
    flags=np.array([EXPOSED | 1, EXPOSED | 2, 1], np.uint32),
    contexts=np.array([[1, 2], [3, 4], [0, -6]]),
)
ROW = LoggedRequest(
    request_id="r-ä",
    time_ms=40,
    user_id=-7,
    version="v1",
    k=5,
    exclude=(3, 2**63 - 1),
    deadline_ms=50.0,
    context={"hour": 1, "surface": None, "tags": ["x"]},
    record=RECORD,
    labels=("is_click", "is_like"),
    context_columns=("surface", "hour"),
    digest=2**64 - 1,
    item_ids=np.array([100, 101]),
    utility=np.array([2.5, np.nan], np.float32),
    tasks=("click", "like", "buy"),
    probs=np.arange(6, dtype=np.float32).reshape(2, 3),
    value_names=("bid_micros",),
    values=np.array([[5.0], [6.0]], np.float32),
    pacing=np.array([1.0, 0.5], np.float32),
    generators=("index", "dear"),
    found_by=np.array([1, 3], np.int32),
    num_candidates=6,
    lost_item_ids=np.array([103]),
    lost_similarity=np.array([0.25], np.float32),
    degraded=True,
    notes=("a note",),
    ms=1.5,
    stages=(("target", 0.0, 0.25, 8, 6), ("rank", 0.5, 1.0, 6, 2)),
)
NOBODY = replace(
    ROW,
    record=None,
    deadline_ms=None,
    exclude=(),
    context={},
    item_ids=np.zeros(0, np.int64),
    utility=np.zeros(0, np.float32),
    probs=np.zeros((0, 3), np.float32),
    value_names=(),
    values=np.zeros((0, 0), np.float32),
    pacing=np.zeros(0, np.float32),
    found_by=np.zeros(0, np.int32),
    lost_item_ids=np.zeros(0, np.int64),
    lost_similarity=np.zeros(0, np.float32),
    notes=(),
    stages=(),
)


def assert_same(one: object, other: object) -> None:
    """Two values of one dataclass, arrays compared with their types and shapes."""
    for f in fields(one):  # type: ignore[arg-type]
        mine, theirs = getattr(one, f.name), getattr(other, f.name)
        if isinstance(mine, np.ndarray):
            np.testing.assert_array_equal(mine, theirs, err_msg=f.name)
            assert mine.dtype == theirs.dtype, f.name
        elif isinstance(mine, UserRecord):
            assert_same(mine, theirs)
        else:
            assert mine == theirs, f.name


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    write_requests(tmp_path, "requests-1.parquet", [ROW, NOBODY])
    write_requests(tmp_path, "requests-2.parquet", [NOBODY] * 1500 + [ROW])
    assert {one.name for one in tmp_path.iterdir()} == {"requests-1.parquet", "requests-2.parquet"}
    found = list(read_requests(request_files(tmp_path)))
    assert len(found) == 2 + 1501
    for one, row in zip([found[0], found[1], found[2], found[-1]], [ROW, NOBODY, NOBODY, ROW], strict=True):
        assert_same(row, one)


def test_any_tool_that_reads_parquet_reads_it(tmp_path: Path) -> None:
    table = pq.read_table(write_requests(tmp_path, "requests-1.parquet", [ROW]))
    assert table["item_ids"].to_pylist() == [[100, 101]]
    assert table["probs"].to_pylist() == [[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]]
    assert table["profile"].to_pylist()[0].startswith('{"user_id": 7, "country": "de"')
    assert table["stages"].to_pylist()[0][1] == {"name": "rank", "start_ms": 0.5, "ms": 1.0, "in": 6, "out": 2}


def test_as_of_a_moment_there_is_nothing_of_it_or_later() -> None:
    found = as_of(RECORD, 25)
    assert found.item_ids.tolist() == [100, -5]
    assert found.flags.tolist() == [EXPOSED | 1, EXPOSED], "a label that was known at the moment is not yet known"
    assert as_of(RECORD, 26).flags.tolist() == [EXPOSED | 1, EXPOSED | 2]
    assert as_of(RECORD, 10).item_ids.tolist() == []
    assert_same(as_of(RECORD, 100), RECORD)


def test_a_digest_tells_names_types_shapes_and_values_apart() -> None:
    one = {"a": np.array([1, 2], np.int32), "b": np.array([0.0], np.float32)}
    others = [
        {"a": np.array([1, 3], np.int32), "b": one["b"]},
        {"a": np.array([1, 2], np.int64), "b": one["b"]},
        {"a": np.array([[1, 2]], np.int32), "b": one["b"]},
        {"c": one["a"], "b": one["b"]},
        {"b": one["b"]},
        {"a": one["a"], "b": np.array([-0.0], np.float32)},
    ]
    assert digest_of(one) == digest_of(dict(reversed(one.items())))
    assert digest_of(one) not in [digest_of(other) for other in others]


def test_no_folder_and_an_empty_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a folder that `prerank serve --log-requests` wrote"):
        request_files(tmp_path / "nowhere")
    (tmp_path / "notes.txt").touch()
    (tmp_path / ".requests-1.parquet-0011").touch()  # being written
    with pytest.raises(DataError, match=r"expected files requests-\*\.parquet, found none"):
        request_files(tmp_path)


def test_what_is_no_log_of_requests_is_refused_with_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "requests-1.parquet"
    pq.write_table(pa.table({"user_id": [1], "clicks": [2]}), path)
    with pytest.raises(DataError, match="no log of requests: it has the columns user_id, clicks"):
        list(read_requests([path]))
    path.write_text("not parquet")
    with pytest.raises(DataError, match=re.escape(f"{path}: expected a Parquet file of a log of requests")):
        list(read_requests([path]))
    whole = write_requests(tmp_path, "requests-2.parquet", [ROW] * 300)
    whole.write_bytes(whole.read_bytes()[:-9])
    with pytest.raises(DataError, match="expected a Parquet file of a log of requests"):
        list(read_requests([whole]))


def test_another_format_or_a_missing_column_is_refused_by_name(tmp_path: Path) -> None:
    table = pq.read_table(write_requests(tmp_path, "requests-1.parquet", [ROW]))
    path = tmp_path / "requests-2.parquet"
    pq.write_table(table.replace_schema_metadata({b"prerank.requests": b"9"}), path)
    with pytest.raises(DataError, match="expected format 1 of the log of requests, found 9"):
        list(read_requests([path]))
    pq.write_table(table.drop_columns(["digest"]), path)
    with pytest.raises(DataError, match="it has no column digest of uint64"):
        list(read_requests([path]))


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no-such"):
        write_requests(tmp_path / "no-such", "requests-1.parquet", [ROW])
    (tmp_path / "requests-1.parquet").mkdir()  # what it cannot replace
    with pytest.raises(OSError, match="requests-1"):
        write_requests(tmp_path, "requests-1.parquet", [ROW])
    assert [one.name for one in tmp_path.iterdir()] == ["requests-1.parquet"]
