"""Events in a Redis that several servers write to at once: none is lost, and none is taken twice."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from prerank.errors import StoreFailed
from prerank.stores import redis_events
from prerank.stores.events import LiveEvent
from prerank.stores.redis_events import RedisEvents
from tests.stores.places import Shared
from tests.stores.test_events import NAMES, event, items


@pytest.fixture
def shared(redis_url: str) -> Shared:
    return Shared(redis_url)


def test_two_servers_that_take_the_same_events_take_each_once(shared: Shared) -> None:
    """Every event comes to both, as when a client hears nothing of the first and asks the second."""
    servers = [shared.events(NAMES), shared.events(NAMES)]
    calls = [[event(10 * n + i, n, event_id=f"{n} {i}", user_id=n % 3) for i in range(3)] for n in range(60)]
    with ThreadPoolExecutor(6) as pool:
        jobs = [pool.submit(store.append, call) for call in calls for store in servers]
        assert sum(job.result() for job in jobs) == 3 * len(calls)
    for user in range(3):
        found = [items(store, user) for store in servers]
        assert found[0] == found[1]
        assert sorted(found[0]) == sorted(one.item_id for call in calls for one in call if one.user_id == user)


def test_processes_write_to_one_user_without_losing_each_others(shared: Shared) -> None:
    program = """
import sys
from prerank.stores.events import LiveEvent
from prerank.stores.redis_client import RedisPair
from prerank.stores.redis_events import RedisEvents
store = RedisEvents.open(RedisPair.open(sys.argv[1], 10.0), "tiny", ["impression"])
for n in range(100):
    store.append([LiveEvent(7, n, "impression", n, str(n)), LiveEvent(8, n, "impression", n)])
"""
    running = [subprocess.Popen([sys.executable, "-c", program, shared.url]) for _ in range(2)]
    assert [one.wait(timeout=60) for one in running] == [0, 0]
    store = shared.events(NAMES)
    assert items(store) == list(range(100))
    assert items(store, 8) == [n for n in range(100) for _ in range(2)]


def test_what_another_wrote_between_reading_and_writing_is_kept(
    shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, other = shared.events(NAMES), shared.events(NAMES)
    read, between = store._read, [[event(1, 10, event_id="a"), event(2, 20)], [event(3, 30, user_id=8)]]

    def slow(keys: list[bytes]) -> dict[bytes, bytes | None]:
        found = read(keys)
        if between:
            other.append(between.pop(0))
        return found

    monkeypatch.setattr(store, "_read", slow)
    assert store.append([event(1, 10, event_id="a"), event(4, 15), event(5, 50, user_id=8)]) == 1
    assert not between
    assert items(store) == [1, 4, 2]
    assert items(store, 8) == [3, 5]


def test_a_user_that_others_never_stop_writing_to_is_an_error_and_takes_nothing(
    shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_events, "_MOST_TURNS", 3)
    store, other = shared.events(NAMES), shared.events(NAMES)
    read = store._read

    def slow(keys: list[bytes]) -> dict[bytes, bytes | None]:
        found = read(keys)
        other.append([event(1, 10)])
        return found

    monkeypatch.setattr(store, "_read", slow)
    with pytest.raises(StoreFailed, match="others wrote events of the same users 3 times meanwhile"):
        store.append([event(2, 20), event(2, 20, user_id=9)])
    assert set(items(other)) == {1}
    assert items(other, 9) == []


def test_servers_that_open_an_empty_store_at_once_agree_on_its_lists(shared: Shared) -> None:
    with ThreadPoolExecutor(8) as pool:
        stores = list(
            pool.map(lambda n: shared.events(["impression", f"label {n % 4}"], [f"column {n % 3}"]), range(8))
        )
    last = shared.events([])
    assert sorted(last.names) == ["impression", *(f"label {n}" for n in range(4))]
    assert len(set(last.names)) == 5
    assert sorted(last.contexts) == [f"column {n}" for n in range(3)]
    for n, store in enumerate(stores):
        assert last.names[: len(store.names)] == store.names
        store.append([LiveEvent(n, 1, f"label {n % 4}", 1)])
        assert [last.names[at] for at in last.get(n)["event"]] == [f"label {n % 4}"]


def test_a_store_that_was_emptied_and_made_anew_is_not_taken_for_the_one_before(shared: Shared) -> None:
    """The names have other places there."""
    store = shared.events(["impression", "click"])
    store.append([event(1, 10, "click")])
    shared.client.delete("prerank:tiny:events")
    other = shared.events(["buy", "impression"])
    other.append([event(2, 10, "buy")])
    for ask in (lambda: store.get(7), lambda: store.append([event(1, 10, "click")]), lambda: store.sweep(5)):
        with pytest.raises(StoreFailed, match="is not the store of events that was opened"):
            ask()
    assert items(other) == [2]


def test_what_is_written_while_a_sweep_passes_is_kept(shared: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_events, "_USERS_A_SWEEP", 2)
    store, other = shared.events(NAMES), shared.events(NAMES)
    users = range(40)
    store.append([event(n, n, user_id=user) for user in users for n in (1, 20)])
    swapped = store._swapped

    def slow(changes: list[tuple[bytes, bytes | None, bytes]]) -> list[bytes]:
        if changes and not any(item == 30 for item in items(other, 3)):
            other.append([event(30, 30, user_id=user) for user in users])
        return swapped(changes)

    monkeypatch.setattr(store, "_swapped", slow)
    assert store.sweep(10) == len(users)
    assert all(items(store, user) == [20, 30] for user in users)


def test_where_memory_is_full_nothing_is_taken_and_the_error_says_so(shared: Shared) -> None:
    store: RedisEvents = shared.events(NAMES)
    store.append([event(1, 10)])
    shared.client.config_set("maxmemory", "1mb")
    try:
        with pytest.raises(StoreFailed, match=r"the events cannot be written: .*maxmemory"):
            store.append([event(2, 20), event(2, 20, user_id=8)])
        assert items(store) == [1]
        assert items(store, 8) == []
    finally:
        shared.client.config_set("maxmemory", "0")
    assert store.append([event(2, 20)]) == 0
