"""What happened, told to a funnel in process and over HTTP, and what the next request knows of it."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from prerank.errors import DataError, RequestError
from prerank.schema import Counter
from prerank.serve.expand import ExpandUser
from prerank.serve.funnel import Funnel
from prerank.serve.http import create_app
from prerank.serve.record import AHEAD_MS, Recorded, check_contexts
from prerank.stores.contexts import digest
from prerank.stores.events import LiveEvent
from prerank.stores.users import UserStore
from prerank.types import Features, Given, Request
from tests.serve import world
from tests.serve.client import Client
from tests.serve.world import T0, UNTIL

CONTEXT = {"hour": 1, "surface": "feed"}


@pytest.fixture
def funnel(store: Path) -> Iterator[Funnel]:
    """Its store is this test's own."""
    with Funnel.open(store) as funnel:
        yield funnel


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def features(funnel: Funnel, user_id: int, time_ms: int) -> tuple[Features, list[str]]:
    [expand] = (stage for stage in funnel._graph.order if stage.name == "expand_user")
    written = expand.run({"request": Request(user_id, 1, time_ms, CONTEXT)})
    return written["features"], list(written["user_notes"])


def clicks(funnel: Funnel, user_id: int, time_ms: int) -> list[int]:
    """The clicks history as item ids: 0 is the unknown item."""
    found, _ = features(funnel, user_id, time_ms)
    codes = funnel._items.features()["item_id"].tolist()
    ids = dict(zip(codes, funnel._items.item_ids.tolist(), strict=True))
    return [ids.get(code, code) for code in found["clicks"][0].tolist() if code >= 0]


def test_the_next_request_knows_what_happened(funnel: Funnel) -> None:
    at = UNTIL + 1000
    assert clicks(funnel, 1, at + 10) == [101, 103]
    done = funnel.record([LiveEvent(1, 106, "impression", at), LiveEvent(1, 106, "is_click", at + 5)])
    assert done == Recorded(accepted=2, unknown_items=0, repeated=0, already_logged=0)
    assert clicks(funnel, 1, at + 10) == [101, 103, 106]
    assert clicks(funnel, 1, at + 5) == [101, 103]
    genre = funnel._items.features()["genre"]
    seen, _ = features(funnel, 1, at + 10)
    assert seen["seen"][0].tolist() == genre[[2, 3, 4, 6]].tolist()


def test_an_item_of_the_next_version_is_accepted_counted_and_the_unknown_item(funnel: Funnel) -> None:
    at = UNTIL + 1000
    done = funnel.record([LiveEvent(3, 999, "is_click", at), LiveEvent(3, 100, "is_click", at + 1)])
    assert done == Recorded(2, unknown_items=1, repeated=0, already_logged=0)
    assert clicks(funnel, 3, at + 10) == [0, 100]


def test_a_new_user_has_a_history_and_stays_unknown(funnel: Funnel) -> None:
    at = UNTIL + 1000
    funnel.record([LiveEvent(9, 105, "is_click", at)])
    assert clicks(funnel, 9, at + 10) == [105]
    assert features(funnel, 9, at + 10)[1] == ["unknown user 9: served as a new user"]
    assert funnel.recommend(Request(9, 3, at + 10, CONTEXT)).notes == ["unknown user 9: served as a new user"]


def test_what_was_sent_before_or_is_in_the_log_is_said_and_not_counted(funnel: Funnel) -> None:
    events = [LiveEvent(1, 106, "is_click", UNTIL + 1000, "a"), LiveEvent(1, 106, "is_click", UNTIL, "b")]
    assert funnel.record(events) == Recorded(2, 0, repeated=0, already_logged=1)
    assert funnel.record(events) == Recorded(2, 0, repeated=1, already_logged=1)
    assert clicks(funnel, 1, UNTIL + 2000) == [101, 103, 106]


@pytest.mark.parametrize(
    ("event", "says"),
    [
        (
            LiveEvent(1, 100, "is_liek", T0),
            r"events\[1\]\.event: expected one of .*'is_like'\], got 'is_liek'; did you",
        ),
        (LiveEvent(2**63, 100, "is_like", T0), r"events\[1\]\.user_id: expected an int64, got 9223372036854775808"),
        (
            LiveEvent(1, -(2**63) - 1, "is_like", T0),
            r"events\[1\]\.item_id: expected an int64, got -9223372036854775809",
        ),
        (LiveEvent(1, 100, "is_like", -1), r"events\[1\]\.time_ms: expected UTC milliseconds since 1970"),
        (
            LiveEvent(1, 100, "is_like", T0, "x" * 129),
            r"events\[1\]\.event_id: expected at most 128 characters, got 129",
        ),
    ],
)
def test_one_wrong_event_and_none_is_taken(funnel: Funnel, event: LiveEvent, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        funnel.record([LiveEvent(1, 106, "is_click", UNTIL + 1), event])
    assert clicks(funnel, 1, UNTIL + 2000) == [101, 103]


def test_a_minute_ahead_is_a_clock_and_more_is_a_mistake(funnel: Funnel) -> None:
    funnel.record([LiveEvent(1, 100, "is_like", now_ms() + AHEAD_MS - 5_000)])
    with pytest.raises(RequestError, match=r"events\[0\]\.time_ms: expected at most a minute after now, \d+ by the"):
        funnel.record([LiveEvent(1, 100, "is_like", now_ms() + AHEAD_MS + 5_000)])


def test_no_events_and_too_many_are_refused(funnel: Funnel) -> None:
    for events in ([], [LiveEvent(1, 100, "is_like", T0)] * 1001):
        with pytest.raises(RequestError, match=r"events: expected 1 to 1,000 of them, got (0|1,001); send more calls"):
            funnel.record(events)


def test_the_example_events_work(funnel: Funnel) -> None:
    assert [one["event"] for one in funnel.example_events] == ["impression", "is_click"]
    events = [LiveEvent(**one, time_ms=now_ms()) for one in funnel.example_events]  # type: ignore[arg-type]
    assert funnel.record(events) == Recorded(2, 0, 0, 0)


def test_what_happened_outlives_the_funnel_and_a_log_that_has_it_takes_its_place(store: Path) -> None:
    at = UNTIL + 1000
    with Funnel.open(store) as funnel:
        funnel.record([LiveEvent(1, 106, "impression", at), LiveEvent(1, 106, "is_click", at)])
        funnel.record([LiveEvent(1, 107, "is_click", at + 1000)])
    with Funnel.open(store) as funnel:
        assert clicks(funnel, 1, at + 5000) == [103, 106, 107]
        whole = world.shown(1, np.array([103, 106]), np.array([T0, at]), [1, 1])
        UserStore.write(store / "users.lmdb", world.users(), [whole], labels=["is_click", "is_like"])
        assert clicks(funnel, 1, at + 5000) == [103, 106, 107], "a funnel reads the log it opened"
    with Funnel.open(store) as funnel:
        assert clicks(funnel, 1, at + 5000) == [103, 106, 107]
        assert funnel.sweep() == 2
        assert clicks(funnel, 1, at + 5000) == [103, 106, 107]


def test_requests_and_events_of_many_threads_do_not_mix(funnel: Funnel) -> None:
    def one(user_id: int) -> bool:
        for n in range(5):
            funnel.record([LiveEvent(user_id, 100 + user_id % 8, "is_click", UNTIL + 1 + n)])
            assert len(funnel.recommend(Request(user_id, 3, UNTIL + 1000, CONTEXT)).winners) == 3
        return clicks(funnel, user_id, UNTIL + 1000) == [100 + user_id % 8] * 3

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(one, range(50, 70)))


@pytest.fixture
def on_surface(store: Path) -> Iterator[Funnel]:
    """Its log knows the surface of every event, as counters `on` it need; user 1 saw all his items in the feed."""
    feed = digest("feed")
    events = [(*one, np.full(len(one[1]), feed)) for one in world.events()]
    labels = ["is_click", "is_like"]
    UserStore.write(store / "users.lmdb", world.users(), events, labels=labels, contexts=["surface"])
    with Funnel.open(store) as funnel:
        yield funnel


def shown_on(funnel: Funnel, surface: str, time_ms: int) -> list[int]:
    """How many impressions of user 1 a counter `on` the surface has, and its `last` two clicks' genres there."""
    counters = {
        "shown": Counter(on="surface", window="1h"),
        "clicked": Counter("is_click", "genre", on="surface", last=2, length=3),
    }
    config = world.config()
    transforms = world.transforms(replace(config, features=replace(config.features, interaction=counters)))
    expand = ExpandUser(funnel._users, transforms, funnel._items)
    found, _ = expand.expand(expand.users.get(1), Request(1, 1, time_ms, {"hour": 1, "surface": surface}))
    return [*found["shown"].tolist(), *found["clicked"][0].tolist()]


def test_an_event_counts_on_the_surface_that_its_context_says(on_surface: Funnel) -> None:
    at = UNTIL + 1000
    genres = on_surface._items.features()["genre"].tolist()
    assert shown_on(on_surface, "search", at + 10) == [0, -1, -1, -1]
    assert shown_on(on_surface, "feed", at + 10) == [5, -1, -1, genres[3]]
    there = {"surface": "search", "hour": 2}
    done = on_surface.record(
        [
            LiveEvent(1, 106, "impression", at, context=there),
            LiveEvent(1, 106, "is_click", at + 5, context=there),
            LiveEvent(1, 107, "impression", at + 6),
            LiveEvent(1, 107, "is_click", at + 7, context={"surface": None}),
        ]
    )
    assert done == Recorded(4, 0, 0, 0)
    assert shown_on(on_surface, "search", at + 10) == [1, -1, -1, genres[6]]
    assert shown_on(on_surface, "search", at + 5) == [1, -1, -1, -1]
    assert shown_on(on_surface, "feed", at + 10) == [5, -1, -1, genres[3]]


@pytest.mark.parametrize(
    ("context", "says"),
    [
        ({"surfase": "feed"}, r"context: expected fields of \['hour', 'surface'\], got 'surfase'; did you mean \"surf"),
        ({"surface": 3}, r"context\.surface: expected text, got 3 \(int\)"),
        ({"surface": ["feed"]}, r"context\.surface: expected an integer, text, true or false, or null, got \['feed'\]"),
        ({"surface": 1.5}, r"context\.surface: expected an integer, text, true or false, or null, got 1.5 \(float\)"),
    ],
)
def test_a_wrong_context_refuses_the_call_and_is_named(
    on_surface: Funnel, context: dict[str, Given], says: str
) -> None:
    right = LiveEvent(1, 106, "impression", UNTIL + 1, context={"surface": "feed"})
    with pytest.raises(RequestError, match=rf"events\[1\]\.{says}"):
        on_surface.record([right, LiveEvent(1, 106, "impression", UNTIL + 2, context=context)])
    assert shown_on(on_surface, "feed", UNTIL + 1000)[0] == 5


def test_true_is_not_1_even_after_a_1_was_right() -> None:
    events = [LiveEvent(1, 100, "impression", T0, context={"hour": value}) for value in (1, True)]
    with pytest.raises(RequestError, match=r"events\[1\]\.context\.hour: expected an integer, got True \(bool\)"):
        check_contexts(events, world.transforms(world.config()), ["hour"])


def test_context_that_is_not_kept_is_ignored_whatever_it_is(funnel: Funnel, on_surface: Funnel) -> None:
    for one, said in ((funnel, {"surface": 3, "hour": "noon"}), (on_surface, {"hour": [1.5]})):
        assert one.record([LiveEvent(5, 106, "impression", UNTIL + 1, context=said)]) == Recorded(1, 0, 0, 0)


def test_a_value_the_version_does_not_know_is_kept_for_the_next(on_surface: Funnel) -> None:
    on_surface.record([LiveEvent(5, 106, "impression", UNTIL + 1, context={"surface": "story"})])
    record = on_surface._users.get(5)
    assert record is not None
    assert record.contexts.tolist() == [[digest("story")]]


def test_the_example_events_say_the_context_that_is_kept(on_surface: Funnel) -> None:
    assert [one["context"] for one in on_surface.example_events] == [{"surface": "text"}] * 2
    with Client(create_app(on_surface)) as client:
        document = client.get("/openapi.json").json()
        example = document["paths"]["/v1/events"]["post"]["requestBody"]["content"]["application/json"]["example"]
        assert example["events"][0]["context"] == {"surface": "text"}
        assert client.post("/v1/events", json=example).status_code == 200
        assert "&#34;context&#34;:{&#34;surface&#34;" in client.get("/docs").text
        wrong = client.post("/v1/events", json={"events": [{**example["events"][0], "context": {"surface": 3}}]})
        assert wrong.json()["error"]["message"] == "events[0].context.surface: expected text, got 3 (int)"


def test_over_http_the_very_next_request_knows(funnel: Funnel) -> None:
    asked = []
    expand = next(stage for stage in funnel._graph.order if stage.name == "expand_user")
    with Client(create_app(funnel)) as client:
        for n in range(20):
            taken = client.post("/v1/events", json={"events": [{"user_id": 30, "item_id": 100, "event": "is_click"}]})
            assert taken.json() == {"accepted": 1, "unknown_items": 0, "repeated": 0, "already_logged": 0}
            answer = client.post("/v1/recommend", json={"user_id": 30, "k": 1, "context": CONTEXT})
            assert answer.status_code == 200
            # the moment the server asks about, were it asked again now
            written = expand.run({"request": Request(30, 1, -(-time.time_ns() // 1_000_000), CONTEXT)})
            asked.append(int((written["features"]["clicks"][0] >= 0).sum()))
            assert asked[-1] == min(n + 1, 3)
        wrong = client.post("/v1/events", json={"events": [{"user_id": 30, "item_id": 100, "event": "is_clck"}]})
        assert wrong.status_code == 422
        assert "did you mean" in wrong.json()["error"]["message"]


def test_a_store_of_events_that_is_damaged_is_a_clear_error(store: Path) -> None:
    (store / "events.lmdb").write_bytes(b"not a store")
    with pytest.raises(DataError, match=r"events\.lmdb: expected a store of events"):
        Funnel.open(store)
