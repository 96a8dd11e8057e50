import asyncio
import json
import threading
import time
from collections.abc import Iterator

import msgspec
import pytest

from prerank.errors import BundleError
from prerank.serve.http import Limits, create_app
from prerank.serve.record import MOST_EVENTS
from prerank.serve.wire import RecordedBody
from prerank.stores.events import LiveEvent
from tests.serve.client import Client
from tests.serve.fake import FakeFunnel, error_of

SEEN = {"user_id": 7, "item_id": 5, "event": "impression", "time_ms": 1650844800000, "event_id": "e-1"}


@pytest.fixture
def funnel() -> FakeFunnel:
    return FakeFunnel()


@pytest.fixture
def client(funnel: FakeFunnel) -> Iterator[Client]:
    with Client(create_app(funnel)) as client:
        yield client


def test_events_are_taken_as_they_are_and_told_what_became_of_them(client: Client, funnel: FakeFunnel) -> None:
    response = client.post("/v1/events", json={"events": [SEEN, {**SEEN, "event": "is_click", "event_id": "e-2"}]})
    assert response.status_code == 200
    assert response.json() == {"accepted": 2, "unknown_items": 1, "repeated": 2, "already_logged": 3}
    assert msgspec.json.decode(response.content, type=RecordedBody).accepted == 2
    moment = 1650844800000
    clicked = LiveEvent(7, 5, "is_click", moment, "e-2")
    assert funnel.happened == [LiveEvent(7, 5, "impression", moment, "e-1"), clicked]


def test_an_event_that_does_not_say_when_is_of_now(client: Client, funnel: FakeFunnel) -> None:
    before = time.time_ns() // 1_000_000
    events = [{"user_id": 7, "item_id": 5, "event": "impression"}, {**SEEN, "time_ms": None}]
    assert client.post("/v1/events", json={"events": events}).status_code == 200
    assert all(before <= one.time_ms <= time.time_ns() // 1_000_000 for one in funnel.happened)
    assert [one.event_id for one in funnel.happened] == ["", "e-1"]


def test_an_events_context_is_taken_as_it_is(client: Client, funnel: FakeFunnel) -> None:
    context = {"surface": "feed", "hour": 3, "tags": ["a", None], "is_new": False, "page": None}
    events = [SEEN, {**SEEN, "context": context}]
    assert client.post("/v1/events", json={"events": events}).status_code == 200
    assert [one.context for one in funnel.happened] == [{}, context]


def one(**changes: object) -> str:
    return json.dumps({"events": [SEEN, {**SEEN, **changes}]})


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("[]", "body: expected object, got array"),
        ("{}", "events: missing, and every call needs it"),
        ('{"event": []}', "event: unknown field, expected one of ['events']; did you mean \"events\"?"),
        ('{"events": 1}', "events: expected array, got int"),
        ('{"events": []}', "events: expected 1 to 1,000 of them, got 0"),
        ('{"events": [1]}', "events[0]: expected object, got int"),
        (
            json.dumps({"events": [SEEN] * (MOST_EVENTS + 1)}),
            "events: expected 1 to 1,000 of them, got 1,001; send more",
        ),
        ('{"events": [{"user_id": 1, "item_id": 1}]}', "events[0].event: missing, and every event needs it"),
        (one(user="7"), "events[1].user: unknown field, expected one of"),
        (one(user="7"), 'did you mean "user_id"?'),
        (one(user_id="7"), "events[1].user_id: expected int, got str"),
        (one(user_id=True), "events[1].user_id: expected int, got bool"),
        (one(item_id=1.5), "events[1].item_id: expected int, got float"),
        (one(item_id=2**63), "events[1].item_id: expected an int64, got 9223372036854775808"),
        (one(event=1), "events[1].event: expected str, got int"),
        (one(event="is_clik"), "events[1].event: expected one of ['impression', 'is_click'], got 'is_clik'"),
        (one(event="is_clik"), 'did you mean "is_click"?'),
        (one(time_ms=-1), "events[1].time_ms: expected UTC milliseconds since 1970"),
        (one(time_ms="now"), "events[1].time_ms: expected int | null, got str"),
        (one(time_ms=4102444800000), "events[1].time_ms: expected at most a minute after now"),
        (one(event_id=7), "events[1].event_id: expected str, got int"),
        (one(event_id="x" * 129), "events[1].event_id: expected at most 128 characters, got 129"),
        (one(context=[1]), "events[1].context: expected object, got array"),
        (one(context={"a": 1, "b": {"c": 1}}), "events[1].context.b: expected bool | int | float | str | array | null"),
        (one(context={"a": [1], "b": [[2]]}), "events[1].context.b: expected bool | int | float | str"),
        (one(contxt={}), 'did you mean "context"?'),
    ],
)
def test_one_event_that_is_wrong_refuses_the_call_and_is_named(
    client: Client, funnel: FakeFunnel, body: str, says: str
) -> None:
    status, kind, message = error_of(client.post("/v1/events", content=body))
    assert (status, kind) == (422, "RequestError")
    assert says in message
    assert not funnel.happened


@pytest.mark.parametrize(
    "body", ["", "{", '{"events": [{"user_id": NaN}]}', b'{"events": [{"user_id": 1, "event": "\xff"}]}']
)
def test_a_body_that_is_no_json_is_a_400(client: Client, body: str | bytes) -> None:
    assert error_of(client.post("/v1/events", content=body))[:2] == (400, "MalformedBody")


@pytest.mark.parametrize(
    "opening",
    ["[", '{"events":[', '{"events":[{"user_id":[', '{"events":[{"other":' + "[", '{"events":[{"context":{"x":[' + "["],
)
def test_nesting_without_end_is_refused_not_followed(client: Client, opening: str) -> None:
    status, _, _ = error_of(client.post("/v1/events", content=(opening * 60_000)[:60_000]))
    assert status in (400, 422)


def test_a_clock_a_little_ahead_is_no_mistake(client: Client) -> None:
    soon = time.time_ns() // 1_000_000 + 30_000
    assert client.post("/v1/events", json={"events": [{**SEEN, "time_ms": soon}]}).status_code == 200


def test_as_many_as_may_come_fit_the_bound_on_a_body(client: Client, funnel: FakeFunnel) -> None:
    long = {"user_id": -(2**63), "item_id": -(2**63), "event": "impression", "time_ms": 1650844800000}
    events = [{**long, "event_id": f"{n:0128}"} for n in range(MOST_EVENTS)]
    assert client.post("/v1/events", json={"events": events}).status_code == 200
    assert len(funnel.happened) == MOST_EVENTS
    with Client(create_app(funnel, Limits(events_bytes=100))) as bounded:
        assert error_of(bounded.post("/v1/events", json={"events": events}))[:2] == (413, "BodyTooLarge")


def test_events_are_taken_while_every_thread_that_answers_is_busy(funnel: FakeFunnel) -> None:
    gate = threading.Event()
    funnel.before = lambda _: gate.wait(30) and None
    with Client(create_app(funnel, Limits(threads=1))) as client:

        async def both() -> int:
            held = asyncio.create_task(client._http.post("/v1/recommend", json={"user_id": 1, "k": 1}))
            taken = await client._http.post("/v1/events", json={"events": [SEEN]})
            gate.set()
            await held
            return taken.status_code

        assert client._runner.run(both()) == 200


def test_a_funnel_that_did_not_load_takes_no_events() -> None:
    with Client(create_app(BundleError("damaged"))) as client:
        assert error_of(client.post("/v1/events", json={"events": [SEEN]}))[:2] == (503, "NotReady")
        assert client.get("/docs").status_code == 200


def test_metrics_count_events_by_name_and_what_became_of_them(client: Client) -> None:
    client.post("/v1/events", json={"events": [SEEN, SEEN, {**SEEN, "event": "is_click"}]})
    client.post("/v1/events", json={"events": [{**SEEN, "event": "is_clik"}]})
    lines = client.get("/metrics").text.splitlines()
    for line in (
        'prerank_events_total{event="impression"} 2.0',
        'prerank_events_total{event="is_click"} 1.0',
        'prerank_events_uncounted_total{why="repeated"} 2.0',
        'prerank_events_uncounted_total{why="already_logged"} 3.0',
        "prerank_events_unknown_items_total 1.0",
        'prerank_events_seconds_count{status="200"} 1.0',
        'prerank_events_seconds_count{status="422"} 1.0',
        "prerank_events_in_flight 0.0",
    ):
        assert line in lines
    assert "is_clik" not in " ".join(lines).replace("is_click", ""), "a name nobody knows is no label of a series"
    assert not [line for line in lines if line.startswith('prerank_request_seconds_count{status="200"')]


def test_the_document_and_the_page_show_events_that_work(client: Client) -> None:
    document = client.get("/openapi.json").json()
    record = document["paths"]["/v1/events"]["post"]
    assert set(record["responses"]) == {"200", "400", "401", "403", "413", "422", "500", "503"}
    example = record["requestBody"]["content"]["application/json"]["example"]
    assert client.post("/v1/events", json=example).status_code == 200
    body = document["components"]["schemas"]["EventBody"]
    assert body["additionalProperties"] is False
    assert body["required"] == ["user_id", "item_id", "event"]
    assert body["properties"]["context"]["type"] == "object"
    page = client.get("/docs").text
    assert "/v1/events -d" in page
    assert "RecordedBody" in page
