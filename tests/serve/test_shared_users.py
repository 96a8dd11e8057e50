"""A funnel whose users and events are in a Redis that servers share: the same answers, also while it fails."""

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from prerank.bundle.registry import Registry
from prerank.errors import DataError, SchemaMismatch, StoreFailed
from prerank.serve.answer import Winner
from prerank.serve.funnel import Funnel
from prerank.serve.http import create_app
from prerank.serve.record import Recorded
from prerank.serve.watch import VersionWatch
from prerank.stores.events import LiveEvent
from prerank.types import Request
from tests.serve import world
from tests.serve.client import Client
from tests.serve.conftest import publish_live
from tests.serve.test_targeting import RULES, lists
from tests.serve.test_targeting import users as grouped_users
from tests.serve.world import T0, UNTIL
from tests.stores.places import Shared
from tests.stores.proxy import Between, between

CONTEXT = {"hour": 1, "surface": "feed"}
NOW = T0 + 10_000
USERS = (1, 2, 3, 9)


@pytest.fixture
def far(tmp_path: Path, redis_url: str) -> Iterator[tuple[Between, Funnel]]:
    """A funnel with targeting, and the way to its users."""
    shared = Shared(redis_url)
    shared.write(grouped_users(), world.events(), labels=["is_click", "is_like"])
    store = publish_live(tmp_path / "tiny", world.config(targeting=RULES), lists())
    with between(shared.url) as way, Funnel.open(store, users=f"{way.url}?socket_timeout=5") as funnel:
        yield way, funnel


@pytest.fixture
def shared(redis_url: str) -> Shared:
    place = Shared(redis_url)
    place.write(world.users(), world.events(), labels=["is_click", "is_like"])
    return place


@pytest.fixture
def funnel(published: Path, shared: Shared) -> Iterator[Funnel]:
    with Funnel.open(published, users=shared.url) as funnel:
        yield funnel


def winners(funnel: Funnel, user_id: int, time_ms: int = NOW) -> list[Winner]:
    answer = funnel.recommend(Request(user_id, 5, time_ms, CONTEXT))
    assert not answer.degraded
    return list(answer.winners)


def test_winners_are_the_same_wherever_the_users_are(funnel: Funnel, store: Path) -> None:
    events = [
        LiveEvent(user, item, name, UNTIL + 100 + item, f"{user} {item} {name}")
        for user in USERS
        for item in (104, 106)
        for name in ("impression", "is_click")
    ]
    with Funnel.open(store) as files:
        assert [winners(funnel, user) for user in USERS] == [winners(files, user) for user in USERS]
        for one in (funnel, files):
            assert one.record(events) == Recorded(16, 0, 0, 0)
            assert one.record(events) == Recorded(16, 0, 16, 0)
        with_events = [winners(funnel, user) for user in USERS]
        assert with_events == [winners(files, user) for user in USERS]
        assert with_events != [winners(funnel, user, UNTIL + 1) for user in USERS]
        notes = [one.recommend(Request(9, 1, NOW, CONTEXT)).notes for one in (funnel, files)]
        assert notes == [["unknown user 9: served as a new user"]] * 2


def test_what_one_server_was_told_the_other_knows(funnel: Funnel, published: Path, shared: Shared) -> None:
    with Funnel.open(published, users=shared.url) as other, Client(create_app(other)) as client:
        before = winners(funnel, 3)
        sent = [{"user_id": 3, "item_id": 100 + n, "event": "is_click", "time_ms": UNTIL + n} for n in (1, 2)]
        taken = client.post("/v1/events", json={"events": sent})
        assert taken.json() == {"accepted": 2, "unknown_items": 0, "repeated": 0, "already_logged": 0}
        body = {"user_id": 3, "k": 5, "context": CONTEXT, "time_ms": NOW}
        answer = client.post("/v1/recommend", json=body).json()
        assert [(one["item_id"], one["utility_micros"]) for one in answer["winners"]] == [
            (one.item_id, one.utility_micros) for one in winners(funnel, 3)
        ]
        assert winners(funnel, 3) != before


def test_a_request_waits_for_one_round_trip(published: Path, shared: Shared) -> None:
    with between(shared.url) as way, Funnel.open(published, users=way.url) as funnel:
        before = way.num_trips
        for user in USERS:
            winners(funnel, user)
        assert way.num_trips - before == len(USERS)


def test_a_redis_that_hangs_and_comes_back_degrades_answers_meanwhile(
    published: Path, shared: Shared, store: Path
) -> None:
    with Funnel.open(store) as files:
        as_new = winners(files, 9)
    with (
        between(shared.url) as way,
        Funnel.open(published, users=way.url) as funnel,
        Client(create_app(funnel)) as http,
    ):
        known = winners(funnel, 1)
        way.answers.clear()
        took = []
        for _ in range(8):
            start = time.perf_counter()
            answer = funnel.recommend(Request(1, 5, NOW, CONTEXT, deadline_ms=5_000.0))
            took.append(time.perf_counter() - start)
            assert list(answer.winners) == as_new
            assert answer.degraded
            assert answer.notes[0].startswith("expand_user: it failed (")
        assert all(0.09 < one < 2 for one in took[:5]), took
        assert max(took[5:]) < 0.09, took
        answer = http.post("/v1/recommend", json={"user_id": 1, "k": 5, "context": CONTEXT}).json()
        assert answer["degraded"]
        assert answer["notes"] == ["expand_user: it failed (CircuitOpen); serve_as_new_user took its place"]
        assert "serve_as_new_user" in [stage["name"] for stage in answer["stages"]]
        way.answers.set()
        time.sleep(2.1)
        assert winners(funnel, 1) == known


def test_events_that_the_redis_does_not_take_are_a_503_and_may_be_sent_again(funnel: Funnel, shared: Shared) -> None:
    sent = {"events": [{"user_id": 3, "item_id": 100, "event": "is_click", "event_id": "a"}]}
    with Client(create_app(funnel)) as client:
        shared.client.config_set("maxmemory", "1mb")
        try:
            refused = client.post("/v1/events", json=sent)
        finally:
            shared.client.config_set("maxmemory", "0")
        assert (refused.status_code, refused.json()["error"]["type"]) == (503, "StoreFailed")
        assert "redis" not in refused.json()["error"]["message"]
        assert client.post("/v1/events", json=sent).json()["repeated"] == 0


def test_the_ranking_stage_alone_says_that_a_user_id_cannot_be_looked_up(funnel: Funnel, shared: Shared) -> None:
    """It has no answer that is degraded, and nobody else's is his."""
    body = {
        "inputs": [
            {"name": "item_ids", "datatype": "INT64", "shape": [1, 2], "data": [100, 101]},
            {"name": "user_id", "datatype": "INT64", "shape": [1, 1], "data": [1]},
            {"name": "context.hour", "datatype": "INT64", "shape": [1, 1], "data": [1]},
            {"name": "context.surface", "datatype": "BYTES", "shape": [1, 1], "data": ["feed"]},
        ]
    }
    with Client(create_app(funnel)) as client:
        asked = client.post("/v2/models/tiny/infer", json=body)
        assert asked.status_code == 200, asked.text
        shared.client.flushall()
        assert client.post("/v2/models/tiny/infer", json=body).status_code == 503


TARGETED = Request(1, 5, NOW, {**CONTEXT, "placement": 1})


def test_the_two_expansions_ask_each_once_and_overlap(far: tuple[Between, Funnel]) -> None:
    way, funnel = far
    funnel.recommend(TARGETED)  # both connections are made
    way.delay_s = 0.2
    before = way.num_trips
    answer = funnel.recommend(TARGETED)
    assert 1 <= way.num_trips - before <= 2
    assert not answer.degraded
    took = {stage.name: (stage.start_ms, stage.ms) for stage in answer.stages}
    assert min(took[name][1] for name in ("expand_user", "expand_targeting")) >= 200
    assert abs(took["expand_user"][0] - took["expand_targeting"][0]) < 150


def test_targeting_that_cannot_read_the_profile_is_an_error(far: tuple[Between, Funnel], redis_url: str) -> None:
    _, funnel = far
    Shared(redis_url).client.flushall()
    with pytest.raises(StoreFailed, match="is no longer there"):
        funnel.recommend(TARGETED)
    with Client(create_app(funnel)) as client:
        body = {"user_id": 1, "k": 5, "context": dict(TARGETED.context)}
        assert client.post("/v1/recommend", json=body).status_code == 503


def test_a_version_that_is_promoted_reads_the_users_that_were_loaded_last(
    published: Path, shared: Shared, tmp_path: Path
) -> None:
    """The one before keeps its own until it has ended; then they are removed, and the events that the log has."""
    store = Path(shutil.copytree(published, tmp_path / "store"))
    first = str(Registry(store).live())
    second = str(Registry(publish_live(store, world.config(), seed=7)).live())
    Registry(store).rollback(first, "a test", "the first serves first")
    old = shared.generation()
    with closing(VersionWatch.open(store, users=shared.url)) as watch:
        watch.live.record([LiveEvent(3, 106, "is_click", UNTIL + 5)])
        later = world.shown(3, world.events()[0][1][:1], world.events()[0][2][:1] + 9000, [1])
        shared.write(world.users(), [later], labels=["is_click", "is_like"])
        with watch.live.taken() as funnel:
            assert isinstance(funnel, Funnel)
            record = funnel._users.get(3)
            assert record is not None
            assert record.item_ids.tolist() == [106]
        assert shared.client.exists(old)
        Registry(store).promote(second, "a test", "")
        assert watch.look()
        assert watch.live.version == second
        with watch.live.taken() as funnel:
            assert isinstance(funnel, Funnel)
            record = funnel._users.get(3)
            assert record is not None
            assert record.item_ids.tolist() == [100]
        assert not shared.client.exists(old)
        assert shared.events([]).get(3).tolist() == []


def test_users_that_are_loaded_again_and_again_under_load_fail_no_request(funnel: Funnel, shared: Shared) -> None:
    """Each time as they were, so every answer is known; and the funnel reads those it opened."""
    expected = {user: winners(funnel, user) for user in USERS}
    ending, num = threading.Event(), 0

    def load() -> None:
        while not ending.is_set():
            shared.write(world.users(), world.events(), labels=["is_click", "is_like"])

    thread = threading.Thread(target=load)
    thread.start()
    try:
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            for user in USERS:
                assert winners(funnel, user) == expected[user]
                num += 1
    finally:
        ending.set()
        thread.join()
    assert num > 10


def test_a_redis_that_cannot_serve_this_version_is_refused(published: Path, redis_url: str) -> None:
    shared = Shared(redis_url)
    with pytest.raises(DataError, match=r"expected the users of funnel 'tiny', found none; load them with"):
        Funnel.open(published, users=redis_url)
    shared.write(world.users(), [], labels=[])
    with pytest.raises(SchemaMismatch, match="no label 'is_click'"):
        Funnel.open(published, users=redis_url)
    assert shared.client.zcard("prerank:tiny:users:held") == 0, "what could not be opened holds nothing"
    with pytest.raises(StoreFailed, match="expected a Redis that answers"):
        Funnel.open(published, users="redis://127.0.0.1:1/0")


def test_a_server_whose_redis_is_not_there_says_so_and_is_not_ready(published: Path) -> None:
    with closing(VersionWatch.open(published, users="redis://:secret@127.0.0.1:1/0")) as watch:
        assert isinstance(watch.live.error, StoreFailed)
        assert "secret" not in str(watch.live.error)
        with Client(create_app(watch.live)) as client:
            assert client.get("/readyz").status_code == 503
