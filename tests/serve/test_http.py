import asyncio
import json
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator

import httpx
import msgspec
import pytest
import structlog

from prerank.errors import BundleError, DataError, DeadlineExceeded, RequestError
from prerank.serve.http import Limits, create_app
from prerank.serve.wire import AnswerBody
from prerank.types import Request
from tests.serve.client import Client
from tests.serve.fake import FakeFunnel, error_of


@pytest.fixture
def funnel() -> FakeFunnel:
    return FakeFunnel()


@pytest.fixture
def client(funnel: FakeFunnel) -> Iterator[Client]:
    with Client(create_app(funnel)) as client:
        yield client


GOOD = {"user_id": 7, "k": 2, "context": {"hour": 3}, "deadline_ms": 50}


def test_a_request_is_answered_in_the_promised_form(client: Client, funnel: FakeFunnel) -> None:
    response = client.post("/v1/recommend", json={**GOOD, "time_ms": 1650844800000}, headers={"x-request-id": "r-1"})
    assert response.status_code == 200
    assert response.json() == {
        "request_id": "r-1",
        "version": "20220501T0000-abc",
        "winners": [
            {
                "item_id": 0,
                "utility_micros": 2.5,
                "prob": {"click": 0.25},
                "metadata": {"title": "item 0"},
                "found_by": ["index"],
            },
            {
                "item_id": 1,
                "utility_micros": 2.5,
                "prob": {"click": 0.25},
                "metadata": {"title": "item 1"},
                "found_by": ["index"],
            },
        ],
        "stages": [
            {"name": "retrieve", "start_ms": 0.0, "ms": 2.0, "in": 500, "out": 100},
            {"name": "rank", "start_ms": 2.0, "ms": 1.0, "in": 100, "out": 2},
        ],
        "degraded": False,
        "notes": ["a note"],
    }
    assert funnel.asked == [Request(7, 2, 1650844800000, {"hour": 3}, 50.0, "r-1")]


def test_an_answer_is_what_the_openapi_document_says(client: Client) -> None:
    content = client.post("/v1/recommend", json=GOOD).content
    answer = msgspec.json.decode(content, type=AnswerBody)
    assert msgspec.json.encode(answer) == content


def test_what_a_request_leaves_out_is_now_and_the_funnels_default(client: Client, funnel: FakeFunnel) -> None:
    before = time.time_ns() // 1_000_000
    assert client.post("/v1/recommend", json={"user_id": 7, "k": 1}).status_code == 200
    asked = funnel.asked[0]
    assert before < asked.time_ms <= time.time_ns() // 1_000_000 + 1, "now, rounded up: this millisecond's events count"
    assert asked.deadline_ms == 250.0
    assert asked.context == {}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("", "body: expected one JSON object: Input data was truncated"),
        ("{", "body: expected one JSON object: Input data was truncated"),
        ("{'user_id': 1}", "body: expected one JSON object: JSON is malformed"),
        ('{"user_id": NaN, "k": 1}', "JSON is malformed: invalid character"),
        ('{"user_id": 1, "k": 1, "context": {"x": NaN}}', "JSON is malformed: invalid character"),
        ('{"user_id": 1, "k": 1, "deadline_ms": Infinity}', "JSON is malformed: invalid character"),
        ('{"user_id": 1, "k": 1} {}', "trailing characters"),
        (b'{"user_id": 1, "k": 1, "context": {"x": "\xff"}}', "body: expected JSON in UTF-8: invalid start byte"),
        (b"\x00\x01\x02", "JSON is malformed"),
    ],
)
def test_a_body_that_is_no_json_is_a_400(client: Client, body: str | bytes, says: str) -> None:
    status, kind, message = error_of(client.post("/v1/recommend", content=body))
    assert (status, kind) == (400, "MalformedBody")
    assert says in message


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("[]", "body: expected object, got array"),
        ("null", "body: expected object, got null"),
        ('{"k": 1}', "user_id: missing, and every request needs it"),
        ('{"user_id": 1}', "k: missing, and every request needs it"),
        ('{"user_id": true, "k": 1}', "user_id: expected int, got bool"),
        ('{"user_id": 1.0, "k": 1}', "user_id: expected int, got float"),
        ('{"user_id": "1", "k": 1}', "user_id: expected int, got str"),
        ('{"user_id": null, "k": 1}', "user_id: expected int, got null"),
        ('{"user_id": 9223372036854775808, "k": 1}', "user_id: expected an int64, got 9223372036854775808"),
        ('{"user_id": 1, "k": 0}', "k: expected 1 to 100, got 0"),
        ('{"user_id": 1, "k": -5}', "k: expected 1 to 100, got -5"),
        ('{"user_id": 1, "k": 1000000}', "k: expected 1 to 100, got 1000000"),
        ('{"user_id": 1, "k": 1e2}', "k: expected int, got float"),
        ('{"user_id": 1, "kk": 1}', "kk: unknown field, expected one of"),
        ('{"user_id": 1, "kk": 1}', 'did you mean "k"?'),
        ('{"user_id": 1, "k": 1, "context": [1]}', "context: expected object, got array"),
        (
            '{"user_id": 1, "k": 1, "context": {"a": 1, "b": {"c": 1}}}',
            "context.b: expected bool | int | float | str | array | null, got object",
        ),
        ('{"user_id": 1, "k": 1, "context": {"a": [1], "b": [[2]]}}', "context.b: expected bool | int | float | str"),
        ('{"user_id": 1, "k": 1, "context": {"a": 1e999}}', "context: expected a number a 64-bit float can hold"),
        ('{"user_id": 1, "k": 1, "deadline_ms": 1e999}', "deadline_ms: expected a number a 64-bit float can hold"),
        ('{"user_id": 1, "k": 1, "deadline_ms": 0}', "deadline_ms: expected a finite number above 0, got 0"),
        ('{"user_id": 1, "k": 1, "deadline_ms": -1}', "deadline_ms: expected a finite number above 0, got -1"),
        ('{"user_id": 1, "k": 1, "deadline_ms": "5"}', "deadline_ms: expected float | null, got str"),
        ('{"user_id": 1, "k": 1, "time_ms": -1}', "time_ms: expected UTC milliseconds since 1970"),
        ('{"user_id": 1, "k": 1, "time_ms": 253402300800000}', "time_ms: expected UTC milliseconds since 1970"),
    ],
)
def test_a_field_that_is_wrong_is_a_422_naming_it(client: Client, body: str, says: str) -> None:
    status, kind, message = error_of(client.post("/v1/recommend", content=body))
    assert (status, kind) == (422, "RequestError")
    assert says in message


@pytest.mark.parametrize("opening", ["[", '{"a":', '{"user_id": 1, "k": 1, "context": {"x": ' + "["])
def test_nesting_without_end_is_refused_not_followed(client: Client, opening: str) -> None:
    status, _, _ = error_of(client.post("/v1/recommend", content=(opening * 60_000)[:60_000]))
    assert status in (400, 422)


def test_a_body_over_the_bound_is_a_413_however_it_comes(funnel: FakeFunnel) -> None:
    async def parts() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield b" " * 50

    with Client(create_app(funnel, Limits(body_bytes=100))) as client:
        for content in (b" " * 101, parts()):
            status, kind, message = error_of(client.post("/v1/recommend", content=content))
            assert (status, kind) == (413, "BodyTooLarge")
            assert "expected at most 100 bytes" in message
        fits = json.dumps({"user_id": 1, "k": 1}).encode().ljust(100)
        assert client.post("/v1/recommend", content=fits).status_code == 200


def raises(error: Exception) -> Callable[[Request], None]:
    def before(_: Request) -> None:
        raise error

    return before


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RequestError("context.hour: missing"), (422, "RequestError", "context.hour: missing")),
        (DeadlineExceeded("rank: the deadline passed"), (504, "DeadlineExceeded", "rank: the deadline passed")),
    ],
)
def test_an_error_the_client_can_mend_is_told_in_full(
    client: Client, funnel: FakeFunnel, error: Exception, expected: tuple[int, str, str]
) -> None:
    funnel.before = raises(error)
    assert error_of(client.post("/v1/recommend", json=GOOD)) == expected


@pytest.mark.parametrize("error", [ValueError("secret"), DataError("/secret/path"), RecursionError("secret")])
def test_our_own_mistake_is_a_500_with_an_id_and_no_details(
    client: Client, funnel: FakeFunnel, error: Exception
) -> None:
    funnel.before = raises(error)
    with structlog.testing.capture_logs() as logs:
        response = client.post("/v1/recommend", json=GOOD, headers={"x-request-id": "r-2"})
    assert error_of(response) == (500, "InternalError", "the server made a mistake; its log has this request_id")
    assert "secret" not in response.text
    assert [(log["event"], log["request_id"], log["exc_info"]) for log in logs] == [("request failed", "r-2", error)]
    funnel.before = lambda _: None
    assert client.post("/v1/recommend", json=GOOD).status_code == 200


def test_what_is_not_there_has_the_same_form_of_error(client: Client) -> None:
    assert error_of(client.get("/v3")) == (404, "NotFound", "GET /v3: Not Found")
    response = client.get("/v1/recommend")
    assert error_of(response) == (405, "MethodNotAllowed", "GET /v1/recommend: Method Not Allowed")
    assert response.headers["allow"] == "POST"


def test_a_request_id_is_echoed_if_it_is_plain_and_made_up_if_not(client: Client) -> None:
    assert client.get("/healthz", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    for unusable in ("x" * 129, "tab\tbed", ""):
        made = client.get("/healthz", headers={"x-request-id": unusable}).headers["x-request-id"]
        assert re.fullmatch("[0-9a-f]{32}", made)


def test_a_funnel_that_loaded_is_alive_and_ready(client: Client) -> None:
    assert (client.get("/healthz").status_code, client.get("/healthz").text) == (200, "alive\n")
    assert client.get("/readyz").json() == {"status": "ready", "version": "20220501T0000-abc"}


def test_a_funnel_that_did_not_load_is_alive_not_ready_and_answers_nothing() -> None:
    app = create_app(BundleError("scorer.safetensors: expected sha256 1, found 2"))
    with Client(app) as client:
        assert client.get("/healthz").status_code == 200
        assert error_of(client.get("/readyz")) == (
            503,
            "NotReady",
            "BundleError: scorer.safetensors: expected sha256 1, found 2",
        )
        assert error_of(client.post("/v1/recommend", json=GOOD)) == (
            503,
            "NotReady",
            "no version is loaded; /readyz says why",
        )
        assert "not ready" in client.get("/docs").text
        assert "prerank_version{" not in client.get("/metrics").text


def test_more_requests_than_may_wait_are_turned_away_at_once(funnel: FakeFunnel) -> None:
    gate = threading.Event()
    funnel.before = lambda _: gate.wait(30) and None
    app = create_app(funnel, Limits(threads=1, waiting=1))

    async def crowd() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://localhost") as http:
            held = [asyncio.create_task(http.post("/v1/recommend", json=GOOD)) for _ in range(2)]
            while "in_flight 2.0" not in (await http.get("/metrics")).text:
                await asyncio.sleep(0.002)
            turned_away = await http.post("/v1/recommend", json=GOOD)
            gate.set()
            return [turned_away, *await asyncio.gather(*held), await http.post("/v1/recommend", json=GOOD)]

    turned_away, *answered = asyncio.run(crowd())
    assert error_of(turned_away) == (503, "Overloaded", "2 requests are waiting already; try again later")
    assert turned_away.headers["retry-after"] == "1"
    assert [response.status_code for response in answered] == [200, 200, 200]


def test_metrics_count_requests_stages_errors_and_degraded_answers(client: Client, funnel: FakeFunnel) -> None:
    client.post("/v1/recommend", json=GOOD)
    funnel.degraded = True
    client.post("/v1/recommend", json=GOOD)
    client.post("/v1/recommend", json={**GOOD, "k": 0})
    client.get("/nowhere")
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = response.text.splitlines()
    for line in (
        'prerank_version{version="20220501T0000-abc"} 1.0',
        'prerank_request_seconds_count{status="200"} 2.0',
        'prerank_request_seconds_count{status="422"} 1.0',
        'prerank_stage_seconds_count{stage="rank"} 2.0',
        'prerank_stage_in_total{stage="retrieve"} 1000.0',
        'prerank_stage_out_total{stage="rank"} 4.0',
        'prerank_errors_total{type="RequestError"} 1.0',
        'prerank_errors_total{type="NotFound"} 1.0',
        "prerank_degraded_total 1.0",
        'prerank_tail_evictions_total{why="stale"} 5.0',
        'prerank_tail_evictions_total{why="room"} 2.0',
        "prerank_requests_in_flight 0.0",
    ):
        assert line in lines


def test_two_apps_in_one_process_count_apart(funnel: FakeFunnel) -> None:
    with Client(create_app(funnel)) as one, Client(create_app(funnel)) as other:
        one.post("/v1/recommend", json=GOOD)
        assert 'prerank_request_seconds_count{status="200"}' not in other.get("/metrics").text


def test_the_openapi_document_describes_every_endpoint_and_every_reference_resolves(client: Client) -> None:
    document = client.get("/openapi.json").json()
    assert document["openapi"] == "3.1.0"
    assert set(document["paths"]) == {
        *("/v1/recommend", "/v1/metadata", "/v1/events", "/v1/items", "/v1/traces", "/v1/trace/{id}"),
        *("/healthz", "/readyz", "/metrics"),
    }
    for ref in re.findall(r'"\$ref": ?"#/components/schemas/(\w+)"', json.dumps(document)):
        assert ref in document["components"]["schemas"]
    recommend = document["paths"]["/v1/recommend"]["post"]
    assert set(recommend["responses"]) == {"200", "400", "413", "422", "500", "503", "504"}
    body = document["components"]["schemas"]["RecommendBody"]
    assert body["additionalProperties"] is False
    assert body["required"] == ["user_id", "k"]


def test_the_openapi_example_works(client: Client) -> None:
    document = client.get("/openapi.json").json()
    example = document["paths"]["/v1/recommend"]["post"]["requestBody"]["content"]["application/json"]["example"]
    assert example["context"] == {"hour": 1, "page": '<"top">'}
    assert client.post("/v1/recommend", json=example).status_code == 200


def test_the_docs_page_is_whole_in_itself_and_escapes_what_it_shows(client: Client) -> None:
    response = client.get("/", follow_redirects=True)
    assert response.url.path == "/docs"
    page = response.text
    assert "20220501T0000-abc" in page
    assert 'data-context="hour"' in page
    assert '<"top">' not in page
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', page)
    for path in ("/v1/recommend", "/v1/events", "/healthz", "/readyz", "/metrics"):
        assert path in page
