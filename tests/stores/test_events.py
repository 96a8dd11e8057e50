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
from prerank.stores.contexts import UNKNOWN, digest
from prerank.stores.event_rows import row_of
from prerank.stores.events import EventStore, LiveEvent
from prerank.stores.user_file import key_of
from prerank.types import Given

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


def test_what_is_appended_is_read(store: EventStore) -> None:
    low, high = -(2**63), 2**63 - 1
    store.append([event(low, 5, "buy", user_id=high), event(high, 0, user_id=low), event(3, 6, "click", user_id=high)])
    rows = store.get(high)
    assert rows["item_id"].tolist() == [low, 3]
    assert rows["time_ms"].tolist() == [5, 6]
    assert [store.names[place] for place in rows["event"]] == ["buy", "click"]
    assert items(store, low) == [high]
    assert items(store, 0) == []


def test_events_are_ordered_by_time_and_of_one_millisecond_by_arrival(store: EventStore) -> None:
    store.append([event(1, 20), event(2, 10)])
    store.append([event(3, 20), event(4, 5), event(5, 10)])
    assert items(store) == [4, 2, 5, 1, 3]


def test_only_the_latest_by_time_are_kept(path: Path) -> None:
    store = EventStore.open(path, NAMES, most_kept=3)
    store.append([event(n, n) for n in range(5)])
    assert items(store) == [2, 3, 4]
    store.append([event(10, 1), event(11, 3)])
    assert items(store) == [3, 11, 4]
    store.close()


def test_an_event_sent_again_is_taken_once(store: EventStore) -> None:
    assert store.append([event(1, 10, event_id="a"), event(2, 20, event_id="b")]) == 0
    assert store.append([event(1, 10, event_id="a"), event(9, 30, event_id="b"), event(3, 30, event_id="c")]) == 2
    assert store.append([event(4, 40, event_id="d"), event(4, 40, event_id="d")]) == 1
    assert items(store) == [1, 2, 3, 4]


def test_an_event_id_is_its_users_own_and_an_empty_one_nobodys(store: EventStore) -> None:
    assert store.append([event(1, 10, event_id="a"), event(1, 10, event_id="a", user_id=8), event(2, 10)]) == 0
    assert store.append([event(2, 10)]) == 0
    assert items(store) == [1, 2, 2]


def with_context(item_id: int, time_ms: int, **context: Given) -> LiveEvent:
    return LiveEvent(7, item_id, "impression", time_ms, context=context)


def contexts(store: EventStore) -> list[list[int]]:
    found: list[list[int]] = store.get(7)["contexts"].tolist()
    return found


def test_the_named_columns_of_a_context_are_kept_as_digests_and_nothing_else(path: Path) -> None:
    store = EventStore.open(path, NAMES, ["surface", "tab"])
    store.append([with_context(1, 10, surface="feed", tab=3, other=[1.5]), with_context(2, 20, tab=None), event(3, 30)])
    assert contexts(store) == [[digest("feed"), digest(3)], [UNKNOWN, UNKNOWN], [UNKNOWN, UNKNOWN]]
    store.close()


def test_columns_keep_their_place_and_events_from_before_one_do_not_know_it(path: Path) -> None:
    store = EventStore.open(path, NAMES, ["tab"])
    store.append([with_context(1, 10, tab=1)])
    later = EventStore.open(path, NAMES, ["surface"])
    assert later.contexts == ("tab", "surface")
    assert contexts(later) == [[digest(1)]]
    later.append([with_context(2, 20, tab=2, surface="feed")])
    assert contexts(later) == [[digest(1), UNKNOWN], [UNKNOWN, digest("feed")]]
    store.append([with_context(3, 5, tab=3, surface="feed")])
    assert contexts(store) == [[digest(3), UNKNOWN], [digest(1), UNKNOWN], [UNKNOWN, digest("feed")]]
    assert later.sweep(5) == 1
    assert contexts(store) == [[digest(1), UNKNOWN], [UNKNOWN, digest("feed")]]
    later.close()
    store.close()


def test_an_event_without_context_columns_takes_25_bytes_and_each_column_8() -> None:
    assert [row_of(n).itemsize for n in (0, 1, 3)] == [25, 33, 49]


def test_a_call_that_fails_leaves_nothing_of_itself(store: EventStore, path: Path) -> None:
    raw_key = key_of(8)
    with store._env.begin(write=True) as transaction:
        transaction.put(raw_key, b"not rows")
    with pytest.raises(DataError, match="the events of user 8 are damaged"):
        store.append([event(1, 10), event(2, 10, user_id=8)])
    assert items(store) == []
    with pytest.raises(DataError, match="the events of user 8 are damaged"):
        store.get(8)


def test_sweeping_forgets_what_happened_until_then_and_no_more(
    store: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_USERS_A_SWEEP", 3)
    store.append([event(n, time_ms, user_id=user) for user in range(-5, 6) for n, time_ms in enumerate((10, 20, 30))])
    assert store.sweep(20) == 22
    assert all(items(store, user) == [2] for user in range(-5, 6))
    assert store.sweep(20) == 0
    assert store.sweep(10) == 0
    assert store.sweep(30) == 11
    assert items(store) == []


def test_names_keep_their_place_whoever_opens_the_store_next(store: EventStore, path: Path) -> None:
    store.append([event(1, 10, "buy")])
    other = EventStore.open(path, ["like", "impression"])
    assert other.names == (*NAMES, "like")
    other.append([event(2, 20, "like")])
    assert [other.names[place] for place in other.get(7)["event"]] == ["buy", "like"]
    other.close()
    assert items(store) == [1, 2]


def test_more_names_than_a_byte_holds_are_refused(path: Path) -> None:
    with pytest.raises(DataError, match=r"expected at most 255 names of events ever; move it away"):
        EventStore.open(path, [f"n{n}" for n in range(256)])
    with pytest.raises(DataError, match=r"expected at most 255 context columns ever; move it away"):
        EventStore.open(path, NAMES, [f"n{n}" for n in range(256)])


def test_threads_append_to_one_user_without_losing_each_others(store: EventStore) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: store.append([event(n, n, event_id=str(n % 150))]), range(200)))
    assert len(items(store)) == 150


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
