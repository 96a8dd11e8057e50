"""The Open Inference Protocol over gRPC, by its own messages: what no client library is needed to see."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import structlog

from prerank.errors import BundleError, ConfigError
from prerank.serve.funnel import Funnel
from prerank.serve.http import Limits, create_app
from prerank.types import ItemChange
from tests.serve.client import Client
from tests.serve.test_open_inference import in_process, inputs, outputs

grpc = pytest.importorskip("grpc", reason="needs the extra: pip install 'prerank[grpc]'")
health_pb2 = pytest.importorskip("grpc_health.v1.health_pb2")
health_pb2_grpc = pytest.importorskip("grpc_health.v1.health_pb2_grpc")
reflection_pb2 = pytest.importorskip("grpc_reflection.v1alpha.reflection_pb2")
reflection_pb2_grpc = pytest.importorskip("grpc_reflection.v1alpha.reflection_pb2_grpc")
descriptor_pb2 = pytest.importorskip("google.protobuf.descriptor_pb2")

from prerank.serve.grpc_stubs import open_inference_pb2 as pb  # noqa: E402 - not there without the extra

SERVICE = "inference.GRPCInferenceService"
NUMBERS = {"INT64": "int64_contents", "FP32": "fp32_contents", "BYTES": "bytes_contents"}


class Stub:
    """Every method of the service by its name, `Infer(request)` -> response."""

    def __init__(self, port: int) -> None:
        self.channel = grpc.insecure_channel(f"127.0.0.1:{port}")

    def __getattr__(self, name: str):
        kind = getattr(pb, f"{name}Response")
        request = getattr(pb, f"{name}Request")
        call = self.channel.unary_unary(f"/{SERVICE}/{name}", request.SerializeToString, kind.FromString)
        return lambda timeout=30, **fields: call(request(**fields), timeout=timeout)


@pytest.fixture
def both(funnel: Funnel) -> Iterator[tuple[Client, Stub]]:
    app = create_app(funnel, Limits(tensor_bytes=20_000), grpc=("127.0.0.1", 0))
    with Client(app) as client:
        stub = Stub(app.state.grpc_port)
        yield client, stub
        stub.channel.close()


@pytest.fixture
def stub(both: tuple[Client, Stub]) -> Stub:
    return both[1]


def typed(**changes: dict | None) -> list:
    """The same inputs as over HTTP, in typed contents."""
    found = []
    for one in inputs(**changes):
        flat = np.array(one["data"]).reshape(-1).tolist()
        flat = [text.encode() for text in flat] if one["datatype"] == "BYTES" else flat
        contents = pb.InferTensorContents(**{NUMBERS[one["datatype"]]: flat})
        kind = pb.ModelInferRequest.InferInputTensor
        found.append(kind(name=one["name"], datatype=one["datatype"], shape=one["shape"], contents=contents))
    return found


def raw() -> tuple[list, list[bytes]]:
    found, parts = typed(), []
    for one in found:
        values = list(getattr(one.contents, NUMBERS[one.datatype]))
        texts = [len(text).to_bytes(4, "little") + text for text in values if isinstance(text, bytes)]
        parts.append(b"".join(texts) if texts else np.array(values, "<i8").tobytes())
        one.ClearField("contents")
    return found, parts


def arrays(response) -> dict[str, np.ndarray]:
    dtypes = {"INT64": "<i8", "FP32": "<f4", "BOOL": "?"}
    pairs = zip(response.outputs, response.raw_output_contents, strict=True)
    return {one.name: np.frombuffer(part, dtypes[one.datatype]).reshape(one.shape) for one, part in pairs}


def test_a_call_is_among_the_traces_under_the_id_that_it_brings(both: tuple[Client, Stub], funnel: Funnel) -> None:
    client, stub = both
    call = stub.channel.unary_unary(
        f"/{SERVICE}/ModelInfer", pb.ModelInferRequest.SerializeToString, pb.ModelInferResponse.FromString
    )
    request = pb.ModelInferRequest(model_name="tiny", inputs=typed())
    call(request, timeout=30, metadata=(("x-request-id", "mine"),))
    with pytest.raises(grpc.RpcError):
        stub.ModelInfer(model_name="tiny", inputs=[])
    stub.ServerLive()
    wrong, whole = client.get("/v1/traces").json()["traces"]
    assert (whole["request_id"], whole["status"], wrong["status"]) == ("mine", 200, 400)
    found = client.get("/v1/trace/mine").json()
    assert found["version"] == funnel.version
    assert [one["name"] for one in found["stages"]] == ["read_tensors", "rank", "write_tensors"]
    assert client.get(f"/v1/trace/{wrong['request_id']}").json()["error"]["type"] == "RequestError"


def refused(call, **fields: object) -> tuple[object, str]:
    with pytest.raises(grpc.RpcError) as raised:
        call(**fields)
    return raised.value.code(), raised.value.details()


def test_winners_are_those_of_the_ranking_stage_typed_and_raw(stub: Stub, funnel: Funnel) -> None:
    top = in_process(funnel).winners
    tensors, parts = raw()
    for fields in ({"inputs": typed()}, {"inputs": tensors, "raw_input_contents": parts}):
        response = stub.ModelInfer(model_name="tiny", id="a call", **fields)
        assert (response.model_name, response.model_version, response.id) == ("tiny", funnel.version, "a call")
        found = arrays(response)
        np.testing.assert_array_equal(found["item_ids"], top.item_ids)
        np.testing.assert_allclose(found["utility"][top.valid], top.utility[top.valid], rtol=1e-5)
        assert found["num_unknown"].tolist() == [1, 0]
        assert found["is_unknown_user"].tolist() == [False, True]


def test_what_http_gives_grpc_gives(both: tuple[Client, Stub]) -> None:
    client, stub = both
    over_http = outputs(client.post("/v2/models/tiny/infer", json={"inputs": inputs(), "parameters": {"k": 2}}))
    k = pb.InferParameter(int64_param=2)
    wanted = [pb.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in ("probs", "item_ids")]
    found = arrays(stub.ModelInfer(model_name="tiny", inputs=typed(), parameters={"k": k}, outputs=wanted))
    assert list(found) == ["probs", "item_ids"]
    for name, array in found.items():
        np.testing.assert_allclose(array, over_http[name], rtol=1e-6)


def test_metadata_config_statistics_and_index_are_those_of_http(both: tuple[Client, Stub]) -> None:
    json_format = pytest.importorskip("google.protobuf.json_format")
    client, stub = both
    stub.ModelInfer(model_name="tiny", inputs=typed())

    def plain(message) -> dict:
        return json_format.MessageToDict(
            message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )

    def same(message, path: str) -> None:
        expected = client.get(path).json()
        assert json_format.ParseDict(expected, type(message)()) == message
        assert set(plain(message)) == set(expected)

    same(stub.ServerMetadata(), "/v2")
    same(stub.ModelMetadata(name="tiny"), "/v2/models/tiny")
    same(stub.ModelConfig(name="tiny").config, "/v2/models/tiny/config")
    same(stub.ModelStatistics(name="tiny"), "/v2/models/tiny/stats")
    same(stub.ModelStatistics(), "/v2/models/stats")
    assert stub.ModelStatistics(name="tiny").model_stats[0].inference_count == 2
    assert plain(stub.RepositoryIndex())["models"] == client.post("/v2/repository/index").json()
    assert stub.ServerLive().live
    assert stub.ServerReady().ready
    assert stub.ModelReady(name="tiny").ready
    assert not stub.ModelReady(name="tiny", version="1").ready


def test_what_is_wrong_is_named_with_what_was_expected(stub: Stub, funnel: Funnel) -> None:
    invalid, not_found = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
    tensors, parts = raw()
    mistyped = typed()
    mistyped[0].contents.ClearField("int64_contents")
    mistyped[0].contents.fp32_contents.append(1.0)
    both = typed()
    k = {"k": pb.InferParameter(string_param="2")}
    for fields, code, says in (
        ({"model_name": "x"}, not_found, "model: expected 'tiny', the one there is, got 'x'"),
        ({"model_version": "1"}, not_found, f"version: expected '{funnel.version}', the one that serves, got '1'"),
        ({"inputs": typed(item_ids=None)}, invalid, "item_ids: missing; expected INT64 [-1, -1]"),
        ({"inputs": mistyped}, invalid, "item_ids: expected INT64 in contents.int64_contents, got ['fp32_contents']"),
        ({"inputs": typed(user_id=None)}, invalid, "user_id: missing; expected INT64 [-1, 1]"),
        ({"inputs": tensors, "raw_input_contents": parts[:2]}, invalid, "raw_input_contents: expected 5, one an input"),
        ({"inputs": both, "raw_input_contents": parts}, invalid, "item_ids: expected either contents or raw_input"),
        (
            {"inputs": tensors, "raw_input_contents": [b"", *parts[1:]]},
            invalid,
            "item_ids: expected 80 bytes for INT64",
        ),
        ({"inputs": tensors}, invalid, "item_ids: expected 10 values for INT64 [2, 5], got [0]"),
        ({"inputs": typed(), "parameters": k}, invalid, "parameters.k: expected a whole number, got '2'"),
        ({}, invalid, "item_ids: missing"),
    ):
        found, details = refused(stub.ModelInfer, **{"model_name": "tiny", **fields})
        assert found is code
        assert details.startswith(says)
    assert refused(stub.ModelMetadata, name="x")[0] is not_found
    assert refused(stub.ModelConfig, name="tiny", version="1")[0] is not_found


def test_more_bytes_than_may_come_are_refused(stub: Stub) -> None:
    code, details = refused(stub.ModelInfer, model_name="tiny", raw_input_contents=[b"\0" * 20_001])
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in details


def test_our_own_mistake_tells_a_client_no_details(stub: Stub, funnel: Funnel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("/secret/path")

    monkeypatch.setattr(funnel.ranking, "rank", fail)
    with structlog.testing.capture_logs() as logs:
        code, details = refused(stub.ModelInfer, model_name="tiny", inputs=typed())
    assert code is grpc.StatusCode.INTERNAL
    assert details == f"the server made a mistake; its log has this request_id: {logs[0]['request_id']}"


def test_a_caller_who_waits_no_more_is_not_ranked_for_and_too_many_are_turned_away(
    funnel: Funnel, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, num_ranked = threading.Event(), 0
    right = funnel.ranking.rank

    def slow(*asked: object):
        nonlocal num_ranked
        num_ranked += 1
        assert gate.wait(30)
        return right(*asked)

    monkeypatch.setattr(funnel.ranking, "rank", slow)
    app = create_app(funnel, Limits(threads=1, waiting=1), grpc=("127.0.0.1", 0))
    with Client(app), ThreadPoolExecutor(1) as others:
        stub = Stub(app.state.grpc_port)
        held = others.submit(lambda: stub.ModelInfer(model_name="tiny", inputs=typed()))
        while not num_ranked:
            time.sleep(0.002)
        late = refused(stub.ModelInfer, model_name="tiny", inputs=typed(), timeout=0.2)
        assert late[0] is grpc.StatusCode.DEADLINE_EXCEEDED
        # the server still has both: the first is being ranked, the other waits for its turn
        assert refused(stub.ServerLive)[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        gate.set()
        assert arrays(held.result(30))["num_valid"].tolist() == [3, 5]
        while not (failed := stub.ModelStatistics().model_stats[0].inference_stats.fail.count):
            time.sleep(0.002)
        assert failed == 1
        assert num_ranked == 1
        stub.channel.close()


def test_what_is_live_of_items_counts(stub: Stub, funnel: Funnel) -> None:
    funnel.change([ItemChange(103, on=False)])
    assert 103 not in arrays(stub.ModelInfer(model_name="tiny", inputs=typed()))["item_ids"]
    funnel.change([ItemChange(103, on=True)])


def test_reflection_lists_the_services_and_tells_their_messages(stub: Stub) -> None:
    kind = reflection_pb2.ServerReflectionRequest
    ask = reflection_pb2_grpc.ServerReflectionStub(stub.channel).ServerReflectionInfo
    names, told = ask(iter([kind(list_services=""), kind(file_containing_symbol=SERVICE)]), timeout=30)
    found = {one.name for one in names.list_services_response.service}
    assert found == {SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    [content] = told.file_descriptor_response.file_descriptor_proto
    file = descriptor_pb2.FileDescriptorProto.FromString(content)
    assert {one.name for one in file.service[0].method} >= {"ModelInfer", "ModelMetadata", "ModelStatistics"}
    [health] = ask(iter([kind(file_containing_symbol="grpc.health.v1.Health")]), timeout=30)
    assert health.HasField("file_descriptor_response")


def test_health_is_serving_where_a_version_is_loaded_and_not_where_none_is(stub: Stub) -> None:
    serving, status = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse
    app = create_app(BundleError("scorer.safetensors: damaged"), grpc=("127.0.0.1", 0))
    with Client(app):
        broken = Stub(app.state.grpc_port)
        for one, expected in ((stub, serving), (broken, status.NOT_SERVING)):
            check = health_pb2_grpc.HealthStub(one.channel).Check
            for service in ("", SERVICE):
                assert check(health_pb2.HealthCheckRequest(service=service), timeout=30).status == expected
        assert broken.ServerLive().live
        assert not broken.ServerReady().ready
        code, details = refused(broken.ModelInfer, model_name="tiny", inputs=typed())
        assert (code, details) == (grpc.StatusCode.UNAVAILABLE, "no version is loaded; /readyz says why")
        broken.channel.close()


def test_a_port_that_is_taken_is_said(stub: Stub, both: tuple[Client, Stub], funnel: Funnel) -> None:
    taken = both[0]._app.state.grpc_port
    with pytest.raises(ConfigError, match=rf"gRPC cannot listen on 127\.0\.0\.1:{taken}: .* --grpc-port"):
        create_app(funnel, grpc=("127.0.0.1", taken))
