"""What only a store that several servers share has to hold: generations and who reads them, one trip, time, failure."""

import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest

from prerank.errors import CircuitOpen, DataError, StoreFailed
from prerank.stores import redis_generations
from prerank.stores.events import LiveEvent
from prerank.stores.live import LiveUsers
from prerank.stores.redis_client import RedisClient, RedisPair
from prerank.stores.redis_live import connect_users
from prerank.stores.redis_users import RedisUsers
from prerank.stores.user_file import Events
from tests.stores.places import FUNNEL, Shared
from tests.stores.proxy import between
from tests.stores.redis_server import redis_server
from tests.stores.test_users import event, world

LABELS = ["click", "buy"]


@pytest.fixture
def shared(redis_url: str) -> Shared:
    return Shared(redis_url)


def load(shared: Shared, mark: str, num_users: int = 20, until_ms: int = 100) -> None:
    """Users 0 to `num_users`, each with the `mark` and an event until which the log knows everything."""
    table = pa.table({"user_id": range(num_users), "mark": [mark] * num_users})
    shared.write(table, [event(user, (1, until_ms, 1)) for user in range(num_users)], labels=LABELS)


def generations(shared: Shared) -> set[str]:
    """The hashes that are there."""
    found = {key.decode() for key in shared.client.keys(f"prerank:{FUNNEL}:users:*")}
    return {key for key in found if not key.endswith((":held", ":generations"))}


def holds(shared: Shared) -> int:
    return int(shared.client.zcard(f"prerank:{FUNNEL}:users:held"))


def test_a_user_is_one_round_trip_and_a_profile_another(shared: Shared) -> None:
    load(shared, "a")
    with between(shared.url) as way, connect_users(way.url, FUNNEL, 10.0) as users:
        users.record([LiveEvent(3, 9, "click", 200)])
        for read in (users.get, users.profile):
            read(3)  # the connection is made
            before = way.num_trips
            for _ in range(5):
                assert read(3) is not None
            assert way.num_trips - before == 5
        record = users.get(3)
        assert record is not None
        assert record.item_ids.tolist() == [1, 9]


def test_no_reader_ever_sees_half_of_a_load_whoever_opens_and_closes_meanwhile(shared: Shared) -> None:
    load(shared, "0")
    ending = threading.Event()
    wrong: list[object] = []

    def read() -> int:
        num = 0
        while not ending.is_set():
            with shared.live() as users:
                marks = set()
                for user_id in (0, 7, 19):
                    for profile in (users.profile(user_id), users.get(user_id).profile):  # type: ignore[union-attr]
                        marks.add(profile and profile["mark"])
                num += 1
                if len(marks) != 1 or None in marks:
                    wrong.append(marks)
        return num

    with ThreadPoolExecutor(3) as pool:
        readers = [pool.submit(read) for _ in range(3)]
        try:
            for mark in range(1, 30):
                load(shared, str(mark), num_users=200)
        finally:
            ending.set()
        num_opened = sum(one.result() for one in readers)
    assert not wrong
    assert num_opened > 3
    shared.users().tidy()
    assert generations(shared) == {shared.generation()}, "what nobody reads any more is gone"


def test_who_reads_keeps_his_generation_and_the_last_of_them_lets_it_go(shared: Shared) -> None:
    load(shared, "old")
    old = shared.generation()
    first, second = shared.users(), shared.users()
    load(shared, "new")
    assert generations(shared) == {old, shared.generation()}
    first.close()
    second.tidy()
    assert second.profile(3) == {"user_id": 3, "mark": "old"}
    second.close()
    assert holds(shared) == 0
    with shared.users() as third:
        third.tidy()
        assert third.profile(3) == {"user_id": 3, "mark": "new"}
    assert generations(shared) == {shared.generation()}


def test_a_hold_lasts_while_its_process_lives_and_not_much_longer(
    shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(shared, "old")
    monkeypatch.setattr(redis_generations, "HOLD_S", 2)
    monkeypatch.setattr(redis_generations, "_BEAT_S", 0.2)
    alive = shared.users()
    monkeypatch.setattr(redis_generations, "_BEAT_S", 1000.0)
    time.sleep(2.5)
    load(shared, "new")
    assert alive.profile(3) == {"user_id": 3, "mark": "old"}
    silent = shared.users()  # as one whose process was killed, or stood still
    load(shared, "newest")
    assert silent.profile(3) == {"user_id": 3, "mark": "new"}
    time.sleep(3.5)
    assert alive.tidy() == 100
    assert alive.profile(3) == {"user_id": 3, "mark": "old"}
    with pytest.raises(StoreFailed, match=r"is no longer there: the server lost it, or it was replaced.*start again"):
        silent.profile(3)
    with pytest.raises(StoreFailed, match="is no longer there"):
        silent.get(3)
    alive.close()
    silent.close()


def test_a_load_that_was_killed_is_removed_by_the_next(shared: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as it came: nobody was there to clear it away, and it said that it was being filled."""
    load(shared, "old")
    old = shared.generation()

    def killed(self: object, *_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as dying:
        dying.setattr(redis_generations.Generations, "finish", killed)
        dying.setattr(redis_generations.Generations, "tidy", lambda _: [])
        dying.setattr(redis_generations.Hold, "let_go", lambda _: None)
        with pytest.raises(KeyboardInterrupt):
            load(shared, "half")
    assert len(generations(shared)) == 2
    assert shared.generation() == old
    load(shared, "new")
    assert len(generations(shared)) == 2, "it may be another's, which is still being filled"
    shared.client.delete(f"prerank:{FUNNEL}:users:held")  # as after a minute
    load(shared, "newer")
    assert generations(shared) == {shared.generation()}


def test_a_load_that_somebody_removed_meanwhile_is_not_read(shared: Shared) -> None:
    load(shared, "old")

    def events() -> Iterator[Events]:
        yield event(0, (1, 100, 1))
        shared.client.hset(f"prerank:{FUNNEL}:users:{begun()}", "x", "y")

    def begun() -> str:
        named = shared.client.get(f"prerank:{FUNNEL}:users")
        found = shared.client.smembers(f"prerank:{FUNNEL}:users:generations")
        [other] = [one.decode() for one in found if one != named]
        return str(other)

    with pytest.raises(DataError, match=r"expected 20 users in prerank:tiny:users:.* changed or removed while"):
        shared.write(pa.table({"user_id": range(20)}), events(), labels=LABELS)
    with shared.users() as users:
        assert users.profile(3) == {"user_id": 3, "mark": "old"}


def test_events_are_swept_as_far_as_every_log_that_is_read_knows(shared: Shared) -> None:
    load(shared, "old", until_ms=100)
    older = shared.live()
    older.record([LiveEvent(3, 5, "click", time_ms) for time_ms in (150, 250)])
    load(shared, "new", until_ms=200)
    newer = shared.live()
    assert newer.sweep() == 0, "the older log does not know of the first"
    assert [len(users.get(3).item_ids) for users in (older, newer)] == [3, 2]  # type: ignore[union-attr]
    older.close()
    assert newer.sweep() == 1
    assert newer.sweep() == 0
    assert len(newer.get(3).item_ids) == 2  # type: ignore[union-attr]
    newer.close()


def test_a_load_says_what_it_was_of(shared: Shared) -> None:
    client = shared.pair().writes
    assert RedisUsers.loaded_of(client, FUNNEL) is None
    for key in ("some days", "more days"):
        RedisUsers.write(client, FUNNEL, world(), [], labels=[], loaded=key)
        assert RedisUsers.loaded_of(client, FUNNEL) == key
    assert RedisUsers.loaded_of(client, "other") is None


def test_the_users_of_another_funnel_are_not_taken_for_ours(shared: Shared) -> None:
    load(shared, "a")
    with pytest.raises(DataError, match=r"expected the users of funnel 'other', found those of tiny; load them with"):
        RedisUsers.open(shared.pair(), "other")


def test_a_key_that_is_something_else_is_a_clear_error(shared: Shared) -> None:
    shared.client.lpush(f"prerank:{FUNNEL}:users", "x")
    with pytest.raises(StoreFailed, match=r"the users cannot be opened: .*WRONGTYPE"):
        shared.users()
    shared.client.set(f"prerank:{FUNNEL}:events", "x")
    with pytest.raises(StoreFailed, match=r"the events cannot be read: .*WRONGTYPE"):
        shared.events(["impression"])
    shared.client.delete(f"prerank:{FUNNEL}:events")
    shared.client.hset(f"prerank:{FUNNEL}:events", "x", "y")
    with pytest.raises(DataError, match="a hash, but not a store of events; delete the key prerank:tiny:events and"):
        shared.events(["impression"])


def test_a_redis_that_lost_everything_is_said_and_nobody_is_a_stranger_for_it(shared: Shared) -> None:
    load(shared, "a")
    users = shared.live()
    shared.client.flushall()
    for ask in (users.get, users.profile):
        with pytest.raises(StoreFailed, match="is no longer there: the server lost it"):
            ask(3)
    with pytest.raises(StoreFailed, match="is not the store of events that was opened"):
        users.record([LiveEvent(3, 5, "click", 150)])
    users.close()
    load(shared, "b")
    with shared.live() as users:
        users.record([LiveEvent(3, 5, "click", 150)])
        assert users.get(3).profile["mark"] == "b"  # type: ignore[union-attr]


def test_a_server_that_does_not_answer_costs_its_timeout_a_few_times_and_then_nothing(shared: Shared) -> None:
    load(shared, "a")
    with between(shared.url) as way:
        users = connect_users(way.url, FUNNEL, 0.1)
        assert users.get(3) is not None
        way.answers.clear()
        took = [seconds(users) for _ in range(6)]
        assert all(0.09 < one < 0.6 for one in took[:5]), took
        assert took[5] < 0.05, took
        with pytest.raises(CircuitOpen, match="failed 5 times in a row; not asked again for"):
            users.profile(3)
        way.answers.set()
        # what is written goes its own way, and is not refused for what reading met
        assert users.record([LiveEvent(3, 5, "click", 150)]).num_repeated == 0
        time.sleep(2.1)
        assert users.get(3) is not None
        users.close()


def seconds(users: LiveUsers) -> float:
    start = time.perf_counter()
    with pytest.raises(StoreFailed):
        users.get(3)
    return time.perf_counter() - start


def test_a_server_that_dies_is_an_error_of_ours_and_closing_is_none(tmp_path: Path) -> None:
    with redis_server(tmp_path) as url:
        shared = Shared(url)
        load(shared, "a")
        users = connect_users(url, FUNNEL, 0.5)
        assert users.get(3) is not None
    with pytest.raises(StoreFailed, match="the user cannot be read"):
        users.get(3)
    with pytest.raises(StoreFailed, match="the events cannot be read"):
        users.record([LiveEvent(3, 5, "click", 150)])
    with pytest.raises(StoreFailed):
        load(shared, "b")
    users.close()


def test_no_answer_no_url_and_no_library_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreFailed, match=r"redis://127.0.0.1:1/0: expected a Redis that answers"):
        connect_users("redis://127.0.0.1:1/0", FUNNEL, 0.1)
    for url in ("http://somewhere", "redis://[bad"):
        with pytest.raises(DataError, match="expected a url such as redis://host:6379/0"):
            connect_users(url, FUNNEL, 0.1)
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(DataError, match=r"expected the library redis; install prerank\[redis\]"):
        connect_users("redis://127.0.0.1:1/0", FUNNEL, 0.1)


def test_no_error_shows_a_password() -> None:
    for url in ("redis://me:secret@127.0.0.1:1/0", "redis://:secret@127.0.0.1:1/0?password=secret"):
        with pytest.raises(StoreFailed, match=r"redis://(me)?:\*\*\*@127.0.0.1:1/0: expected") as told:
            RedisPair.open(url, 0.1)
        assert "secret" not in str(told.value)


def test_the_url_may_say_how_long_to_wait(shared: Shared) -> None:
    with between(shared.url) as way:
        client = RedisClient.open(f"{way.url}?socket_timeout=0.05", 30.0)
        way.answers.clear()
        start = time.perf_counter()
        with pytest.raises(StoreFailed):
            client.ask("it", lambda one: one.ping())
        assert time.perf_counter() - start < 5
