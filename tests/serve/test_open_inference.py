"""The Open Inference Protocol over HTTP, by plain bytes: what the protocol says, whoever's client asks."""

from __future__ import annotations

import asyncio
import json
import struct
import threading
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
import structlog
import torch

from prerank.errors import BundleError, ConfigError
from prerank.serve.funnel import Funnel
from prerank.serve.http import Limits, create_app
from prerank.serve.ranking import Asker
from prerank.types import ItemChange
from tests.serve import world
from tests.serve.client import Client

NOW = world.T0 + 10_000
IDS = [[100, 103, 999, 101, -1], [107, 106, 105, 104, 103]]
INFER = "/v2/models/tiny/infer"


@pytest.fixture
def client(funnel: Funnel) -> Iterator[Client]:
    with Client(create_app(funnel, Limits(tensor_bytes=20_000))) as client:
        yield client


def tensor(name: str, datatype: str, data: list, shape: list[int] | None = None) -> dict:
    return {"name": name, "datatype": datatype, "shape": shape or list(np.shape(data)), "data": data}


def inputs(**changes: dict | None) -> list[dict]:
    found = {
        "item_ids": tensor("item_ids", "INT64", IDS),
        "user_id": tensor("user_id", "INT64", [[1], [404]]),
        "hour": tensor("context.hour", "INT64", [1, 2]),
        "surface": tensor("context.surface", "BYTES", ["feed", "search"]),
        "time_ms": tensor("time_ms", "INT64", [NOW, NOW]),
        **changes,
    }
    return [one for one in found.values() if one is not None]


def ask(client: Client, **body: object) -> httpx.Response:
    return client.post(INFER, json={"inputs": inputs(), **body})


def outputs(response: httpx.Response) -> dict[str, np.ndarray]:
    assert response.status_code == 200, response.text
    return {one["name"]: np.array(one["data"]).reshape(one["shape"]) for one in response.json()["outputs"]}


def error_of(response: httpx.Response) -> tuple[int, str]:
    body = response.json()
    assert set(body) == {"error"}
    assert isinstance(body["error"], str)
    return response.status_code, body["error"]


def in_process(funnel: Funnel, k: int = 5):

    contexts = [{"hour": 1, "surface": "feed"}, {"hour": 2, "surface": "search"}]
    askers = [Asker(NOW, user_id, context=context) for user_id, context in zip((1, 404), contexts, strict=True)]
    return funnel.ranking.rank(torch.tensor(IDS), askers, k)


def test_winners_are_those_of_the_ranking_stage(client: Client, funnel: Funnel) -> None:
    response = ask(client, id="a call")
    found, expected = outputs(response), in_process(funnel)
    assert {k: v for k, v in response.json().items() if k != "outputs"} == {
        "id": "a call",
        "model_name": "tiny",
        "model_version": funnel.version,
    }
    top = expected.winners
    np.testing.assert_array_equal(found["item_ids"], top.item_ids)
    np.testing.assert_allclose(found["utility"][top.valid], top.utility[top.valid], rtol=1e-5)
    np.testing.assert_allclose(found["probs"][top.valid], top.probs[top.valid], rtol=1e-5)
    assert found["probs"].shape == (2, 5, 2)
    assert not found["utility"][~top.valid.numpy()].any()
    assert found["num_valid"].tolist() == [3, 5]
    assert found["num_unknown"].tolist() == [1, 0]
    assert found["is_unknown_user"].tolist() == [False, True]
    for name in ("num_nonfinite", "num_below", "num_absent"):
        assert found[name].tolist() == [0, 0]


def test_k_is_a_parameter_and_outputs_are_those_asked_for_in_their_order(client: Client) -> None:
    wanted = [{"name": "num_valid"}, {"name": "item_ids"}]
    response = ask(client, parameters={"k": 2}, outputs=wanted)
    assert [one["name"] for one in response.json()["outputs"]] == ["num_valid", "item_ids"]
    assert outputs(response)["item_ids"].shape == (2, 2)
    assert outputs(response)["num_valid"].tolist() == [2, 2]


def test_without_k_there_are_as_many_winners_as_there_can_be(client: Client) -> None:
    few = inputs(item_ids=tensor("item_ids", "INT64", [[100, 101], [102, 103]]))
    assert outputs(ask(client, inputs=few))["item_ids"].shape == (2, 2)


@pytest.mark.parametrize("name", ["bids", "value.bid_micros"])
@pytest.mark.parametrize("datatype", ["FP32", "FP64"])
def test_bids_count_in_place_of_the_items_own(client: Client, name: str, datatype: str) -> None:
    bids = [[0.0, 1e6, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 2e6]]
    found = outputs(ask(client, inputs=inputs(bids=tensor(name, datatype, bids))))
    assert found["item_ids"][:, 0].tolist() == [103, 103]
    click, like = np.moveaxis(found["probs"][:, 0], 1, 0)
    np.testing.assert_allclose(found["utility"][:, 0], click * [1e6, 2e6] + like * 10.0, rtol=1e-5)


def test_a_profile_stands_in_for_a_user_id_and_empty_text_is_null(client: Client) -> None:
    of_de = tensor("user.country", "BYTES", ["de", ""])
    found = outputs(ask(client, inputs=inputs(user_id=None, profile=of_de)))
    stored = outputs(ask(client, inputs=inputs(user_id=tensor("user_id", "INT64", [3, 404]))))
    np.testing.assert_array_equal(found["utility"], stored["utility"])


def test_what_is_off_does_not_win(client: Client, funnel: Funnel) -> None:
    funnel.change([ItemChange(103, on=False)])
    assert 103 not in outputs(ask(client))["item_ids"]
    funnel.change([ItemChange(103, on=True)])
    assert 103 in outputs(ask(client))["item_ids"]


def binary(client: Client, header: dict, *tensors: bytes, length: str | None = None) -> httpx.Response:
    content = json.dumps(header).encode()
    said = str(len(content)) if length is None else length
    headers = {"inference-header-content-length": said, "content-type": "application/octet-stream"}
    return client.post(INFER, content=b"".join([content, *tensors]), headers=headers)


def raw_inputs() -> tuple[list[dict], list[bytes]]:
    """item_ids and surface raw, the rest as JSON."""
    parts = [np.array(IDS, "<i8").tobytes(), b"".join(struct.pack("<I", len(t)) + t for t in (b"feed", b"search"))]
    one, two = (tensor(n, t, []) for n, t in (("item_ids", "INT64"), ("context.surface", "BYTES")))
    for raw, shape, part in ((one, [2, 5], parts[0]), (two, [2], parts[1])):
        del raw["data"]
        raw["shape"], raw["parameters"] = shape, {"binary_data_size": len(part)}
    return inputs(item_ids=one, surface=two), parts


def test_tensors_may_be_raw_both_ways(client: Client) -> None:
    said, parts = raw_inputs()
    as_json = outputs(ask(client))
    response = binary(client, {"inputs": said}, *parts)
    np.testing.assert_array_equal(outputs(response)["utility"], as_json["utility"])
    response = binary(client, {"inputs": said, "parameters": {"binary_data_output": True}}, *parts)
    assert response.headers["content-type"] == "application/octet-stream"
    length, at = int(response.headers["inference-header-content-length"]), 0
    for one in json.loads(response.content[:length])["outputs"]:
        size = one["parameters"]["binary_data_size"]
        dtype = {"INT64": "<i8", "FP32": "<f4", "BOOL": "?"}[one["datatype"]]
        array = np.frombuffer(response.content[length + at :][:size], dtype).reshape(one["shape"])
        np.testing.assert_allclose(array, as_json[one["name"]], rtol=1e-6)
        at += size
    assert length + at == len(response.content)


def test_each_output_may_say_how_it_comes(client: Client) -> None:
    wanted = [{"name": "item_ids", "parameters": {"binary_data": True}}, {"name": "num_valid"}]
    response = ask(client, outputs=wanted)
    length = int(response.headers["inference-header-content-length"])
    one, two = json.loads(response.content[:length])["outputs"]
    assert one["parameters"] == {"binary_data_size": 2 * 5 * 8}
    assert len(response.content) == length + 80
    assert two["data"] == [3, 5]
    most = [{"name": "item_ids", "parameters": {"binary_data": False}}, {"name": "num_valid"}]
    response = ask(client, outputs=most, parameters={"binary_data_output": True})
    length = int(response.headers["inference-header-content-length"])
    one, two = json.loads(response.content[:length])["outputs"]
    assert len(one["data"]) == 10
    assert two["parameters"] == {"binary_data_size": 16}


def test_sizes_that_do_not_add_up_are_refused(client: Client) -> None:
    said, parts = raw_inputs()
    told = {
        "item_ids.binary_data_size: expected at most 70, the bytes that are left after the JSON, got 80": [
            parts[0][:70]
        ],
        "body: expected 98 bytes of tensors after the JSON, got 99": [*parts, b"x"],
    }
    for says, sent in told.items():
        assert error_of(binary(client, {"inputs": said}, *sent)) == (400, says)
    for length in ("0", "-1", "x", "999999", "9" * 5000):
        status, message = error_of(binary(client, {"inputs": said}, *parts, length=length))
        assert status == 400
        assert message.startswith("inference-header-content-length: expected 1 to ")
    status, message = error_of(ask(client, inputs=said))
    assert (status, message.partition(":")[0]) == (400, "item_ids.binary_data_size")
    neither = inputs(item_ids={"name": "item_ids", "datatype": "INT64", "shape": [2, 5]})
    says = "item_ids: expected either data or the parameter binary_data_size"
    assert error_of(ask(client, inputs=neither)) == (400, says)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"item_ids": None}, "item_ids: missing; expected INT64 [-1, -1], a row of candidates a user"),
        ({"user_id": None}, "user_id: missing; expected INT64 [-1, 1], or in its place some of ['user.country']"),
        ({"hour": None}, "context.hour: missing; expected INT64 or INT32"),
        ({"item_ids": tensor("item_ids", "FP32", IDS)}, "item_ids: expected INT64 [-1, -1], got FP32 [2, 5]"),
        ({"item_ids": tensor("item_ids", "INT64", [1, 2])}, "item_ids: expected INT64 [-1, -1], got INT64 [2]"),
        ({"item_ids": tensor("item_ids", "INT64", [], [2, 0])}, "item_ids: expected 1 candidate a row or more"),
        (
            {"item_ids": tensor("item_ids", "INT64", [[1]] * 257)},
            "item_ids: expected 1 to 256 rows, one a user, got 257",
        ),
        ({"user_id": tensor("user_id", "INT64", [1])}, "user_id: expected 2 rows as item_ids has, got 1"),
        ({"user_id": tensor("user_id", "INT64", [[1, 2]])}, "user_id: expected INT64 [-1, 1], got INT64 [1, 2]"),
        ({"surface": tensor("context.surface", "INT64", [1, 2])}, "context.surface: expected BYTES [-1, 1], got INT64"),
        ({"bids": tensor("bids", "INT64", IDS)}, "bids: expected FP32 or FP64 [-1, -1], got INT64 [2, 5]"),
        ({"bids": tensor("bids", "FP32", [[1.0], [2.0]])}, "bids: expected [2, 5] as item_ids has, got [2, 1]"),
        (
            {"bids": tensor("bids", "FP32", IDS), "both": tensor("value.bid_micros", "FP32", IDS)},
            "value.bid_micros: expected bids or value.bid_micros, which are one, got both",
        ),
        ({"x": tensor("context.houre", "INT64", [1, 2])}, "context.houre: expected an input of ['item_ids', "),
        ({"x": tensor("user_id", "INT64", [1, 2])}, "user_id: expected once, got it twice"),
        ({"time_ms": tensor("time_ms", "INT64", [-5, 1])}, "time_ms: expected UTC milliseconds since 1970"),
    ],
)
def test_an_input_that_is_wrong_is_named_with_what_it_must_be(client: Client, changes: dict, says: str) -> None:
    status, message = error_of(ask(client, inputs=inputs(**changes)))
    assert status == 400
    assert message.startswith(says)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"parameters": {"k": 0}}, "k: expected 1 to 5, got 0"),
        ({"parameters": {"k": 6}}, "k: expected 1 to 5, got 6"),
        ({"parameters": {"k": 2.0}}, "parameters.k: expected a whole number, got 2.0"),
        ({"parameters": {"kk": 2}}, "parameters.kk: expected one of ['k', 'timeout', 'priority']; did you mean \"k\"?"),
        ({"parameters": {"timeout": -1}}, "parameters.timeout: expected microseconds, 0 or more, got -1"),
        ({"outputs": [{"name": "utilty"}]}, "outputs: expected some of ['item_ids', "),
        ({"outputs": [{"name": "probs", "parameters": {"classification": 3}}]}, "outputs.probs.parameters: expected"),
        ({"inputs": 5}, "body: Expected array, got int - at $.inputs"),
        ({"input": []}, "body: Object contains unknown field input"),
    ],
)
def test_a_body_that_is_wrong_is_a_400_that_says_where(client: Client, body: dict, says: str) -> None:
    status, message = error_of(ask(client, **body))
    assert status == 400
    assert message.startswith(says)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff{}", b"[" * 15_000, b'{"inputs": ' * 1_500])
def test_what_is_no_json_is_a_400(client: Client, content: bytes) -> None:
    status, message = error_of(client.post(INFER, content=content))
    assert status == 400
    assert message.startswith("body: ")


def test_too_large_a_body_and_one_that_is_packed_are_refused(client: Client) -> None:
    assert error_of(client.post(INFER, content=b" " * 20_001)) == (413, "body: expected at most 20000 bytes, got more")
    response = client.post(INFER, content=b"{}", headers={"content-encoding": "gzip"})
    assert error_of(response) == (415, "content-encoding: expected none, got 'gzip'")


def test_a_call_that_waited_past_its_timeout_is_not_ranked(client: Client) -> None:
    says = "the timeout of 1 microseconds passed before the call could be ranked"
    assert error_of(ask(client, parameters={"timeout": 1})) == (504, says)
    assert ask(client, parameters={"timeout": 60_000_000, "priority": 1}).status_code == 200


@pytest.mark.parametrize("path", ["", "/ready", "/config", "/stats", "/versions/1", "/versions/1/config"])
def test_another_model_or_version_is_a_404_and_never_ready(client: Client, funnel: Funnel, path: str) -> None:
    for model in ("other", "tiny") if "versions" in path else ("other",):
        response = client.get(f"/v2/models/{model}{path}")
        if path == "/ready":
            assert (response.status_code, response.json()) == (503, {"name": model, "ready": False})
        else:
            status, message = error_of(response)
            assert status == 404
            assert "expected 'tiny'" in message or f"expected {funnel.version!r}" in message
    assert client.get(f"/v2/models/tiny{path.replace('versions/1', 'versions/' + funnel.version)}").status_code == 200


def test_inferring_with_another_model_or_version_is_a_404(client: Client, funnel: Funnel) -> None:
    says = "model: expected 'tiny', the one there is, got 'x'"
    assert error_of(client.post("/v2/models/x/infer", json={"inputs": inputs()})) == (404, says)
    says = f"version: expected '{funnel.version}', the one that serves, got '1'"
    assert error_of(client.post("/v2/models/tiny/versions/1/infer", json={"inputs": inputs()})) == (404, says)
    right = f"/v2/models/tiny/versions/{funnel.version}/infer"
    assert client.post(right, json={"inputs": inputs()}).status_code == 200


def test_what_there_is_not_has_the_protocols_error_too(client: Client) -> None:
    assert error_of(client.get("/v2/nowhere")) == (404, "GET /v2/nowhere: no such endpoint")
    assert error_of(client.get(INFER)) == (404, f"GET {INFER}: no such endpoint")


def test_the_server_says_that_it_lives_and_what_it_can(client: Client) -> None:
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}
    said = client.get("/v2").json()
    assert said["name"] == "prerank"
    assert "binary_tensor_data" in said["extensions"]


def test_metadata_and_configuration_name_the_same_tensors(client: Client, funnel: Funnel) -> None:
    said, config = client.get("/v2/models/tiny").json(), client.get("/v2/models/tiny/config").json()
    assert (said["name"], said["versions"]) == ("tiny", [funnel.version])
    shapes = {one["name"]: (one["datatype"], one["shape"]) for one in said["inputs"]}
    assert shapes == {
        "item_ids": ("INT64", [-1, -1]),
        "user_id": ("INT64", [-1, 1]),
        "context.hour": ("INT64", [-1, 1]),
        "context.surface": ("BYTES", [-1, 1]),
        "time_ms": ("INT64", [-1, 1]),
        "bids": ("FP32", [-1, -1]),
        "value.bid_micros": ("FP32", [-1, -1]),
        "user.country": ("BYTES", [-1, 1]),
    }
    assert {one["name"]: one["shape"] for one in said["outputs"]}["probs"] == [-1, -1, 2]
    for theirs, ours in ((config["input"], said["inputs"]), (config["output"], said["outputs"])):
        assert [one["name"] for one in theirs] == [one["name"] for one in ours]
        assert [[-1, *one["dims"]] for one in theirs] == [one["shape"] for one in ours]
    needed = [one["name"] for one in config["input"] if not one["optional"]]
    assert needed == ["item_ids", "user_id", "context.hour", "context.surface"]
    assert config["parameters"]["tasks"]["string_value"] == "click,like"
    assert config["parameters"]["max_k"]["string_value"] == "5"
    assert config["max_batch_size"] > 0


def test_an_answer_has_the_outputs_that_the_metadata_says(client: Client) -> None:
    said = client.get("/v2/models/tiny").json()["outputs"]
    for told, came in zip(said, ask(client).json()["outputs"], strict=True):
        assert (told["name"], told["datatype"]) == (came["name"], came["datatype"])
        assert all(a in (-1, b) for a, b in zip(told["shape"], came["shape"], strict=True))


def test_statistics_count_users_calls_and_failures_and_add_up(client: Client, funnel: Funnel) -> None:
    [before] = client.get("/v2/models/stats").json()["model_stats"]
    assert (before["inference_count"], before["last_inference"]) == (0, 0)
    ask(client)
    ask(client)
    ask(client, parameters={"k": 0})
    [found] = client.get("/v2/models/tiny/stats").json()["model_stats"]
    assert (found["name"], found["version"]) == ("tiny", funnel.version)
    assert (found["inference_count"], found["execution_count"]) == (4, 2)
    assert found["last_inference"] > NOW
    parts = found["inference_stats"]
    assert {name: one["count"] for name, one in parts.items()} == {
        "success": 2,
        "fail": 1,
        "queue": 2,
        "compute_input": 2,
        "compute_infer": 2,
        "compute_output": 2,
        "cache_hit": 0,
        "cache_miss": 0,
    }
    compute = [parts[name]["ns"] for name in ("queue", "compute_input", "compute_infer", "compute_output")]
    assert min(compute) > 0
    assert sum(compute) == parts["success"]["ns"]
    [batch] = found["batch_stats"]
    assert batch["batch_size"] == 2
    assert batch["compute_infer"] == parts["compute_infer"]


def test_the_repository_has_the_version_that_serves(client: Client, funnel: Funnel) -> None:
    expected = [{"name": "tiny", "version": funnel.version, "state": "READY", "reason": ""}]
    for content in (b"", b"{}", b'{"ready": true}'):
        assert client.post("/v2/repository/index", content=content).json() == expected
    assert error_of(client.post("/v2/repository/index", content=b"[]"))[0] == 400


def test_where_nothing_could_be_loaded_the_server_lives_and_is_not_ready() -> None:
    with Client(create_app(BundleError("scorer.safetensors: expected sha256 1, found 2"))) as client:
        assert client.get("/v2/health/live").status_code == 200
        assert client.get("/v2/health/ready").status_code == 503
        assert client.get("/v2/models/tiny/ready").status_code == 503
        for response in (client.get("/v2/models/tiny"), client.post(INFER, json={"inputs": inputs()})):
            assert error_of(response) == (503, "no version is loaded; /readyz says why")
        assert client.post("/v2/repository/index").json() == []


def test_a_call_is_among_the_traces_with_the_stages_that_it_has(client: Client, funnel: Funnel) -> None:
    for body in ({"inputs": inputs()}, {"inputs": inputs()[:1]}):
        answer = client.post(INFER, json=body, headers={"x-request-id": f"r-{len(body['inputs'])}"})
        assert answer.headers["x-request-id"].startswith("r-")
    listed = client.get("/v1/traces").json()["traces"]
    num = len(inputs())
    assert [(one["request_id"], one["status"]) for one in listed] == [("r-1", 400), (f"r-{num}", 200)]
    found = client.get(f"/v1/trace/r-{num}").json()
    assert (found["version"], found["user_id"], found["error"]) == (funnel.version, None, None)
    read, rank, write = found["stages"]
    assert [one["name"] for one in found["stages"]] == ["read_tensors", "rank", "write_tensors"]
    assert read["in"] == num
    assert read["out"] == rank["in"] == np.size(IDS)
    assert rank["out"] == write["in"] == write["out"]
    assert 0 < rank["out"] <= np.size(IDS)
    assert 0 <= found["began_ms"] <= found["began_ms"] + rank["start_ms"] + rank["ms"] <= found["ms"]
    assert "read_tensors" in client.get(f"/trace/r-{num}").text
    wrong = client.get("/v1/trace/r-1").json()
    assert wrong["error"]["type"] == "RequestError"
    assert (wrong["version"], wrong["stages"]) == (funnel.version, [])
    assert client.get("/trace/r-1").status_code == 200


def test_our_own_mistake_is_a_500_with_an_id_and_no_details(
    client: Client, funnel: Funnel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("/secret/path")

    monkeypatch.setattr(funnel.ranking, "rank", fail)
    with structlog.testing.capture_logs() as logs:
        response = client.post(INFER, json={"inputs": inputs()}, headers={"x-request-id": "r-2"})
    says = "the server made a mistake; its log has this request_id: r-2"
    assert error_of(response) == (500, says)
    assert [(log["event"], log["request_id"]) for log in logs] == [("request failed", "r-2")]
    assert 'prerank_errors_total{type="InternalError"} 1.0' in client.get("/metrics").text


def test_without_the_extra_grpc_is_refused_by_its_name(funnel: Funnel, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "grpc", None)
    monkeypatch.delitem(sys.modules, "prerank.serve.open_inference_grpc", raising=False)
    with pytest.raises(ConfigError, match=r"gRPC needs an extra, .*; pip install 'prerank\[grpc\]'"):
        create_app(funnel, grpc=("127.0.0.1", 0))


def test_more_calls_than_may_wait_are_turned_away_in_the_protocols_form(
    funnel: Funnel, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, begun = threading.Event(), threading.Event()
    right = funnel.ranking.rank

    def slow(*asked: object):
        begun.set()
        assert gate.wait(30)
        return right(*asked)

    monkeypatch.setattr(funnel.ranking, "rank", slow)
    app = create_app(funnel, Limits(threads=1, waiting=0))

    async def crowd() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://localhost") as http:
            held = asyncio.create_task(http.post(INFER, json={"inputs": inputs()}))
            while not begun.is_set():
                await asyncio.sleep(0.002)
            turned_away = [await http.post(path, json={"inputs": inputs()}) for path in (INFER, "/v1/recommend")]
            gate.set()
            return [*turned_away, await held]

    turned_away, whole, answered = asyncio.run(crowd())
    assert error_of(turned_away) == (503, "1 requests are waiting already; try again later")
    assert turned_away.headers["retry-after"] == "1"
    assert (whole.status_code, answered.status_code) == (503, 200)
