"""The funnel over HTTP. Every failure is one JSON object; a client never sees a stack trace.

The event loop only reads and writes; a request is decoded, run and encoded on one of a fixed number of worker threads.
Events have a thread of their own, so that nobody's winners wait for the disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

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
from prerank.errors import ConfigError, PrerankError, RegistryError
from prerank.serve import arrow
from prerank.serve.answer import Answer
from prerank.serve.changes import Changed
from prerank.serve.envelope import Envelope, Refused, read_body, refused_by_routing
from prerank.serve.funnel import Funnel
from prerank.serve.metadata import Described
from prerank.serve.metrics import CONTENT_TYPE, ServeMetrics
from prerank.serve.open_inference import OpenInference
from prerank.serve.open_inference_http import routes as open_inference_routes
from prerank.serve.openapi import docs_page, openapi
from prerank.serve.ranking import Ranking
from prerank.serve.record import Recorded
from prerank.serve.wire import (
    decode_events,
    decode_items,
    decode_metadata,
    decode_request,
    encode_answer,
    encode_changed,
    encode_described,
    encode_recorded,
)
from prerank.stores.events import LiveEvent
from prerank.types import Given, ItemChange, Request

if TYPE_CHECKING:
    from prerank.serve.open_inference_grpc import GrpcServer

_RETRY = {"retry-after": "1"}
_GRACE_S = 10
T = TypeVar("T")


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
    def ranking(self) -> Ranking:
        """The ranking stage alone."""
        ...

    def recommend(self, request: Request, arrived: float | None = None) -> Answer:
        """The winners; see `Funnel.recommend`."""
        ...

    def describe(self, item_ids: Sequence[int], columns: Sequence[str] | None) -> Described:
        """Metadata of items; see `Funnel.describe`."""
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
    `stream_bytes` as an Arrow stream. A call of the Open Inference Protocol is a request, of `tensor_bytes`.
    """

    threads: int = 2
    waiting: int = 64
    body_bytes: int = 65_536
    events_bytes: int = 524_288
    items_bytes: int = 2_097_152
    stream_bytes: int = 67_108_864
    tensor_bytes: int = 67_108_864


def create_app(
    funnel: Recommender | PrerankError, limits: Limits = Limits(), grpc: tuple[str, int] | None = None
) -> Starlette:
    """The application around `funnel`, or, given the error that kept it from loading, one that says it is not ready.

    As long as it lives the Open Inference Protocol is spoken over gRPC too, at the host and port `grpc` if said.
    Raises ConfigError where that cannot be.
    """
    server = _Server(funnel, limits)
    beside = None if grpc is None else server.grpc(*grpc)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        if beside is not None:
            beside.start()
        yield
        if beside is not None:
            beside.stop(_GRACE_S)
        server.close()

    app = Starlette(
        routes=[
            Route("/v1/recommend", server.recommend, methods=["POST"]),
            Route("/v1/metadata", server.describe, methods=["POST"]),
            Route("/v1/events", server.record, methods=["POST"]),
            Route("/v1/items", server.change, methods=["POST"]),
            Route("/healthz", server.healthz),
            Route("/readyz", server.readyz),
            *open_inference_routes(
                server.open_inference, server.answers.do, server.metrics.failed, limits.tensor_bytes
            ),
            Route("/metrics", server.metrics_text),
            Route("/openapi.json", server.openapi),
            Route("/docs", server.docs),
            Route("/", server.home),
        ],
        middleware=[Middleware(Envelope, metrics=server.metrics)],
        exception_handlers={HTTPException: refused_by_routing},
        lifespan=lifespan,
    )
    app.state.grpc_port = None if beside is None else beside.port
    return app


def serve(
    store: Path,
    *,
    version: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    limits: Limits = Limits(),
    workers: int | None = None,
    tail: str | None = None,
    grpc_port: int | None = None,
) -> None:
    """Serve `version` of the funnel at `store` (the live one unless named) until a signal ends it.

    `workers` and `tail` are as `Funnel.open`'s. At `grpc_port` of the same host there is gRPC, if it is said.
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
    funnel = _open(store, version, workers, tail)
    try:
        if isinstance(funnel, Funnel):
            funnel.sweep()
            # what is loaded stays: without this every full collection looks through it, while all requests wait
            gc.collect()
            gc.freeze()
        app = create_app(funnel, limits, None if grpc_port is None else (host, grpc_port))
        uvicorn.run(app, host=host, port=port, access_log=False, timeout_graceful_shutdown=_GRACE_S)
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
        return Response(await self.do(work), media_type="application/json")

    async def do(self, work: Callable[[], T]) -> T:
        """What `work` gives. Raises Refused where too much waits."""
        if self._num >= self._most:
            raise Refused(503, "Overloaded", f"{self._num} requests are waiting already; try again later", _RETRY)
        self._change(+1)
        try:
            return await asyncio.get_running_loop().run_in_executor(self.pool, work)
        finally:
            self._change(-1)

    def _change(self, by: int) -> None:
        self._num += by
        self._note(self._num)


class _Server:
    """The endpoints and what they share."""

    def __init__(self, funnel: Recommender | PrerankError, limits: Limits) -> None:
        self.funnel, self.limits = funnel, limits
        self.metrics = ServeMetrics()
        self.answers = _Lane("recommend", limits.threads, limits.waiting, self.metrics.in_flight)
        self.open_inference = OpenInference(self._ranks)
        self.records = _Lane("events", 1, limits.waiting, self.metrics.events_in_flight)
        if not isinstance(funnel, PrerankError):
            self.metrics.serves(funnel.version, funnel.ranks_by, lambda: funnel.tail_counts)

    def grpc(self, host: str, port: int) -> GrpcServer:
        """The same protocol over gRPC, on the threads that rank. Raises ConfigError without the extra, or the port."""
        try:
            from prerank.serve.open_inference_grpc import GrpcServer  # an extra, and only needed here
        except ImportError as error:
            raise ConfigError(f"gRPC needs an extra, {error}; pip install 'prerank[grpc]'") from None
        return GrpcServer(
            self.open_inference,
            lambda work: self.answers.pool.submit(work).result(),
            self.metrics.failed,
            host=host,
            port=port,
            most_calls=self.limits.threads + self.limits.waiting,
            most_bytes=self.limits.tensor_bytes,
        )

    def close(self) -> None:
        """Finish what is running."""
        self.answers.pool.shutdown()
        self.records.pool.shutdown()

    async def recommend(self, http: HttpRequest) -> Response:
        funnel, content = self._ready(), await read_body(http, self.limits.body_bytes)
        arrived, request_id = time.perf_counter(), http.state.request_id
        return await self.answers.run(lambda: self._answer(funnel, content, arrived, request_id))

    async def describe(self, http: HttpRequest) -> Response:
        funnel, content = self._ready(), await read_body(http, self.limits.events_bytes)
        return await self.answers.run(lambda: self._describe(funnel, content))

    async def record(self, http: HttpRequest) -> Response:
        funnel, content = self._ready(), await read_body(http, self.limits.events_bytes)
        now_ms = time.time_ns() // 1_000_000
        return await self.records.run(lambda: self._record(funnel, content, now_ms))

    async def change(self, http: HttpRequest) -> Response:
        is_stream = http.headers.get("content-type", "").partition(";")[0].strip() == arrow.CONTENT_TYPE
        limit = self.limits.stream_bytes if is_stream else self.limits.items_bytes
        funnel, content = self._ready(), await read_body(http, limit)
        return await self.records.run(lambda: self._change(funnel, content, is_stream))

    @contextlib.contextmanager
    def _ranks(self) -> Iterator[Ranking]:
        yield self._ready().ranking

    def _ready(self) -> Recommender:
        if isinstance(self.funnel, PrerankError):
            raise Refused(503, "NotReady", "no version is loaded; /readyz says why")
        return self.funnel

    def _answer(self, funnel: Recommender, content: bytes, arrived: float, request_id: str) -> bytes:
        # rounded up, so that an event of this very millisecond came before the moment asked about
        now_ms = -(-time.time_ns() // 1_000_000)
        request = decode_request(content).request(
            now_ms=now_ms, deadline_ms=funnel.default_deadline_ms, request_id=request_id
        )
        answer = funnel.recommend(request, arrived)
        self.metrics.answered(answer)
        return encode_answer(answer)

    def _describe(self, funnel: Recommender, content: bytes) -> bytes:
        asked = decode_metadata(content)
        return encode_described(funnel.describe(asked.item_ids, asked.columns))

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
