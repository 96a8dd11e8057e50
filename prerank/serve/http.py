"""The funnel over HTTP. Every failure is one JSON object; a client never sees a stack trace.

The event loop only reads and writes; a request is decoded, run and encoded on one of a fixed number of worker threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import structlog
import torch
import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prerank.bundle.registry import Registry
from prerank.errors import DeadlineExceeded, PrerankError, RegistryError, RequestError
from prerank.serve.answer import Answer
from prerank.serve.funnel import Funnel
from prerank.serve.metrics import CONTENT_TYPE, ServeMetrics
from prerank.serve.openapi import docs_page, openapi
from prerank.serve.wire import MalformedBody, decode_request, encode_answer, encode_error
from prerank.types import Given, Request

_log = structlog.get_logger(__name__)
_NO_HEADERS: Mapping[str, str] = {}
_RETRY = {"retry-after": "1"}


class Recommender(Protocol):
    """What a server needs of a funnel; `serve.funnel.Funnel` is one."""

    @property
    def version(self) -> str:
        """The version every answer is of."""
        ...

    @property
    def default_deadline_ms(self) -> float:
        """The deadline of a request that names none."""
        ...

    @property
    def example_context(self) -> Mapping[str, Given]:
        """A context that works, one value a field."""
        ...

    def recommend(self, request: Request, arrived: float | None = None) -> Answer:
        """The winners; see `Funnel.recommend`."""
        ...


@dataclass(frozen=True, slots=True)
class Limits:
    """What one process takes on: `threads` requests run at once, `waiting` more may wait, of `body_bytes` each."""

    threads: int = 2
    waiting: int = 64
    body_bytes: int = 65_536


class Refused(PrerankError):
    """A request the server itself turns away, with its HTTP status, the error's type, and headers to add."""

    def __init__(self, status: int, kind: str, message: str, headers: Mapping[str, str] = _NO_HEADERS) -> None:
        super().__init__(message)
        self.status, self.kind, self.headers = status, kind, headers


def create_app(funnel: Recommender | PrerankError, limits: Limits = Limits()) -> Starlette:
    """The application around `funnel`, or, given the error that kept it from loading, one that says it is not ready."""
    server = _Server(funnel, limits)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        server.pool.shutdown()

    return Starlette(
        routes=[
            Route("/v1/recommend", server.recommend, methods=["POST"]),
            Route("/healthz", server.healthz),
            Route("/readyz", server.readyz),
            Route("/metrics", server.metrics_text),
            Route("/openapi.json", server.openapi),
            Route("/docs", server.docs),
            Route("/", server.home),
        ],
        middleware=[Middleware(_Envelope, metrics=server.metrics)],
        exception_handlers={HTTPException: _refused_by_routing},
        lifespan=lifespan,
    )


def serve(
    store: Path,
    *,
    version: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    limits: Limits = Limits(),
) -> None:
    """Serve `version` of the funnel at `store` (the live one unless named) until a signal ends it.

    Raises RegistryError at once where there is nothing to serve. A version or store that cannot be loaded is said on
    stderr in one line, and by /readyz for as long as the process lives.
    """
    if version is None and Registry(store).live() is None:
        raise RegistryError(f"{store}: no version is live; promote one, or name one with --version")
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    torch.set_num_threads(1)  # two requests that share cores by spinning cost each other more than they gain
    funnel = _open(store, version)
    try:
        app = create_app(funnel, limits)
        uvicorn.run(app, host=host, port=port, access_log=False, timeout_graceful_shutdown=10)
    finally:
        if isinstance(funnel, Funnel):
            funnel.close()


def _open(store: Path, version: str | None) -> Funnel | PrerankError:
    try:
        return Funnel.open(store, version)
    except PrerankError as error:
        line = " ".join(str(error).split())
        print(f"prerank serve: not ready: {type(error).__name__}: {line}", file=sys.stderr, flush=True)
        return error


class _Server:
    """The endpoints and what they share."""

    def __init__(self, funnel: Recommender | PrerankError, limits: Limits) -> None:
        self.funnel, self.limits = funnel, limits
        self.metrics = ServeMetrics()
        self.pool = ThreadPoolExecutor(limits.threads, thread_name_prefix="recommend")
        self.num_in_flight = 0
        if not isinstance(funnel, PrerankError):
            self.metrics.serves(funnel.version)

    async def recommend(self, http: HttpRequest) -> Response:
        funnel = self.funnel
        if isinstance(funnel, PrerankError):
            raise Refused(503, "NotReady", "no version is loaded; /readyz says why")
        content = await _read_body(http, self.limits.body_bytes)
        if self.num_in_flight >= self.limits.threads + self.limits.waiting:
            raise Refused(
                503, "Overloaded", f"{self.num_in_flight} requests are waiting already; try again later", _RETRY
            )
        arrived = time.perf_counter()
        self._note_in_flight(+1)
        try:
            run = asyncio.get_running_loop().run_in_executor
            encoded = await run(self.pool, self._answer, funnel, content, arrived, http.state.request_id)
        finally:
            self._note_in_flight(-1)
        return Response(encoded, media_type="application/json")

    def _answer(self, funnel: Recommender, content: bytes, arrived: float, request_id: str) -> bytes:
        request = decode_request(content).request(
            now_ms=time.time_ns() // 1_000_000, deadline_ms=funnel.default_deadline_ms, request_id=request_id
        )
        answer = funnel.recommend(request, arrived)
        self.metrics.answered(answer)
        return encode_answer(answer)

    def _note_in_flight(self, change: int) -> None:
        self.num_in_flight += change
        self.metrics.in_flight(self.num_in_flight)

    async def healthz(self, _: HttpRequest) -> Response:
        return PlainTextResponse("alive\n")

    async def readyz(self, _: HttpRequest) -> Response:
        if isinstance(self.funnel, PrerankError):
            raise Refused(503, "NotReady", f"{type(self.funnel).__name__}: {self.funnel}")
        return JSONResponse({"status": "ready", "version": self.funnel.version})

    async def metrics_text(self, _: HttpRequest) -> Response:
        return Response(self.metrics.text(), headers={"content-type": CONTENT_TYPE})

    async def openapi(self, _: HttpRequest) -> Response:
        return JSONResponse(openapi(self._example()))

    async def docs(self, _: HttpRequest) -> Response:
        version = "" if isinstance(self.funnel, PrerankError) else self.funnel.version
        return HTMLResponse(docs_page(self._example(), version, self._context()))

    async def home(self, _: HttpRequest) -> Response:
        return RedirectResponse("/docs")

    def _context(self) -> Mapping[str, Given]:
        return {} if isinstance(self.funnel, PrerankError) else self.funnel.example_context

    def _example(self) -> dict[str, object]:
        return {"user_id": 1, "k": 10, "context": dict(self._context()), "deadline_ms": 1000}


class _Envelope:
    """Around every request: an id in and out, one form for every error, and the time a recommendation took."""

    def __init__(self, app: ASGIApp, metrics: ServeMetrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start = time.perf_counter()
        request_id = _request_id(Headers(scope=scope))
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception as error:
            if status:  # the answer is on its way, and a second one would not be HTTP
                raise
            await self._failed(error, request_id)(scope, receive, send_with_id)
        finally:
            if scope["path"] == "/v1/recommend":
                self.metrics.took(status, time.perf_counter() - start)

    def _failed(self, error: Exception, request_id: str) -> Response:
        status, kind, message = _told(error)
        if status == 500:
            _log.error("request failed", request_id=request_id, exc_info=error)
        self.metrics.failed(kind)
        headers = error.headers if isinstance(error, Refused) else _NO_HEADERS
        return Response(encode_error(kind, message, request_id), status, headers, "application/json")


def _told(error: Exception) -> tuple[int, str, str]:
    """Status, type and message for the client; of our own mistakes it learns only that there was one."""
    match error:
        case Refused():
            return error.status, error.kind, str(error)
        case MalformedBody():
            return 400, "MalformedBody", str(error)
        case RequestError():
            return 422, "RequestError", str(error)
        case DeadlineExceeded():
            return 504, "DeadlineExceeded", str(error)
        case _:
            return 500, "InternalError", "the server made a mistake; its log has this request_id"


async def _refused_by_routing(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind = {404: "NotFound", 405: "MethodNotAllowed"}.get(error.status_code, "HTTPError")
    message = f"{http.method} {http.url.path}: {error.detail}"
    raise Refused(error.status_code, kind, message, error.headers or _NO_HEADERS)


async def _read_body(http: HttpRequest, limit: int) -> bytes:
    content = bytearray()
    async for part in http.stream():
        content += part
        if len(content) > limit:
            raise Refused(413, "BodyTooLarge", f"body: expected at most {limit} bytes, got more")
    return bytes(content)


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    usable = 0 < len(given) <= 128 and given.isascii() and given.isprintable()
    return given if usable else uuid.uuid4().hex
