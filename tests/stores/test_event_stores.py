"""One suite for every place where events are kept that came since the log was loaded."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest

from prerank.errors import DataError
from prerank.stores import events, redis_events
from prerank.stores.contexts import UNKNOWN, digest
from prerank.stores.events import LiveEvent
from prerank.stores.live import LiveEvents
from prerank.stores.user_file import META, key_of
from prerank.types import Given
from tests.stores.places import Place
from tests.stores.places import place as place
from tests.stores.test_events import NAMES, event, items


@pytest.fixture
def store(place: Place) -> Iterator[LiveEvents]:
    store = place.events(NAMES)
    yield store
    store.close()


def test_what_is_appended_is_read(store: LiveEvents) -> None:
    low, high = -(2**63), 2**63 - 1
    store.append([event(low, 5, "buy", user_id=high), event(high, 0, user_id=low), event(3, 6, "click", user_id=high)])
    rows = store.get(high)
    assert rows["item_id"].tolist() == [low, 3]
    assert rows["time_ms"].tolist() == [5, 6]
    assert [store.names[at] for at in rows["event"]] == ["buy", "click"]
    assert items(store, low) == [high]
    assert items(store, 0) == []


def test_events_are_ordered_by_time_and_of_one_millisecond_by_arrival(store: LiveEvents) -> None:
    store.append([event(1, 20), event(2, 10)])
    store.append([event(3, 20), event(4, 5), event(5, 10)])
    assert items(store) == [4, 2, 5, 1, 3]


def test_only_the_latest_by_time_are_kept(place: Place) -> None:
    store = place.events(NAMES, most_kept=3)
    store.append([event(n, n) for n in range(5)])
    assert items(store) == [2, 3, 4]
    store.append([event(10, 1), event(11, 3)])
    assert items(store) == [3, 11, 4]
    store.close()


def test_an_event_sent_again_is_taken_once(store: LiveEvents) -> None:
    assert store.append([event(1, 10, event_id="a"), event(2, 20, event_id="b")]) == 0
    assert store.append([event(1, 10, event_id="a"), event(9, 30, event_id="b"), event(3, 30, event_id="c")]) == 2
    assert store.append([event(4, 40, event_id="d"), event(4, 40, event_id="d")]) == 1
    assert items(store) == [1, 2, 3, 4]


def test_an_event_id_is_its_users_own_and_an_empty_one_nobodys(store: LiveEvents) -> None:
    assert store.append([event(1, 10, event_id="a"), event(1, 10, event_id="a", user_id=8), event(2, 10)]) == 0
    assert store.append([event(2, 10)]) == 0
    assert items(store) == [1, 2, 2]


def with_context(item_id: int, time_ms: int, **context: Given) -> LiveEvent:
    return LiveEvent(7, item_id, "impression", time_ms, context=context)


def contexts(store: LiveEvents) -> list[list[int]]:
    found: list[list[int]] = store.get(7)["contexts"].tolist()
    return found


def test_the_named_columns_of_a_context_are_kept_as_digests_and_nothing_else(place: Place) -> None:
    store = place.events(NAMES, ["surface", "tab"])
    store.append([with_context(1, 10, surface="feed", tab=3, other=[1.5]), with_context(2, 20, tab=None), event(3, 30)])
    assert contexts(store) == [[digest("feed"), digest(3)], [UNKNOWN, UNKNOWN], [UNKNOWN, UNKNOWN]]
    store.close()


def test_columns_keep_their_place_and_events_from_before_one_do_not_know_it(place: Place) -> None:
    store = place.events(NAMES, ["tab"])
    store.append([with_context(1, 10, tab=1)])
    later = place.events(NAMES, ["surface"])
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


def test_a_call_that_fails_leaves_nothing_of_itself(place: Place) -> None:
    place.events(NAMES).close()
    place.put_events(key_of(8), b"not rows")
    store = place.events(NAMES)
    with pytest.raises(DataError, match="the events of user 8 are damaged"):
        store.append([event(1, 10), event(2, 10, user_id=8)])
    assert items(store) == []
    with pytest.raises(DataError, match="the events of user 8 are damaged"):
        store.get(8)
    store.close()


def test_sweeping_forgets_what_happened_until_then_and_no_more(
    store: LiveEvents, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (events, redis_events):
        monkeypatch.setattr(module, "_USERS_A_SWEEP", 3)
    store.append([event(n, time_ms, user_id=user) for user in range(-5, 6) for n, time_ms in enumerate((10, 20, 30))])
    assert store.sweep(20) == 22
    assert all(items(store, user) == [2] for user in range(-5, 6))
    assert store.sweep(20) == 0
    assert store.sweep(10) == 0
    assert store.sweep(30) == 11
    assert items(store) == []


def test_names_keep_their_place_whoever_opens_the_store_next(store: LiveEvents, place: Place) -> None:
    store.append([event(1, 10, "buy")])
    other = place.events(["like", "impression"])
    assert other.names == (*NAMES, "like")
    other.append([event(2, 20, "like")])
    assert [other.names[at] for at in other.get(7)["event"]] == ["buy", "like"]
    other.close()
    assert items(store) == [1, 2]


def test_more_names_than_a_byte_holds_are_refused(place: Place) -> None:
    with pytest.raises(DataError, match=r"expected at most 255 names of events ever; (move it away|delete the key)"):
        place.events([f"n{n}" for n in range(256)])
    with pytest.raises(DataError, match=r"expected at most 255 context columns ever; (move it away|delete the key)"):
        place.events(NAMES, [f"n{n}" for n in range(256)])


def test_threads_append_to_one_user_without_losing_each_others(store: LiveEvents) -> None:
    with ThreadPoolExecutor(8) as pool:
        repeated = list(pool.map(lambda n: store.append([event(n, n, event_id=str(n % 150))]), range(200)))
    assert len(items(store)) == 150
    assert sum(repeated) == 50


def test_no_events_are_no_work(store: LiveEvents) -> None:
    assert store.append([]) == 0
    assert store.sweep(10) == 0


@pytest.mark.parametrize(
    ("meta", "says"),
    [
        (b"\xc1", "the store of events is damaged"),
        (msgspec.msgpack.encode({"format": 1}), "the store of events is damaged"),
        (
            msgspec.msgpack.encode({"format": 9}),
            "expected event store format 1, found 9; (move|delete)",
        ),
    ],
)
def test_another_format_or_damaged_names_are_a_clear_error(place: Place, meta: bytes, says: str) -> None:
    place.events(NAMES).close()
    place.put_events(META, meta)
    with pytest.raises(DataError, match=says):
        place.events(NAMES)
