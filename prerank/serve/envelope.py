"""What is around every HTTP request: an id in and out, one form for every error, a bound on the body, and its time."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prerank.errors import Cancelled, DeadlineExceeded, NoRoom, PrerankError, RequestError, StoreFailed
from prerank.serve.metrics import ServeMetrics
from prerank.serve.seeing import Seeing
from prerank.serve.seen import Seen, begin, end
from prerank.serve.wire import MalformedBody, encode_error

_log = structlog.get_logger(__name__)
_NO_HEADERS: Mapping[str, str] = {}


class Refused(PrerankError):
    """A request the server itself turns away, with its HTTP status, the error's type, and headers to add."""

    def __init__(self, status: int, kind: str, message: str, headers: Mapping[str, str] = _NO_HEADERS) -> None:
        super().__init__(message)
        self.status, self.kind, self.headers = status, kind, headers


class Envelope:
    """The middleware that does it."""

    def __init__(self, app: ASGIApp, metrics: ServeMetrics, seeing: Seeing) -> None:
        self.app, self.metrics, self.seeing = app, metrics, seeing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request; see `starlette.types.ASGIApp`."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = request_id_of(headers)
        seen = Seen(request_id)
        self.seeing.arrives(seen, scope["method"], headers)
        scope.setdefault("state", {}).update(request_id=request_id, seen=seen)
        status, token, bound = 0, begin(seen), structlog.contextvars.bind_contextvars(**seen.named)

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
            await self._failed(error, seen)(scope, receive, send_with_id)
        finally:
            seconds = time.perf_counter() - seen.arrived
            self.metrics.took(scope["path"], status, seconds)
            self.seeing.leaves(seen, scope["path"], status, seconds)
            structlog.contextvars.reset_contextvars(**bound)
            end(token)

    def _failed(self, error: Exception, seen: Seen) -> Response:
        status, kind, message = told(error)
        request_id, seen.error = seen.request_id, (kind, message)
        if status == 500:
            _log.error("request failed", request_id=request_id, exc_info=error)
        elif isinstance(error, StoreFailed):
            _log.warning("a store failed", request_id=request_id, error=str(error))
        self.metrics.failed(kind)
        headers = error.headers if isinstance(error, Refused) else _NO_HEADERS
        return Response(encode_error(kind, message, request_id), status, headers, "application/json")


def told(error: Exception) -> tuple[int, str, str]:
    """Status, type and message for the client; of our own mistakes it learns only that there was one."""
    match error:
        case Refused():
            return error.status, error.kind, str(error)
        case Cancelled() | ClientDisconnect():
            return 499, "ClientGone", "the client left before its answer"
        case MalformedBody():
            return 400, "MalformedBody", str(error)
        case RequestError():
            return 422, "RequestError", str(error)
        case DeadlineExceeded():
            return 504, "DeadlineExceeded", str(error)
        case NoRoom():
            return 507, "NoRoom", str(error)
        case StoreFailed():  # its text has an address, and is for the log
            return 503, "StoreFailed", "a store that this needs did not answer; send it again"
        case _:
            return 500, "InternalError", "the server made a mistake; its log has this request_id"


async def refused_by_routing(http: HttpRequest, error: Exception) -> Response:
    """No such path, or no such method of it: raises Refused, so that it has the one form."""
    assert isinstance(error, HTTPException)
    kind = {404: "NotFound", 405: "MethodNotAllowed"}.get(error.status_code, "HTTPError")
    message = f"{http.method} {http.url.path}: {error.detail}"
    raise Refused(error.status_code, kind, message, error.headers or _NO_HEADERS)


async def read_body(http: HttpRequest, limit: int) -> bytes:
    """The whole body. Raises Refused for one of more than `limit` bytes, when that many have come."""
    content = bytearray()
    async for part in http.stream():
        content += part
        if len(content) > limit:
            raise Refused(413, "BodyTooLarge", f"body: expected at most {limit} bytes, got more")
    return bytes(content)


def request_id_of(headers: Mapping[str, str]) -> str:
    """The `x-request-id` that came, if it can stand in a header and a log, or a new one."""
    given = headers.get("x-request-id", "")
    usable = 0 < len(given) <= 128 and given.isascii() and given.isprintable()
    return given if usable else uuid.uuid4().hex
