import re
import time

import pytest
import structlog

from prerank.errors import DeadlineExceeded
from prerank.serve.funnel import Funnel
from prerank.serve.graph import StageReport
from prerank.serve.http import create_app
from prerank.serve.seeing import Sight
from prerank.serve.seen import Seen, begin, current, end
from prerank.serve.stages import Rank, Retrieve
from prerank.serve.trace_pages import narrowing, ticks, waterfall
from prerank.serve.traces import Trace, Traces
from prerank.types import Request
from tests.serve.client import Client
from tests.serve.fake import FakeFunnel, error_of

GOOD = {"user_id": 7, "k": 2, "context": {"hour": 3}, "deadline_ms": 50}
REAL = {"user_id": 1, "k": 3, "context": {"hour": 1, "surface": "feed"}}


def trace(request_id: str = "r", ms: float = 20.0, **changes: object) -> Trace:
    plain: dict = {
        "time_ms": 1_650_844_800_000,
        "status": 200,
        "began_ms": 2.0,
        "version": "v",
        "user_id": 1,
        "k": 3,
        "deadline_ms": 50.0,
        "degraded": False,
        "notes": (),
        "error": None,
        "stages": (
            StageReport("target", 1.0, 1_000_000, 1000, 0.0),
            StageReport("retrieve", 8.0, 1000, 100, 1.0),
            StageReport("prepare_user", 2.0, 5, 3, 1.5),
            StageReport("rank", 4.0, 100, 3, 10.0),
        ),
    }
    return Trace(request_id=request_id, ms=ms, **(plain | changes))


def test_a_request_leaves_its_stages_times_and_counts_under_its_id() -> None:
    with Client(create_app(FakeFunnel(degraded=True))) as client:
        before = time.time_ns() // 1_000_000
        client.post("/v1/recommend", json=GOOD, headers={"x-request-id": "r-1"})
        found = client.get("/v1/trace/r-1").json()
    assert before <= found.pop("time_ms") <= time.time_ns() // 1_000_000
    assert 0 < found.pop("ms") < 60_000
    assert found == {
        "request_id": "r-1",
        "status": 200,
        "began_ms": None,
        "version": "20220501T0000-abc",
        "user_id": 7,
        "k": 2,
        "deadline_ms": 50.0,
        "degraded": True,
        "notes": ["a note"],
        "error": None,
        "stages": [
            {"name": "retrieve", "start_ms": 0.0, "ms": 2.0, "in": 500, "out": 100},
            {"name": "rank", "start_ms": 2.0, "ms": 1.0, "in": 100, "out": 2},
        ],
    }


def test_a_real_funnels_trace_is_what_its_answer_says_and_when_its_stages_began(funnel: Funnel) -> None:
    with Client(create_app(funnel)) as client:
        answer = client.post("/v1/recommend", json={**REAL, "deadline_ms": 60_000}).json()
        found = client.get(f"/v1/trace/{answer['request_id']}").json()
    for name in ("request_id", "version", "stages", "degraded", "notes"):
        assert found[name] == answer[name]
    ends = found["began_ms"] + max(stage["start_ms"] + stage["ms"] for stage in found["stages"])
    assert 0 <= found["began_ms"] < ends <= found["ms"]


def test_a_request_that_failed_has_a_trace_of_the_stages_that_were_done(
    funnel: Funnel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(*_: object) -> None:
        raise DeadlineExceeded("retrieve: too late")

    monkeypatch.setattr(Retrieve, "run", late)
    with Client(create_app(funnel)) as client:
        client.post("/v1/recommend", json=REAL, headers={"x-request-id": "late"})
        found = client.get("/v1/trace/late").json()
    assert (found["status"], found["user_id"], found["version"]) == (504, 1, None)
    assert found["error"] == {"type": "DeadlineExceeded", "message": "retrieve: too late"}
    assert {"target", "expand_user"} <= {stage["name"] for stage in found["stages"]}
    assert "retrieve" not in {stage["name"] for stage in found["stages"]}


@pytest.mark.parametrize(
    ("body", "status", "kind", "user_id"),
    [({**GOOD, "k": 0}, 422, "RequestError", 7), ({"k": 1}, 422, "RequestError", None)],
)
def test_a_request_that_is_refused_has_a_trace_that_says_why(
    body: dict[str, object], status: int, kind: str, user_id: int | None
) -> None:
    with Client(create_app(FakeFunnel())) as client:
        answer = client.post("/v1/recommend", json=body).json()["error"]
        found = client.get(f"/v1/trace/{answer['request_id']}").json()
    assert (found["status"], found["user_id"], found["stages"]) == (status, user_id, [])
    assert found["error"] == {"type": kind, "message": answer["message"]}


def test_only_requests_for_winners_are_traced_and_the_latest_come_first() -> None:
    with Client(create_app(FakeFunnel())) as client:
        assert client.get("/v1/traces").json() == {"kept": 256, "traces": []}
        for request_id in ("a", "b/c d"):
            client.post("/v1/recommend", json=GOOD, headers={"x-request-id": request_id})
        client.post("/v1/events", json={"events": [{"user_id": 1, "item_id": 5, "event": "impression"}]})
        client.get("/metrics")
        listed = client.get("/v1/traces").json()["traces"]
        assert [one["request_id"] for one in listed] == ["b/c d", "a"]
        assert client.get("/v1/trace/b%2Fc%20d").json()["request_id"] == "b/c d"
        assert 'href="/trace/b%2Fc%20d"' in client.get("/traces").text


def test_the_ring_keeps_the_latest_and_of_one_id_the_later() -> None:
    traces = Traces(2)
    for request_id, ms in (("a", 1.0), ("b", 2.0), ("a", 3.0), ("c", 4.0)):
        traces.add(trace(request_id, ms))
    assert [(one.request_id, one.ms) for one in traces.latest()] == [("c", 4.0), ("a", 3.0)]
    assert traces.get("b") is None


@pytest.mark.parametrize(("most", "why"), [(3, "the latest 3 are kept"), (0, "none are kept: --traces is 0")])
def test_a_trace_that_is_not_there_is_a_404_that_says_how_many_are_kept(most: int, why: str) -> None:
    with Client(create_app(FakeFunnel(), sight=Sight(traces=most))) as client:
        if not most:
            client.post("/v1/recommend", json=GOOD, headers={"x-request-id": "x"})
        expected = (404, "NotFound", f"trace 'x': expected the id of a recent request; {why}")
        assert error_of(client.get("/v1/trace/x")) == expected
        assert error_of(client.get("/trace/x")) == expected


def test_a_stage_that_fails_is_logged_with_the_id_of_its_request(
    funnel: Funnel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise ValueError

    monkeypatch.setattr(Rank, "run", fails)
    with (
        structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as logs,
        Client(create_app(funnel)) as client,
    ):
        answer = client.post("/v1/recommend", json=REAL, headers={"x-request-id": "mine"}).json()
        assert structlog.contextvars.get_contextvars() == {}
    assert answer["degraded"]
    assert [(log["event"], log["request_id"]) for log in logs] == [("stage failed", "mine")]


def test_what_is_seen_costs_nothing_where_nobody_looks(funnel: Funnel) -> None:
    assert current() is None
    seen = Seen("in process")
    token = begin(seen)
    funnel.recommend(Request(1, 3, 1_650_844_900_000, REAL["context"]))  # type: ignore[arg-type]
    end(token)
    assert "rank" in {stage.name for stage in seen.stages}


def test_bars_lie_where_stages_ran_and_those_that_overlap_do() -> None:
    bars = {bar.name: bar for bar in waterfall(trace())}
    assert list(bars) == ["waited for a worker", "target", "retrieve", "prepare_user", "rank", "made the answer"]
    assert (bars["retrieve"].left, bars["retrieve"].width) == (3 / 20, 8 / 20)
    assert bars["retrieve"].left < bars["prepare_user"].left < bars["retrieve"].left + bars["retrieve"].width
    assert (bars["made the answer"].start_ms, bars["made the answer"].ms) == (16.0, 4.0)
    assert [bar.name for bar in waterfall(trace(stages=(), began_ms=None))] == ["no stage began"]


def test_candidates_are_what_all_generators_found_together() -> None:
    stages = [
        StageReport("target", 1.0, 500, 400),
        StageReport("retrieve", 1.0, 400, 100),
        StageReport("generate_new", 1.0, 1, 50),
        StageReport("merge", 1.0, 150, 120),
        StageReport("rank", 1.0, 120, 5),
    ]
    found = [(one.name, one.num) for one in narrowing(stages)]
    assert found == [("items", 500), ("eligible", 400), ("candidates", 120), ("ranked", 120), ("winners", 5)]


def test_counts_narrow_from_items_to_winners_and_say_what_share_was_left() -> None:
    levels = narrowing(trace().stages)
    assert [(one.name, one.num, one.passed) for one in levels] == [
        ("items", 1_000_000, ""),
        ("eligible", 1000, "0.1%"),
        ("candidates", 100, "10%"),
        ("ranked", 100, "100%"),
        ("winners", 3, "3%"),
    ]
    assert [one.width for one in levels] == sorted((one.width for one in levels), reverse=True)
    assert levels[0].width == 1.0
    located = [*trace().stages, StageReport("fetch_tail", 1.0, 100, 90, 9.0)]
    assert {one.name: one.num for one in narrowing(located)}["ranked"] == 90
    degraded = [*located[:3], located[-1], StageReport("rank_by_similarity", 1.0, 100, 3, 9.0)]
    assert {one.name: one.num for one in narrowing(degraded)}["ranked"] == 100, "the fallback ranks all"
    assert narrowing(()) == []


@pytest.mark.parametrize(
    ("ms", "last", "num"), [(14.14, "14", 8), (0.35, "0.35", 8), (1.0, "1", 11), (99.0, "90", 10), (2500, "2500", 6)]
)
def test_ticks_are_round_and_neither_few_nor_many(ms: float, last: str, num: int) -> None:
    found = ticks(ms)
    assert (found[0], found[-1][0], len(found)) == (("0", 0.0), last, num)
    assert all(0 <= share <= 1 for _, share in found)


def test_pages_load_nothing_and_escape_what_a_client_sent() -> None:
    with Client(create_app(FakeFunnel())) as client:
        client.post("/v1/recommend", json=GOOD, headers={"x-request-id": "<script>alert(1)</script>"})
        listed = client.get("/traces")
        link = re.search(r'href="(/trace/%3C[^"]+)"', listed.text)
        assert link is not None
        one = client.get(link[1])
        for page in (listed, one):
            assert page.status_code == 200
            assert "<script" not in page.text
            assert not re.findall(r'(?:src|href)="(?:https?:)?//', page.text)
            assert page.headers["content-security-policy"].startswith("default-src 'none'")
        assert 'href="/traces"' in client.get("/docs").text


@pytest.mark.parametrize(("share", "num"), [(1.0, 3), (0.0, 0)])
def test_a_line_a_request_says_what_came_of_it(share: float, num: int) -> None:
    with (
        structlog.testing.capture_logs() as logs,
        Client(create_app(FakeFunnel(degraded=True), sight=Sight(lines=share))) as client,
    ):
        for body in (GOOD, {**GOOD, "k": 0}, {"k": 1}):
            client.post("/v1/recommend", json=body, headers={"x-request-id": "r"})
        client.get("/healthz")
    assert len(logs) == num
    for log, status, degraded, error in zip(
        logs, (200, 422, 422), (True, False, False), (None, "RequestError", "RequestError"), strict=False
    ):
        assert 0 < log.pop("ms") < 60_000
        version = "20220501T0000-abc" if degraded else None
        assert log == {
            "event": "request",
            "log_level": "info",
            "request_id": "r",
            "version": version,
            "status": status,
            "degraded": degraded,
            "error": error,
        }
