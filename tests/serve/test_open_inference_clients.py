"""An unmodified tritonclient against `prerank serve`, over HTTP and gRPC, and the example of the docs."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import httpx
import numpy as np
import pytest
import torch

from prerank.serve.funnel import Funnel
from prerank.serve.ranking import Asker
from tests.conftest import ROOT
from tests.serve import world
from tests.serve.conftest import publish_live

ABSENT = "needs tritonclient: pip install 'tritonclient[http,grpc]'"
triton_http = pytest.importorskip("tritonclient.http", reason=ABSENT)
triton_grpc = pytest.importorskip("tritonclient.grpc", reason=ABSENT)

NOW = world.T0 + 10_000
IDS = [[100, 103, 999, 101, -1], [107, 106, 105, 104, 103]]
BIDS = [[9.0, 8.0, 7.0, 6.0, 5.0], [1e3, 2e3, 3e3, 4e3, 5e3]]
CONTEXTS = [{"hour": 1, "surface": "feed"}, {"hour": 2, "surface": "search"}]
DOC = (ROOT / "docs" / "open_inference.md").read_text()


@dataclass(frozen=True)
class Served:
    store: Path
    http: str
    grpc: str


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """`prerank serve` of the tiny world, as a process of its own."""
    folder = tmp_path_factory.mktemp("served")
    store = publish_live(folder / "demo", world.config(name="demo"))
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(str(free.getsockname()[1]))
    command = [sys.executable, "-m", "prerank", "serve", "--store", str(folder), "--port", ports[0]]
    process = subprocess.Popen([*command, "--grpc-port", ports[1]], stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(600):
            try:
                if httpx.get(f"http://127.0.0.1:{ports[0]}/v2/health/ready").status_code == 200:
                    break
            except httpx.TransportError:
                assert process.poll() is None, process.communicate()[1]
            time.sleep(0.1)
        yield Served(store, *(f"127.0.0.1:{port}" for port in ports))
        process.terminate()
        assert "Traceback" not in process.communicate(timeout=30)[1]
    finally:
        process.kill()
        process.communicate()


def ranked(served: Served, item_ids: list[list[int]], users: list[int], now: int | None, k: int, bids=None):
    values = {} if bids is None else {"bid_micros": torch.tensor(bids)}
    now = time.time_ns() // 1_000_000 if now is None else now
    askers = [Asker(now, user_id, context=context) for user_id, context in zip(users, CONTEXTS, strict=True)]
    with Funnel.open(served.store, workers=None) as funnel:
        return funnel.ranking.rank(torch.tensor(item_ids), askers, k, values)


def tensors(module: ModuleType, bids: list[list[float]] | None = None, **how: bool) -> list:
    given = {
        "item_ids": ("INT64", np.array(IDS)),
        "user_id": ("INT64", np.array([[1], [404]])),
        "context.hour": ("INT64", np.array([[1], [2]])),
        "context.surface": ("BYTES", np.array([["feed"], ["search"]], object)),
        "time_ms": ("INT64", np.array([[NOW], [NOW]])),
    }
    if bids is not None:
        given["bids"] = ("FP32", np.array(bids, np.float32))
    made = []
    for name, (datatype, values) in given.items():
        one = module.InferInput(name, list(values.shape), datatype)
        one.set_data_from_numpy(values, **how)
        made.append(one)
    return made


def over_json(served: Served, **options):
    with triton_http.InferenceServerClient(served.http) as client:
        names = ("item_ids", "utility", "probs", "num_valid", "num_unknown")
        wanted = [triton_http.InferRequestedOutput(name, binary_data=False) for name in names]
        inputs = tensors(triton_http, options.pop("bids", None), binary_data=False)
        return client.infer("demo", inputs, outputs=wanted, **options)


def over_binary(served: Served, **options):
    with triton_http.InferenceServerClient(served.http) as client:
        return client.infer("demo", tensors(triton_http, options.pop("bids", None)), **options)


def over_grpc(served: Served, **options):
    with triton_grpc.InferenceServerClient(served.grpc) as client:
        return client.infer("demo", tensors(triton_grpc, options.pop("bids", None)), **options)


WAYS = [over_json, over_binary, over_grpc]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bids", [None, BIDS])
def test_a_client_gets_the_winners_of_the_ranking_stage(served: Served, way: Callable, bids: list | None) -> None:
    expected = ranked(served, IDS, [1, 404], NOW, 3, bids)
    top = expected.winners
    found = way(served, bids=bids, parameters={"k": 3}, request_id="a-call")
    np.testing.assert_array_equal(found.as_numpy("item_ids"), top.item_ids)
    np.testing.assert_allclose(found.as_numpy("utility"), top.utility, rtol=1e-5)
    np.testing.assert_allclose(found.as_numpy("probs"), top.probs, rtol=1e-5)
    assert found.as_numpy("num_valid").tolist() == [3, 3]
    assert found.as_numpy("num_unknown").tolist() == [1, 0]


@pytest.mark.parametrize("way", WAYS)
def test_a_client_is_told_what_is_wrong(served: Served, way: Callable) -> None:
    with pytest.raises(Exception, match="k: expected 1 to 5, got 50") as raised:
        way(served, parameters={"k": 50})
    assert type(raised.value).__name__ == "InferenceServerException"


@pytest.mark.parametrize("module", [triton_http, triton_grpc], ids=["http", "grpc"])
def test_a_client_sees_health_metadata_config_and_statistics(served: Served, module: ModuleType) -> None:
    is_grpc = module is triton_grpc
    plain = {"as_json": True} if is_grpc else {}
    with module.InferenceServerClient(served.grpc if is_grpc else served.http) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("demo")
        assert not client.is_model_ready("other")
        assert client.get_server_metadata(**plain)["name"] == "prerank"
        said = client.get_model_metadata("demo", **plain)
        assert [one["name"] for one in said["inputs"]][:2] == ["item_ids", "user_id"]
        config = client.get_model_config("demo", **plain)
        assert (config["config"] if is_grpc else config)["max_batch_size"] == 256
        index = client.get_model_repository_index(**plain)
        assert (index["models"] if is_grpc else index)[0]["state"] == "READY"

        def num_users() -> int:
            [found] = client.get_inference_statistics("demo", **plain)["model_stats"]
            return int(found.get("inference_count", 0))

        before = num_users()
        client.infer("demo", tensors(module))
        assert num_users() == before + 2


def test_many_calls_at_once_are_all_answered(served: Served) -> None:
    with triton_grpc.InferenceServerClient(served.grpc) as client:
        answers: list = []
        for _ in range(20):
            client.async_infer("demo", tensors(triton_grpc), lambda result, error: answers.append((result, error)))
        for _ in range(300):
            if len(answers) == 20:
                break
            time.sleep(0.1)
    assert [error for _, error in answers] == [None] * 20
    first = answers[0][0].as_numpy("utility")
    for result, _ in answers:
        np.testing.assert_array_equal(result.as_numpy("utility"), first)


def test_the_example_of_the_docs_runs_and_prints_the_winners(served: Served, capsys: pytest.CaptureFixture) -> None:
    [example] = re.findall(r"```python\n(.*?)```", DOC, flags=re.DOTALL)
    assert "127.0.0.1:8000" in example
    exec(compile(example.replace("127.0.0.1:8000", served.http), "docs/open_inference.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    bids = [[900.0, 800.0, 700.0, 600.0], [500.0, 400.0, 0.0, 0.0]]
    top = ranked(served, [[100, 101, 102, 103], [105, 107, -1, -1]], [1, 2], None, 3, bids).winners
    rows = [ids[valid] for ids, valid in zip(top.item_ids.numpy(), top.valid.numpy(), strict=True)]
    assert [line.partition("]")[0] + "]" for line in printed] == [str(row) for row in rows]


def test_the_docs_name_every_tensor_and_endpoint(served: Served) -> None:
    said = httpx.get(f"http://{served.http}/v2/models/demo").json()
    for one in said["outputs"]:
        assert f"| `{one['name']}` |" in DOC
    for one in said["inputs"]:
        name = one["name"]
        assert f"`{name.split('.')[0]}.{{" in DOC if "." in name else f"| `{name}` |" in DOC


def test_our_messages_have_the_numbers_and_types_that_the_client_has() -> None:
    from prerank.serve.grpc_stubs import open_inference_pb2 as ours

    def told(descriptor) -> dict[str, tuple[int, int]]:
        return {field.name: (field.number, field.type) for field in descriptor.fields}

    theirs = {
        **triton_grpc.service_pb2.DESCRIPTOR.message_types_by_name,
        **triton_grpc.model_config_pb2.DESCRIPTOR.message_types_by_name,
    }
    waiting = list(ours.DESCRIPTOR.message_types_by_name.values())
    assert len(waiting) > 25
    for mine in waiting:
        whole = told(theirs[mine.name])
        assert told(mine).items() <= whole.items(), mine.name
        for nested in mine.nested_types:
            of_theirs = theirs[mine.name].nested_types_by_name[nested.name]
            assert told(nested).items() <= told(of_theirs).items(), nested.full_name
    numbers = {one.name: one.number for one in ours.DESCRIPTOR.enum_types_by_name["DataType"].values}
    enums = triton_grpc.model_config_pb2.DESCRIPTOR.enum_types_by_name
    assert numbers == {one.name: one.number for one in enums["DataType"].values}
