import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lmdb
import msgspec
import pytest

from prerank.errors import DataError
from prerank.stores import events as module
from prerank.stores.event_rows import row_of
from prerank.stores.events import EventStore, LiveEvent
from prerank.stores.user_file import key_of

NAMES = ("impression", "click", "buy")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.lmdb"


@pytest.fixture
def store(path: Path) -> Iterator[EventStore]:
    store = EventStore.open(path, NAMES)
    yield store
    store.close()


def event(item_id: int, time_ms: int, name: str = "impression", event_id: str = "", user_id: int = 7) -> LiveEvent:
    return LiveEvent(user_id, item_id, name, time_ms, event_id)


def items(store: EventStore, user_id: int = 7) -> list[int]:
    return list(store.get(user_id)["item_id"].tolist())


def raw(path: Path, pairs: dict[bytes, bytes]) -> None:
    with lmdb.open(str(path), subdir=False) as env, env.begin(write=True) as transaction:
        for key, value in pairs.items():
            transaction.put(key, value)


def test_an_event_without_context_columns_takes_25_bytes_and_each_column_8() -> None:
    assert [row_of(n).itemsize for n in (0, 1, 3)] == [25, 33, 49]


def test_one_store_may_be_open_many_times_and_each_closes_alone(store: EventStore, path: Path) -> None:
    other = EventStore.open(path, NAMES)
    store.append([event(1, 10)])
    assert items(other) == [1]
    other.close()
    other.close()
    assert items(store) == [1]
    with pytest.raises(AssertionError, match="the store is closed"):
        other.get(7)


_WRITER = """
import sys
from pathlib import Path
from prerank.stores.events import EventStore, LiveEvent
store = EventStore.open(Path(sys.argv[1]), ["impression"])
for n in range(1_000_000):
    store.append([LiveEvent(n % 50, n, "impression", n)])
    print(n, flush=True)
"""


def test_what_was_appended_outlives_a_process_that_is_killed(path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        last = next(int(line) for line in process.stdout if int(line) >= 300)
        os.kill(process.pid, signal.SIGKILL)
        last = max([last, *(int(line) for line in process.stdout if line.endswith("\n"))])
    assert process.returncode == -signal.SIGKILL
    store = EventStore.open(path, ["impression"])
    found = {item for user in range(50) for item in items(store, user)}
    assert set(range(last + 1)) <= found <= set(range(last + 2))
    store.append([event(1, 1, user_id=99)])
    store.close()


def test_another_process_reads_and_writes_beside(store: EventStore, path: Path) -> None:
    store.append([event(1, 10)])
    program = """
import sys
from pathlib import Path
from prerank.stores.events import EventStore, LiveEvent
store = EventStore.open(Path(sys.argv[1]), ["impression"])
assert store.get(7)["item_id"].tolist() == [1]
store.append([LiveEvent(7, 2, "impression", 20)])
"""
    subprocess.run([sys.executable, "-c", program, str(path)], check=True)
    assert items(store) == [1, 2]


def test_no_more_room_is_a_clear_error_and_takes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAP_BYTES", 1 << 16)
    store = EventStore.open(path, NAMES)
    store.append([event(1, 10)])
    with pytest.raises(DataError, match=r"65536 bytes of events are there, and no more fit; load the log again"):
        store.append([event(n, n, user_id=n) for n in range(5000)])
    assert items(store) == [1]
    assert items(store, 8) == []
    store.close()


def test_a_folder_that_is_not_there_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected a store of events that can be written .* No such file"):
        EventStore.open(tmp_path / "none" / "events.lmdb", NAMES)


@pytest.mark.parametrize("content", [b"hello", b"\x00" * 20_000, bytes(range(256)) * 100])
def test_a_file_that_is_no_lmdb_is_a_clear_error(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(DataError, match="expected a store of events that can be written"):
        EventStore.open(path, NAMES)


def test_a_file_cut_short_is_a_clear_error_and_no_crash(store: EventStore, path: Path) -> None:
    store.append([event(n, n, user_id=n) for n in range(1000)])
    store.close()
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="it is cut short; move it away to start an empty one"):
        EventStore.open(path, NAMES)


def test_another_lmdb_file_is_a_clear_error(path: Path) -> None:
    raw(path, {b"other": b"1"})
    with pytest.raises(DataError, match="an LMDB file, but not a store of events"):
        EventStore.open(path, NAMES)


@pytest.mark.parametrize(
    ("meta", "says"),
    [
        (b"\xc1", "the store of events is damaged"),
        (msgspec.msgpack.encode({"format": 1}), "the store of events is damaged"),
        (msgspec.msgpack.encode({"format": 9}), "expected event store format 1, found 9; move it away"),
    ],
)
def test_another_format_or_damaged_names_are_a_clear_error(path: Path, meta: bytes, says: str) -> None:
    raw(path, {b"meta": meta})
    with pytest.raises(DataError, match=says):
        EventStore.open(path, NAMES)


def test_reading_never_waits_for_a_write(store: EventStore) -> None:
    store.append([event(1, 10)])
    with store._env.begin(write=True) as transaction, ThreadPoolExecutor(1) as pool:
        transaction.put(key_of(7), b"")
        start = time.perf_counter()
        assert pool.submit(items, store).result(timeout=10) == [1]
        assert time.perf_counter() - start < 5
        transaction.abort()
