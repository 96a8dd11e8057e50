"""The funnel over HTTP. Every failure is one JSON object; a client never sees a stack trace.

The event loop only reads and writes; a request is decoded, run and encoded on one of a fixed number of worker threads.
Events have a thread of their own, so that nobody's winners wait for the disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import logging
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import structlog
import torch
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from prerank.bundle.registry import Registry
from prerank.errors import PrerankError, RegistryError
from prerank.serve import arrow
from prerank.serve.answer import Answer
from prerank.serve.changes import Changed
from prerank.serve.envelope import Envelope, Refused, read_body, refused_by_routing
from prerank.serve.funnel import Funnel
from prerank.serve.metrics import CONTENT_TYPE, ServeMetrics
from prerank.serve.openapi import docs_page, openapi
from prerank.serve.record import Recorded
from prerank.serve.seeing import AS_USUAL, Seeing, Sight
from prerank.serve.seen import Seen
from prerank.serve.trace_pages import trace_routes
from prerank.serve.wire import (
    decode_events,
    decode_items,
    decode_request,
    encode_answer,
    encode_changed,
    encode_recorded,
)
from prerank.stores.events import LiveEvent
from prerank.types import Given, ItemChange, Request

_RETRY = {"retry-after": "1"}


class Recommender(Protocol):
    """What a server needs of a funnel; `serve.funnel.Funnel` is one."""

    @property
    def version(self) -> str:
        """The version every answer is of."""
        ...

    @property
    def ranks_by(self) -> str:
        """What ranks: a level of the native kernels, or "torch"."""
        ...

    @property
    def default_deadline_ms(self) -> float:
        """The deadline of a request that names none."""
        ...

    @property
    def example_context(self) -> Mapping[str, Given]:
        """A context that works, one value a field."""
        ...

    @property
    def example_events(self) -> Sequence[Mapping[str, object]]:
        """Events that work, as `POST /v1/events` takes them."""
        ...

    @property
    def example_items(self) -> Sequence[Mapping[str, object]]:
        """Changes of items that work, as `POST /v1/items` takes them."""
        ...

    @property
    def tail_counts(self) -> Mapping[str, int]:
        """What came of candidates that are not resident, by outcome; nothing where all are."""
        ...

    @property
    def tail_evictions(self) -> Mapping[str, int]:
        """How many items that are not resident left memory again, by why; nothing where all are resident."""
        ...

    def recommend(self, request: Request, arrived: float | None = None) -> Answer:
        """The winners; see `Funnel.recommend`."""
        ...

    def record(self, events: Sequence[LiveEvent]) -> Recorded:
        """Keep what happened; see `Funnel.record`."""
        ...

    def change(self, changes: Sequence[ItemChange]) -> Changed:
        """Change items; see `Funnel.change`."""
        ...


@dataclass(frozen=True, slots=True)
class Limits:
    """What one process takes on: `threads` requests run at once, `waiting` more may wait, of `body_bytes` each.

    Calls with events or items run one at a time; as many may wait, of `events_bytes` or `items_bytes` each, or of
    `stream_bytes` as an Arrow stream.
    """

    threads: int = 2
    waiting: int = 64
    body_bytes: int = 65_536
    events_bytes: int = 524_288
    items_bytes: int = 2_097_152
    stream_bytes: int = 67_108_864


def create_app(funnel: Recommender | PrerankError, limits: Limits = Limits(), sight: Sight = AS_USUAL) -> Starlette:
    """The application around `funnel`, or, given the error that kept it from loading, one that says it is not ready."""
    server = _Server(funnel, limits, Seeing(sight))

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        server.close()

    return Starlette(
        routes=[
            Route("/v1/recommend", server.recommend, methods=["POST"]),
            Route("/v1/events", server.record, methods=["POST"]),
            Route("/v1/items", server.change, methods=["POST"]),
            Route("/healthz", server.healthz),
            Route("/readyz", server.readyz),
            Route("/metrics", server.metrics_text),
            Route("/openapi.json", server.openapi),
            Route("/docs", server.docs),
            Route("/", server.home),
            *trace_routes(server.seeing.traces),
        ],
        middleware=[Middleware(Envelope, metrics=server.metrics, seeing=server.seeing)],
        exception_handlers={HTTPException: refused_by_routing},
        lifespan=lifespan,
    )


def serve(
    store: Path,
    *,
    version: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    limits: Limits = Limits(),
    workers: int | None = None,
    tail: str | None = None,
    sight: Sight = AS_USUAL,
) -> None:
    """Serve `version` of the funnel at `store` (the live one unless named) until a signal ends it.

    `workers` and `tail` are as `Funnel.open`'s.
    Raises RegistryError at once where there is nothing to serve. A version or store that cannot be loaded is said on
    stderr in one line, and by /readyz for as long as the process lives.
    """
    if version is None and Registry(store).live() is None:
        raise RegistryError(f"{store}: no version is live; promote one, or name one with --version")
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    torch.set_num_threads(1)  # two requests that share cores by spinning cost each other more than they gain
    funnel = _open(store, version, workers, tail)
    try:
        if isinstance(funnel, Funnel):
            funnel.sweep()
            # what is loaded stays: without this every full collection looks through it, while all requests wait
            gc.collect()
            gc.freeze()
        app = create_app(funnel, limits, sight)
        uvicorn.run(app, host=host, port=port, access_log=False, timeout_graceful_shutdown=10)
    finally:
        if isinstance(funnel, Funnel):
            funnel.close()


def _open(
    store: Path, version: str | None, workers: int | None = None, tail: str | None = None
) -> Funnel | PrerankError:
    try:
        return Funnel.open(store, version, workers, tail)
    except PrerankError as error:
        line = " ".join(str(error).split())
        print(f"prerank serve: not ready: {type(error).__name__}: {line}", file=sys.stderr, flush=True)
        return error


class _Lane:
    """Work of one kind: `threads` at once, `waiting` more wait their turn, and the rest is turned away."""

    def __init__(self, name: str, threads: int, waiting: int, note: Callable[[int], None]) -> None:
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._most, self._num, self._note = threads + waiting, 0, note

    async def run(self, work: Callable[[], bytes]) -> Response:
        """What `work` gives, as JSON. Raises Refused where too much waits."""
        if self._num >= self._most:
            raise Refused(503, "Overloaded", f"{self._num} requests are waiting already; try again later", _RETRY)
        self._change(+1)
        try:
            context = contextvars.copy_context()  # the request that is seen, and its id for the logs
            encoded = await asyncio.get_running_loop().run_in_executor(self.pool, context.run, work)
        finally:
            self._change(-1)
        return Response(encoded, media_type="application/json")

    def _change(self, by: int) -> None:
        self._num += by
        self._note(self._num)


class _Server:
    """The endpoints and what they share."""

    def __init__(self, funnel: Recommender | PrerankError, limits: Limits, seeing: Seeing) -> None:
        self.funnel, self.limits, self.seeing = funnel, limits, seeing
        self.metrics = ServeMetrics()
        self.answers = _Lane("recommend", limits.threads, limits.waiting, self.metrics.in_flight)
        self.records = _Lane("events", 1, limits.waiting, self.metrics.events_in_flight)
        if not isinstance(funnel, PrerankError):
            self.metrics.serves(funnel.version, funnel.ranks_by, lambda: funnel.tail_counts)
            self.metrics.evicts(lambda: funnel.tail_evictions)

    def close(self) -> None:
        """Finish what is running."""
        self.answers.pool.shutdown()
        self.records.pool.shutdown()

    async def recommend(self, http: HttpRequest) -> Response:
        funnel, content = self._ready(), await read_body(http, self.limits.body_bytes)
        arrived, seen = time.perf_counter(), http.state.seen
        return await self.answers.run(lambda: self._answer(funnel, content, arrived, seen))

    async def record(self, http: HttpRequest) -> Response:
        funnel, content = self._ready(), await read_body(http, self.limits.events_bytes)
        now_ms = time.time_ns() // 1_000_000
        return await self.records.run(lambda: self._record(funnel, content, now_ms))

    async def change(self, http: HttpRequest) -> Response:
        is_stream = http.headers.get("content-type", "").partition(";")[0].strip() == arrow.CONTENT_TYPE
        limit = self.limits.stream_bytes if is_stream else self.limits.items_bytes
        funnel, content = self._ready(), await read_body(http, limit)
        return await self.records.run(lambda: self._change(funnel, content, is_stream))

    def _ready(self) -> Recommender:
        if isinstance(self.funnel, PrerankError):
            raise Refused(503, "NotReady", "no version is loaded; /readyz says why")
        return self.funnel

    def _answer(self, funnel: Recommender, content: bytes, arrived: float, seen: Seen) -> bytes:
        # rounded up, so that an event of this very millisecond came before the moment asked about
        now_ms = -(-time.time_ns() // 1_000_000)
        request = seen.request = decode_request(content).request(
            now_ms=now_ms, deadline_ms=funnel.default_deadline_ms, request_id=seen.request_id
        )
        answer = seen.answer = funnel.recommend(request, arrived)
        self.metrics.answered(answer)
        return encode_answer(answer)

    def _record(self, funnel: Recommender, content: bytes, now_ms: int) -> bytes:
        events = decode_events(content).live(now_ms)
        recorded = funnel.record(events)
        self.metrics.recorded(events, recorded)
        return encode_recorded(recorded)

    def _change(self, funnel: Recommender, content: bytes, is_stream: bool) -> bytes:
        changes = arrow.decode_items_stream(content) if is_stream else decode_items(content).changes()
        changed = funnel.change(changes)
        self.metrics.changed(changed)
        return encode_changed(changed)

    async def healthz(self, _: HttpRequest) -> Response:
        return PlainTextResponse("alive\n")

    async def readyz(self, _: HttpRequest) -> Response:
        if isinstance(self.funnel, PrerankError):
            raise Refused(503, "NotReady", f"{type(self.funnel).__name__}: {self.funnel}")
        return JSONResponse({"status": "ready", "version": self.funnel.version})

    async def metrics_text(self, _: HttpRequest) -> Response:
        return Response(self.metrics.text(), headers={"content-type": CONTENT_TYPE})

    async def openapi(self, _: HttpRequest) -> Response:
        return JSONResponse(openapi(self._example(), self._events(), self._items()))

    async def docs(self, _: HttpRequest) -> Response:
        version = "" if isinstance(self.funnel, PrerankError) else self.funnel.version
        return HTMLResponse(docs_page(self._example(), self._events(), self._items(), version, self._context()))

    async def home(self, _: HttpRequest) -> Response:
        return RedirectResponse("/docs")

    def _context(self) -> Mapping[str, Given]:
        return {} if isinstance(self.funnel, PrerankError) else self.funnel.example_context

    def _example(self) -> dict[str, object]:
        return {"user_id": 1, "k": 10, "context": dict(self._context()), "deadline_ms": 1000}

    def _events(self) -> dict[str, object]:
        events = () if isinstance(self.funnel, PrerankError) else self.funnel.example_events
        return {"events": [dict(one) for one in events]}

    def _items(self) -> dict[str, object]:
        items = () if isinstance(self.funnel, PrerankError) else self.funnel.example_items
        return {"items": [dict(one) for one in items]}
