"""The funnel over HTTP. Every failure is one JSON object; a client never sees a stack trace.

The event loop only reads and writes; a request is decoded, run and encoded on one of a fixed number of worker threads.
Events have a thread of their own, so that nobody's winners wait for the disk.
"""

from __future__ import annotations

import contextlib
import contextvars
import gc
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from prerank.errors import ConfigError, PrerankError
from prerank.kernels.stop import Stop
from prerank.serve import arrow
from prerank.serve.admission import Door, Lane, leaving
from prerank.serve.device_bundle import OnDevice
from prerank.serve.ending import MOST_S, EndingServer
from prerank.serve.envelope import Envelope, Refused, read_body, refused_by_routing
from prerank.serve.exposure import LOCAL, Exposure
from prerank.serve.graph import Deadline
from prerank.serve.host_tls import CallerTls
from prerank.serve.hosts import IndexHosts
from prerank.serve.live_version import LiveVersion
from prerank.serve.log_lines import log_to_stderr
from prerank.serve.metrics import CONTENT_TYPE, ServeMetrics
from prerank.serve.open_inference import OpenInference
from prerank.serve.open_inference_http import routes as open_inference_routes
from prerank.serve.openapi import docs_page, openapi
from prerank.serve.ranking import Ranking
from prerank.serve.readiness import readiness
from prerank.serve.recommender import Recommender
from prerank.serve.seeing import AS_USUAL, Seeing, Sight, spans_of
from prerank.serve.seen import Seen
from prerank.serve.trace_pages import trace_routes
from prerank.serve.turns import loop_first
from prerank.serve.watch import VersionWatch
from prerank.serve.wire import (
    deadline_ms_of,
    decode_events,
    decode_items,
    decode_metadata,
    decode_request,
    encode_answer,
    encode_changed,
    encode_described,
    encode_recorded,
)
from prerank.types import Given

if TYPE_CHECKING:
    from prerank.serve.open_inference_grpc import GrpcServer


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
    funnel: Recommender | PrerankError,
    limits: Limits = Limits(),
    exposure: Exposure = LOCAL,
    door: Door | None = None,
    grpc: tuple[str, int] | None = None,
    sight: Sight = AS_USUAL,
    hosts: IndexHosts | None = None,
    device: OnDevice | None = None,
) -> Starlette:
    """The application around `funnel`, or, given the error that kept it from loading, one that says it is not ready.

    A `LiveVersion` may become another version, or ready, at any time. When `door` is closed it takes nothing new. The
    Open Inference Protocol is spoken over gRPC too as long as it lives, at the host and port `grpc` if said. What it
    asks `hosts` is among the metrics, and /readyz needs `hosts.least` shards; so is what the engine of a `device` did.
    Raises ConfigError where that cannot be.
    """
    server = _Server(funnel, limits, exposure, door or Door(), Seeing(sight), hosts, device)
    beside = None if grpc is None else server.grpc(*grpc)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        if beside is not None:
            beside.start()
        yield
        if beside is not None:
            beside.stop(MOST_S)
        server.close()
        server.seeing.close()

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
            *trace_routes(server.seeing.traces, exposure.check_reads),
        ],
        middleware=[Middleware(Envelope, metrics=server.metrics, seeing=server.seeing)],
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
    users: str | None = None,
    token_file: Path | None = None,
    linger_s: float = 0.0,
    grpc_port: int | None = None,
    sight: Sight = AS_USUAL,
    otel: bool | None = None,
    allow_hosts: Sequence[str] = (),
    index_hosts: str | None = None,
    least_shards: int = 1,
    hosts_tls: CallerTls | None = None,
    device: OnDevice | None = None,
) -> None:
    """Serve the live version of the funnel at `store`, and each that goes live later, until a signal ends it.

    Or `version` for good, if it is named. `workers`, `tail` and `users` are as `Funnel.open`'s, `token_file` and
    `allow_hosts` as `Exposure.of`'s, `linger_s` as `EndingServer`'s. At `grpc_port` of the same host there is gRPC, if
    it is said. `otel` sends spans, as `spans_of` has it; `index_hosts` are as `parse_hosts` reads them, and it is
    ready while `least_shards` of their shards answer; `hosts_tls` is for those that speak TLS.
    On a `device`, which stays open, that ranks.
    Raises RegistryError at once where there is nothing to serve, ConfigError for an address that needs a token, and
    NotOnDevice as `VersionWatch.open`. A version or store that cannot be loaded is said on stderr in one line, and by
    /readyz until one can be.
    """
    exposure, door = Exposure.of(host, token_file, allow_hosts=allow_hosts), Door()
    sight = replace(sight, spans=spans_of(otel))
    log_to_stderr()
    torch.set_num_threads(1)  # two requests that share cores by spinning cost each other more than they gain
    hosts = None if index_hosts is None else IndexHosts.open(index_hosts, store, least_shards, hosts_tls)
    watch = VersionWatch.open(store, version, workers, tail, settled=_settle, users=users, hosts=hosts, device=device)
    try:
        if hosts is not None:
            hosts.start()
        if watch.live.error is not None:
            print(_why_not_ready(watch.live.error), file=sys.stderr, flush=True)
        gc.collect()
        gc.freeze()
        if version is None:
            watch.start()
        grpc = None if grpc_port is None else (host, grpc_port)
        app = create_app(watch.live, limits, exposure, door, grpc, sight, hosts, device)
        config = uvicorn.Config(app, host=host, port=port, access_log=False, timeout_graceful_shutdown=int(MOST_S))
        loop_first()
        with contextlib.suppress(KeyboardInterrupt):  # raised again by uvicorn when all is done
            EndingServer(config, door, linger_s).run()
    finally:
        watch.close()
        if hosts is not None:
            hosts.close()


def _settle() -> None:
    # what is loaded stays: without this every full collection looks through it, while all requests wait. What was
    # frozen before goes when nobody refers to it, for nothing of a version refers to itself
    gc.collect(1)
    gc.freeze()


def _why_not_ready(error: PrerankError) -> str:
    return f"prerank serve: not ready: {type(error).__name__}: {' '.join(str(error).split())}"


class _Server:
    """The endpoints and what they share."""

    def __init__(
        self,
        funnel: Recommender | PrerankError,
        limits: Limits,
        exposure: Exposure,
        door: Door,
        seeing: Seeing,
        hosts: IndexHosts | None,
        device: OnDevice | None,
    ) -> None:
        self.live = funnel if isinstance(funnel, LiveVersion) else LiveVersion(funnel)
        self.limits, self.exposure, self.door, self.seeing, self.hosts = limits, exposure, door, seeing, hosts
        self.metrics = ServeMetrics()
        refused = self.metrics.refused
        self.answers = Lane("recommend", limits.threads, limits.waiting, self.metrics.in_flight, door, refused)
        self.records = Lane("events", 1, limits.waiting, self.metrics.events_in_flight, door, refused)
        self.open_inference = OpenInference(self._ranks)
        self.metrics.serves(self.live)
        if hosts is not None:
            self.metrics.asks(hosts)
        if device is not None:
            self.metrics.ranks_on(device.engine)
        if seeing.spans is not None:
            self.metrics.sends(seeing.spans)
        if seeing.requests is not None:
            self.metrics.logs(seeing.requests)

    @property
    def funnel(self) -> Recommender | PrerankError:
        """What serves now, or why nothing does."""
        return self.live if self.live.error is None else self.live.error

    def grpc(self, host: str, port: int) -> GrpcServer:
        """The same protocol over gRPC, on the threads that rank. Raises ConfigError without the extra, or the port."""
        try:
            from prerank.serve.open_inference_grpc import GrpcServer  # an extra, and only needed here
        except ImportError as error:
            raise ConfigError(f"gRPC needs an extra, {error}; pip install 'prerank[grpc]'") from None
        return GrpcServer(
            self.open_inference,
            # in the caller's context: what is seen of the call, and its id for the logs
            lambda work: self.answers.pool.submit(contextvars.copy_context().run, work).result(),
            self.metrics.failed,
            self.seeing,
            host=host,
            port=port,
            most_calls=self.limits.threads + self.limits.waiting,
            most_bytes=self.limits.tensor_bytes,
        )

    def close(self) -> None:
        """Finish what is running; a signal ends the process soon after this."""
        self.answers.pool.shutdown()
        self.records.pool.shutdown()
        if self.seeing.spans is not None:
            self.seeing.spans.close()

    async def recommend(self, http: HttpRequest) -> Response:
        self._ready()
        content = await read_body(http, self.limits.body_bytes)
        arrived, seen = time.perf_counter(), http.state.seen

        def deadline() -> Deadline:
            return Deadline(arrived, deadline_ms_of(content) or self.live.default_deadline_ms)

        async with leaving(http) as gone:
            return await self.answers.run(lambda: self._answer(content, arrived, seen, gone), deadline, gone)

    async def describe(self, http: HttpRequest) -> Response:
        funnel, content = self._ready(), await read_body(http, self.limits.events_bytes)
        return await self.answers.run(lambda: self._describe(funnel, content))

    async def record(self, http: HttpRequest) -> Response:
        self._check_admin(http)
        funnel, content = self._ready(), await read_body(http, self.limits.events_bytes)
        now_ms = time.time_ns() // 1_000_000
        return await self.records.run(lambda: self._record(funnel, content, now_ms))

    async def change(self, http: HttpRequest) -> Response:
        self._check_admin(http)
        is_stream = http.headers.get("content-type", "").partition(";")[0].strip() == arrow.CONTENT_TYPE
        limit = self.limits.stream_bytes if is_stream else self.limits.items_bytes
        funnel, content = self._ready(), await read_body(http, limit)
        return await self.records.run(lambda: self._change(funnel, content, is_stream))

    @contextlib.contextmanager
    def _ranks(self) -> Iterator[Ranking]:
        self._ready()
        with self.live.taken() as funnel:
            yield funnel.ranking

    def _ready(self) -> Recommender:
        if isinstance(self.funnel, PrerankError):
            raise Refused(503, "NotReady", "no version is loaded; /readyz says why")
        return self.funnel

    def _check_admin(self, http: HttpRequest) -> None:
        """Before anything is read. Raises Refused where the caller may not change what is served."""
        self.exposure.check_changes(http.headers)

    def _answer(self, content: bytes, arrived: float, seen: Seen, gone: Stop) -> bytes:
        # rounded up, so that an event of this very millisecond came before the moment asked about
        now_ms = -(-time.time_ns() // 1_000_000)
        body = decode_request(content)
        with self.live.taken() as funnel:
            request = seen.request = body.request(
                now_ms=now_ms, deadline_ms=funnel.default_deadline_ms, request_id=seen.request_id
            )
            answer = seen.answer = funnel.recommend(request, arrived, gone)
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
        self.door.check()
        return JSONResponse(readiness(self.live, self.hosts, self.exposure.is_local))

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
