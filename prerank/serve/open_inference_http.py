"""The Open Inference Protocol v2 over HTTP: JSON, and the binary tensor extension."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import msgspec
import structlog
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from prerank.errors import RequestError
from prerank.serve.envelope import Refused, read_body
from prerank.serve.open_inference import InferCall, Inferred, OpenInference, Plain, told_by_protocol
from prerank.serve.seen import Seen
from prerank.serve.tensors import NamedTensor, from_json, from_raw, to_raw, to_values

JSON_LENGTH = "inference-header-content-length"
"""The header that says how many bytes of a body are JSON, where raw tensors follow it."""
_log = structlog.get_logger(__name__)


class InputBody(msgspec.Struct, forbid_unknown_fields=True):
    """An input: its values are `data`, or of `binary_data_size` bytes after the JSON."""

    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, object] = {}
    data: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)


class OutputBody(msgspec.Struct, forbid_unknown_fields=True):
    """An output that is wanted; `binary_data` says how."""

    name: str
    parameters: dict[str, object] = {}


class InferBody(msgspec.Struct, forbid_unknown_fields=True):
    """What `POST /v2/models/{model}/infer` takes."""

    inputs: list[InputBody]
    outputs: list[OutputBody] = []
    parameters: dict[str, object] = {}
    id: str = ""


class IndexBody(msgspec.Struct, forbid_unknown_fields=True):
    """What `POST /v2/repository/index` takes."""

    ready: bool = False


@dataclass(frozen=True, slots=True)
class Encoded:
    """An answer's body; `json_length` of its bytes are JSON where raw tensors follow, else None."""

    content: bytes
    json_length: int | None


Lane: TypeAlias = Callable[[Callable[[], Encoded]], Awaitable[Encoded]]
"""Runs work on one of the threads that may rank."""


class Decoded:
    """A body as a call, and the outputs that are to be raw."""

    def __init__(self, content: bytes, json_length: str | None) -> None:
        size = _json_size(content, json_length)
        try:
            body = _infer.decode(memoryview(content)[:size])
        except UnicodeDecodeError as error:
            raise RequestError(f"body: expected JSON in UTF-8: {error.reason} (byte {error.start})") from None
        except (msgspec.DecodeError, RecursionError) as error:
            raise RequestError(f"body: {str(error).replace('`', '')}") from None
        is_raw = body.parameters.pop("binary_data_output", False) is True
        self.raw = {one.name for one in body.outputs if one.parameters.pop("binary_data", is_raw) is True}
        self.are_all_raw = is_raw and not body.outputs
        for one in body.outputs:
            _no_more(f"outputs.{one.name}.parameters", one.parameters)
        inputs = _inputs(body.inputs, memoryview(content)[size:])
        self.call = InferCall(inputs, body.parameters, [one.name for one in body.outputs], body.id)

    def encode(self, answer: Inferred) -> Encoded:
        """The answer, its outputs in the forms that were asked for."""
        outputs, parts = [], []
        for tensor in answer.outputs:
            said: Plain = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.array.shape)}
            if self.are_all_raw or tensor.name in self.raw:
                parts.append(to_raw(tensor))
                said["parameters"] = {"binary_data_size": len(parts[-1])}
            else:
                said["data"] = to_values(tensor)
            outputs.append(said)
        body: Plain = {"model_name": answer.model, "model_version": answer.version, "outputs": outputs}
        header = msgspec.json.encode({"id": answer.id, **body} if answer.id else body)
        return Encoded(b"".join([header, *parts]), len(header) if parts else None)


def routes(model: OpenInference, run: Lane, failed: Callable[[str], None], most_bytes: int) -> list[Route]:
    """Everything under /v2. Calls of at most `most_bytes` are `run`; `failed` is told the type of each error answer."""
    own = _Endpoints(model, run, most_bytes)

    def route(path: str, verb: _Verb, method: str = "GET") -> Route:
        async def endpoint(http: HttpRequest) -> Response:
            try:
                return await verb(http)
            except Exception as error:
                return _error(error, http.state.seen, failed)

        return Route(path, endpoint, methods=[method])

    of_model = ["/v2/models/{model}", "/v2/models/{model}/versions/{version}"]
    return [
        route("/v2", own.server),
        route("/v2/health/live", own.live),
        route("/v2/health/ready", own.ready),
        route("/v2/models/stats", own.statistics),
        *(route(path, own.metadata) for path in of_model),
        *(route(f"{path}/ready", own.model_ready) for path in of_model),
        *(route(f"{path}/config", own.config) for path in of_model),
        *(route(f"{path}/stats", own.statistics) for path in of_model),
        *(route(f"{path}/infer", own.infer, "POST") for path in of_model),
        route("/v2/repository/index", own.index, "POST"),
        *(route("/v2/{rest:path}", own.nothing, method) for method in ("GET", "POST", "PUT", "DELETE", "PATCH")),
    ]


_Verb: TypeAlias = Callable[[HttpRequest], Awaitable[Response]]
_infer = msgspec.json.Decoder(InferBody)
_index = msgspec.json.Decoder(IndexBody)
_MOST_INDEX_BYTES = 4096


class _Endpoints:
    def __init__(self, model: OpenInference, run: Lane, most_bytes: int) -> None:
        self.model, self.run, self.most_bytes = model, run, most_bytes

    async def server(self, _: HttpRequest) -> Response:
        return _json(self.model.server())

    async def live(self, _: HttpRequest) -> Response:
        return _json({"live": True})

    async def ready(self, _: HttpRequest) -> Response:
        is_ready = self.model.is_ready()
        return _json({"ready": is_ready}, 200 if is_ready else 503)

    async def metadata(self, http: HttpRequest) -> Response:
        return _json(self.model.metadata(*_named(http)))

    async def model_ready(self, http: HttpRequest) -> Response:
        model, version = _named(http)
        is_ready = self.model.is_model_ready(model, version)
        return _json({"name": model, "ready": is_ready}, 200 if is_ready else 503)

    async def config(self, http: HttpRequest) -> Response:
        return _json(self.model.config(*_named(http)))

    async def statistics(self, http: HttpRequest) -> Response:
        return _json(self.model.statistics(*_named(http)))

    async def index(self, http: HttpRequest) -> Response:
        content = await read_body(http, _MOST_INDEX_BYTES)
        try:
            _index.decode(content or b"{}")
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise RequestError(f"body: {str(error).replace('`', '')}") from None
        return _json(self.model.index())

    async def infer(self, http: HttpRequest) -> Response:
        encoding = http.headers.get("content-encoding", "identity")
        if encoding != "identity":
            raise Refused(415, "UnsupportedEncoding", f"content-encoding: expected none, got {encoding[:40]!r}")
        content, (model, version) = await read_body(http, self.most_bytes), _named(http)
        arrived_ns, json_length = time.perf_counter_ns(), http.headers.get(JSON_LENGTH)
        done = await self.run(lambda: self._ranked(model, version, content, json_length, arrived_ns))
        if done.json_length is None:
            return Response(done.content, media_type="application/json")
        headers = {JSON_LENGTH: str(done.json_length)}
        return Response(done.content, headers=headers, media_type="application/octet-stream")

    def _ranked(self, model: str, version: str, content: bytes, json_length: str | None, arrived_ns: int) -> Encoded:
        decoded: list[Decoded] = []

        def decode() -> InferCall:
            decoded.append(Decoded(content, json_length))
            return decoded[0].call

        return self.model.infer(model, version, decode, lambda answer: decoded[0].encode(answer), arrived_ns)

    async def nothing(self, http: HttpRequest) -> Response:
        raise Refused(404, "NotFound", f"{http.method} {http.url.path}: no such endpoint")


def _json(plain: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(plain), status, media_type="application/json")


def _named(http: HttpRequest) -> tuple[str, str]:
    return http.path_params.get("model", ""), http.path_params.get("version", "")


def _error(error: Exception, seen: Seen, failed: Callable[[str], None]) -> Response:
    """The protocol's one form of an error."""
    status, kind, message = told_by_protocol(error, seen.request_id)
    seen.error = kind, message
    failed(kind)
    headers = error.headers if isinstance(error, Refused) else None
    return Response(msgspec.json.encode({"error": message}), status, headers, "application/json")


def _json_size(content: bytes, said: str | None) -> int:
    """How many bytes of the body are JSON."""
    if said is None:
        return len(content)
    if not said.isdecimal() or not said.isascii() or not 0 < int(said[:20]) <= len(content):
        raise RequestError(f"{JSON_LENGTH}: expected 1 to {len(content)}, the bytes of the body, got {said[:40]!r}")
    return int(said)


def _inputs(bodies: Sequence[InputBody], rest: memoryview) -> list[NamedTensor]:
    """Every input, of its data or of the bytes after the JSON, in order."""
    found, at = [], 0
    for one in bodies:
        size = one.parameters.pop("binary_data_size", None)
        _no_more(f"{one.name}.parameters", one.parameters)
        data = memoryview(one.data)
        if (size is None) == (len(data) == 0):
            raise RequestError(f"{one.name}: expected either data or the parameter binary_data_size")
        if size is None:
            found.append(from_json(one.name, one.datatype, one.shape, data))
            continue
        if type(size) is not int or not 0 <= size <= len(rest) - at:
            raise RequestError(
                f"{one.name}.binary_data_size: expected at most {len(rest) - at}, the bytes that are left after the "
                f"JSON, got {size!r}"
            )
        found.append(from_raw(one.name, one.datatype, one.shape, rest[at : at + size]))
        at += size
    if at != len(rest):
        raise RequestError(f"body: expected {at} bytes of tensors after the JSON, got {len(rest)}")
    return found


def _no_more(where: str, parameters: Plain) -> None:
    if parameters:
        raise RequestError(f"{where}: expected none but those of binary tensors, got {sorted(parameters)}")
