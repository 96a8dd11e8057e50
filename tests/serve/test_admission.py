"""Who is let in, and what becomes of those whose time runs out, or whose client leaves, or whose server ends."""

import asyncio
import signal
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette

from prerank.errors import Cancelled
from prerank.serve.admission import Door
from prerank.serve.ending import EndingServer
from prerank.serve.http import Limits, create_app
from prerank.types import Request
from tests.serve.client import Client
from tests.serve.fake import FakeFunnel, error_of
from tests.serve.server import listening, running

BODY = {"user_id": 1, "k": 1, "deadline_ms": 60_000}


def together(app: Starlette, work: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
    async def main() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://localhost") as http:
            await work(http)

    asyncio.run(main())


async def in_flight(http: httpx.AsyncClient, number: int) -> None:
    while f"prerank_requests_in_flight {number}.0" not in (await http.get("/metrics")).text:
        await asyncio.sleep(0.002)


class Gate:
    """A funnel whose requests wait until it opens."""

    def __init__(self) -> None:
        self.opens, self.begun = threading.Event(), threading.Semaphore(0)
        self.funnel = FakeFunnel(before=self._wait)

    def _wait(self, _: Request) -> None:
        self.begun.release()
        assert self.opens.wait(30)


def test_a_deadline_that_would_pass_in_the_queue_is_refused_at_once() -> None:
    gate = Gate()
    funnel = FakeFunnel(before=lambda _: time.sleep(0.1))
    app = create_app(funnel, Limits(threads=1))

    async def work(http: httpx.AsyncClient) -> None:
        for _ in range(3):  # so it is known that one takes 100 ms
            await http.post("/v1/recommend", json=BODY)
        funnel.before = gate._wait
        held = [asyncio.create_task(http.post("/v1/recommend", json=BODY)) for _ in range(3)]
        await in_flight(http, 3)
        start = time.perf_counter()
        late = await http.post("/v1/recommend", json={**BODY, "deadline_ms": 350})  # 300 to wait, 100 to work
        by_default = await http.post("/v1/recommend", json={"user_id": 1, "k": 1})
        assert time.perf_counter() - start < 1
        for response in (late, by_default):
            status, kind, message = error_of(response)
            assert (status, kind) == (503, "Overloaded")
            assert "ms would pass first: 3 requests are here, and one takes about 1" in message
            assert response.headers["retry-after"] == "1"
        assert "the deadline of 350 ms" in late.text
        assert "the deadline of 250 ms" in by_default.text, "the funnel's own"
        patient = asyncio.create_task(http.post("/v1/recommend", json={**BODY, "deadline_ms": 5000}))
        await in_flight(http, 4)
        assert 'prerank_refused_total{why="deadline"} 2.0' in (await http.get("/metrics")).text
        gate.opens.set()
        assert [one.status_code for one in await asyncio.gather(*held, patient)] == [200] * 4

    together(app, work)
    assert len(funnel.asked) == 7


def test_an_idle_server_lets_everybody_in_however_slow_it_was() -> None:
    funnel = FakeFunnel(before=lambda _: time.sleep(0.05))
    with Client(create_app(funnel, Limits(threads=1))) as client:
        assert client.post("/v1/recommend", json=BODY).status_code == 200
        assert client.post("/v1/recommend", json={**BODY, "deadline_ms": 1}).status_code == 200


def test_what_cannot_be_read_waits_its_turn_to_be_told_why() -> None:
    gate = Gate()

    async def work(http: httpx.AsyncClient) -> None:
        held = asyncio.create_task(http.post("/v1/recommend", json=BODY))
        await in_flight(http, 1)
        bad = [
            asyncio.create_task(http.post("/v1/recommend", content=content))
            for content in (
                b"{",
                b'{"user_id": 1, "k": 1, "deadline_ms": -1}',
                b'{"user_id": 1, "k": 1, "context": {"x": "\xff"}}',
            )
        ]
        await in_flight(http, 4)
        gate.opens.set()
        assert [one.status_code for one in await asyncio.gather(held, *bad)] == [200, 400, 422, 400]

    gate.funnel.before = gate._wait
    together(create_app(gate.funnel, Limits(threads=1)), work)


def test_a_deadline_that_passed_in_the_queue_ends_before_any_work() -> None:
    gate = Gate()

    async def work(http: httpx.AsyncClient) -> None:
        held = asyncio.create_task(http.post("/v1/recommend", json=BODY))
        await in_flight(http, 1)
        late = asyncio.create_task(http.post("/v1/recommend", json={**BODY, "deadline_ms": 20}))
        await in_flight(http, 2)
        await asyncio.sleep(0.05)
        gate.opens.set()
        assert (await held).status_code == 200
        status, kind, message = error_of(await late)
        assert (status, kind) == (504, "DeadlineExceeded")
        assert message == "the deadline of 20 ms passed while it waited for its turn; allow more with deadline_ms"

    together(create_app(gate.funnel, Limits(threads=1)), work)
    assert len(gate.funnel.asked) == 1


def leave(address: str, body: bytes, rest: int = 0) -> socket.socket:
    """A connection with a request on it that is not read; `rest` bytes of it are never sent."""
    host, _, port = address.removeprefix("http://").partition(":")
    connection = socket.create_connection((host, int(port)))
    head = f"POST /v1/recommend HTTP/1.1\r\nhost: test\r\ncontent-length: {len(body) + rest}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


def until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.005)


def metric(address: str, line: str) -> bool:
    return line in httpx.get(f"{address}/metrics").text.splitlines()


def test_nobody_works_for_a_client_that_left(capfd: pytest.CaptureFixture[str]) -> None:
    seen: list[bool] = []
    begun = threading.Event()

    def before(_: Request) -> None:
        begun.set()
        assert funnel.cancelled is not None
        until(funnel.cancelled.is_set)
        seen.append(True)
        raise Cancelled("the request was given up")

    funnel = FakeFunnel(before=before)
    body = b'{"user_id": 1, "k": 1, "deadline_ms": 60000}'
    with listening(create_app(funnel, Limits(threads=1))) as address:
        running, waiting = leave(address, body), None
        assert begun.wait(30)
        waiting = leave(address, body)
        until(lambda: metric(address, "prerank_requests_in_flight 2.0"))
        waiting.close()
        time.sleep(0.1)  # so the server knows before its turn comes
        running.close()
        until(lambda: metric(address, 'prerank_request_seconds_count{status="499"} 2.0'))
        assert metric(address, 'prerank_errors_total{type="ClientGone"} 2.0')
        leave(address, body, rest=10).close()  # in the middle of its body
        until(lambda: metric(address, 'prerank_errors_total{type="ClientGone"} 3.0'))
        funnel.before = lambda _: None
        assert httpx.post(f"{address}/v1/recommend", json=BODY).status_code == 200
        assert funnel.cancelled is not None
        assert not funnel.cancelled.is_set(), "whoever stays is not given up"
    assert seen == [True]
    assert len(funnel.asked) == 2, "the one that waited was never asked"
    said = capfd.readouterr()
    assert "request failed" not in said.out + said.err


@contextmanager
def ending(gate: Gate, linger_s: float = 0.0) -> Iterator[tuple[EndingServer, str, threading.Thread]]:
    door = Door()
    app = create_app(gate.funnel, door=door)
    server = EndingServer(uvicorn.Config(app, port=0, log_level="warning"), door, linger_s)
    with running(server) as (address, thread):
        yield server, address, thread


def test_a_server_that_ends_answers_those_inside_and_says_so_to_others() -> None:
    gate = Gate()
    with ending(gate) as (server, address, thread):
        answers: list[httpx.Response] = []
        inside = threading.Thread(target=lambda: answers.append(httpx.post(f"{address}/v1/recommend", json=BODY)))
        inside.start()
        assert gate.begun.acquire(timeout=30)
        assert httpx.get(f"{address}/readyz").status_code == 200
        server.handle_exit(signal.SIGTERM, None)
        time.sleep(0.5)
        ready = httpx.get(f"{address}/readyz")
        assert error_of(ready) == (
            503,
            "Draining",
            "the server is ending and takes nothing new; ask again, or another",
        )
        for path, body in (("recommend", BODY), ("events", {"events": []}), ("items", {"items": []})):
            refused = httpx.post(f"{address}/v1/{path}", json=body)
            assert error_of(refused)[:2] == (503, "Draining")
            assert (refused.headers["retry-after"], refused.headers["connection"]) == ("1", "close")
        assert metric(address, 'prerank_refused_total{why="draining"} 3.0')
        assert httpx.get(f"{address}/healthz").status_code == 200
        assert thread.is_alive()
        gate.opens.set()
        inside.join(timeout=30)
        assert [one.status_code for one in answers] == [200]
        thread.join(timeout=30)
        assert not thread.is_alive()
    assert len(gate.funnel.asked) == 1


def test_a_server_that_ends_lingers_for_as_long_as_it_was_told_and_no_longer_when_told_again() -> None:
    for linger_s, again in ((0.0, False), (0.6, False), (60.0, True)):
        with ending(Gate(), linger_s) as (server, _, thread):
            start = time.monotonic()
            server.handle_exit(signal.SIGTERM, None)
            if again:
                server.handle_exit(signal.SIGTERM, None)
            thread.join(timeout=30)
            assert not thread.is_alive()
            assert (0.6 if linger_s == 0.6 else 0) <= time.monotonic() - start < 5


def test_a_server_that_ends_waits_for_a_request_without_end_only_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prerank.serve.ending.MOST_S", 0.3)
    gate = Gate()
    with ending(gate) as (server, address, _):
        inside = leave(address, b'{"user_id": 1, "k": 1, "deadline_ms": 60000}')
        assert gate.begun.acquire(timeout=30)
        server.handle_exit(signal.SIGTERM, None)
        until(lambda: server.should_exit)
        gate.opens.set()
        inside.close()
