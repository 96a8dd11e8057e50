"""The Open Inference Protocol v2 over gRPC, with health and reflection. The one file that knows gRPC."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn, TypeAlias

import grpc
import structlog
from google.protobuf import descriptor_pool, json_format
from google.protobuf.message import Message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

from prerank.errors import ConfigError, DeadlineExceeded, RequestError
from prerank.serve.envelope import request_id_of
from prerank.serve.grpc_stubs import open_inference_pb2 as pb
from prerank.serve.open_inference import InferCall, Inferred, OpenInference, Plain, told_by_protocol
from prerank.serve.seeing import RANKED_BY_GRPC, Seeing
from prerank.serve.seen import Seen, begin, end
from prerank.serve.tensors import NamedTensor, from_raw, from_values, to_raw

SERVICE = "inference.GRPCInferenceService"
Lane: TypeAlias = Callable[[Callable[[], pb.ModelInferResponse]], pb.ModelInferResponse]
"""Runs work on one of the threads that may rank, and waits for it."""

_CONTENTS = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    "INT64": "int64_contents",
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
_STATUS = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    404: grpc.StatusCode.NOT_FOUND,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
_log = structlog.get_logger(__name__)


class GrpcServer:
    """A server of `model` at `host` and `port` (0: any that is free), bound and not begun.

    Calls are `run` on the threads that rank; at most `most_calls` are here at once, of `most_bytes` each. `failed` is
    told the type of each error answer, `seeing` of each call to rank. Raises ConfigError where the address cannot be
    listened on.
    """

    def __init__(
        self,
        model: OpenInference,
        run: Lane,
        failed: Callable[[str], None],
        seeing: Seeing,
        *,
        host: str,
        port: int,
        most_calls: int,
        most_bytes: int,
    ) -> None:
        self._health = _Health(model)
        self._server = grpc.server(
            # they wait for the threads that rank, so that health is told meanwhile; none is made before it is needed
            ThreadPoolExecutor(most_calls, thread_name_prefix="grpc"),
            maximum_concurrent_rpcs=most_calls,
            options=[
                ("grpc.so_reuseport", 0),  # else a second server shares the port, and nobody is told
                ("grpc.max_receive_message_length", most_bytes),
                ("grpc.max_send_message_length", -1),
            ],
        )
        verbs = _Verbs(model, run, failed, seeing).by_name()
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, verbs),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = [SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME]
        reflected = reflection.ReflectionServicer(names, pool=_pool())
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(reflected, self._server)
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            self.port: int = self._server.add_insecure_port(address)
        except RuntimeError:
            raise ConfigError(
                f"gRPC cannot listen on {address}: expected an address of this machine and a port that is free; "
                "choose another with --grpc-port"
            ) from None

    def start(self) -> None:
        """Begin to answer."""
        self._server.start()
        _log.info("gRPC listens", port=self.port)

    def stop(self, grace_s: float) -> None:
        """Take no more calls, and give those that run so long."""
        self._health.enter_graceful_shutdown()
        self._server.stop(grace_s).wait()


class _Health(health.HealthServicer):  # type: ignore[misc]
    """Whether a version serves, looked at anew by every check."""

    def __init__(self, model: OpenInference) -> None:
        super().__init__()
        self._model = model
        self._look()

    def Check(self, request: Message, context: grpc.ServicerContext) -> Message:  # noqa: N802 - gRPC's name
        """See grpc.health.v1."""
        self._look()
        return super().Check(request, context)

    def _look(self) -> None:
        status = health_pb2.HealthCheckResponse
        is_ready = self._model.is_ready()
        for name in ("", SERVICE):
            self.set(name, status.SERVING if is_ready else status.NOT_SERVING)


class _Verbs:
    """The service's methods, a message in and one out."""

    def __init__(self, model: OpenInference, run: Lane, failed: Callable[[str], None], seeing: Seeing) -> None:
        self._model, self._run, self._failed, self._seeing = model, run, failed, seeing

    def by_name(self) -> dict[str, grpc.RpcMethodHandler]:
        """Every method as gRPC takes it."""
        model = self._model
        told: dict[str, Callable[[Message], Plain]] = {
            "ServerLive": lambda _: {"live": True},
            "ServerReady": lambda _: {"ready": model.is_ready()},
            "ModelReady": lambda one: {"ready": model.is_model_ready(one.name, one.version)},
            "ServerMetadata": lambda _: model.server(),
            "ModelMetadata": lambda one: model.metadata(one.name, one.version),
            "ModelConfig": lambda one: {"config": model.config(one.name, one.version)},
            "ModelStatistics": lambda one: model.statistics(one.name, one.version),
            "RepositoryIndex": lambda _: {"models": model.index()},
        }
        handlers = {name: self._handler(name, self._telling(name, verb)) for name, verb in told.items()}
        return {**handlers, "ModelInfer": self._handler("ModelInfer", self._infer)}

    def _telling(
        self, name: str, verb: Callable[[Message], Plain]
    ) -> Callable[[Message, grpc.ServicerContext], Message]:
        response = getattr(pb, f"{name}Response")

        def tell(request: Message, context: grpc.ServicerContext) -> Message:
            try:
                return json_format.ParseDict(verb(request), response())
            except Exception as error:
                status, kind, message = told_by_protocol(error, request_id_of({}))
                return self._refuse(context, status, kind, message)

        return tell

    def _handler(self, name: str, verb: Callable[[Message, grpc.ServicerContext], Message]) -> grpc.RpcMethodHandler:
        request, response = getattr(pb, f"{name}Request"), getattr(pb, f"{name}Response")
        return grpc.unary_unary_rpc_method_handler(
            verb, request_deserializer=request.FromString, response_serializer=response.SerializeToString
        )

    def _infer(self, request: pb.ModelInferRequest, context: grpc.ServicerContext) -> Message:
        """One call, and what is seen of it, as the envelope does for one over HTTP."""
        said = {key: value for key, value in context.invocation_metadata() if isinstance(value, str)}
        seen, status = Seen(request_id_of(said)), 200
        self._seeing.arrives(seen, "POST", said)
        token, bound = begin(seen), structlog.contextvars.bind_contextvars(**seen.named)
        try:
            return self._ranked(request, context)
        except Exception as error:
            status, kind, message = told_by_protocol(error, seen.request_id)
            seen.error = kind, message
            return self._refuse(context, status, kind, message)
        finally:
            self._seeing.leaves(seen, RANKED_BY_GRPC, status, time.perf_counter() - seen.arrived)
            structlog.contextvars.reset_contextvars(**bound)
            end(token)

    def _ranked(self, request: pb.ModelInferRequest, context: grpc.ServicerContext) -> Message:
        arrived_ns = time.perf_counter_ns()

        def decode() -> InferCall:
            if not context.is_active():
                raise DeadlineExceeded("the caller waits no more")
            return _call(request)

        return self._run(
            lambda: self._model.infer(request.model_name, request.model_version, decode, _response, arrived_ns)
        )

    def _refuse(self, context: grpc.ServicerContext, status: int, kind: str, message: str) -> NoReturn:
        self._failed(kind)
        context.abort(_STATUS.get(status, grpc.StatusCode.INTERNAL), message)
        raise AssertionError("abort raises")


def _call(request: pb.ModelInferRequest) -> InferCall:
    raw: Sequence[bytes] = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise RequestError(f"raw_input_contents: expected {len(request.inputs)}, one an input, got {len(raw)}")
    inputs = []
    for number, one in enumerate(request.inputs):
        _no_more(one.name, one.parameters)
        inputs.append(_typed(one) if not raw else _raw(one, raw[number]))
    for one in request.outputs:
        _no_more(f"outputs.{one.name}", one.parameters)
    parameters = {name: _value(one) for name, one in request.parameters.items()}
    return InferCall(inputs, parameters, [one.name for one in request.outputs], request.id)


def _raw(one: pb.ModelInferRequest.InferInputTensor, content: bytes) -> NamedTensor:
    if one.HasField("contents"):
        raise RequestError(f"{one.name}: expected either contents or raw_input_contents, got both")
    return from_raw(one.name, one.datatype, list(one.shape), content)


def _typed(one: pb.ModelInferRequest.InferInputTensor) -> NamedTensor:
    field = _CONTENTS.get(one.datatype)
    others = [found.name for found, _ in one.contents.ListFields() if found.name != field]
    if field is not None and others:
        raise RequestError(f"{one.name}: expected {one.datatype} in contents.{field}, got {others}")
    values = [] if field is None else list(getattr(one.contents, field))
    return from_values(one.name, one.datatype, list(one.shape), values)


def _value(one: pb.InferParameter) -> object:
    chosen = one.WhichOneof("parameter_choice")
    return None if chosen is None else getattr(one, chosen)


def _no_more(where: str, parameters: Mapping[str, object]) -> None:
    if parameters:
        raise RequestError(f"{where}.parameters: expected none, got {sorted(parameters)}")


def _response(answer: Inferred) -> pb.ModelInferResponse:
    found = pb.ModelInferResponse(model_name=answer.model, model_version=answer.version, id=answer.id)
    for tensor in answer.outputs:
        found.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.array.shape)
        found.raw_output_contents.append(to_raw(tensor))
    return found


def _pool() -> descriptor_pool.DescriptorPool:
    """What reflection tells of: our messages, which have a pool of their own, and those of health and reflection.

    A client's library in the same process may bring messages of the same names, and one pool cannot hold both.
    """
    pool = descriptor_pool.DescriptorPool()
    for module in (pb, health_pb2, reflection_pb2):
        pool.AddSerializedFile(module.DESCRIPTOR.serialized_pb)
    return pool
