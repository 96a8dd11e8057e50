"""The tensors of a ranking stage, of a funnel whose columns are of every kind."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from prerank.errors import RequestError
from prerank.features.transforms import Transforms
from prerank.schema import Bag, Category, Embedding, FeatureSchema, Number
from prerank.serve.funnel import Funnel
from prerank.serve.ranking_tensors import RankingTensors
from prerank.serve.tensors import NamedTensor
from tests.serve import world
from tests.serve.client import Client
from tests.serve.conftest import publish_live
from tests.serve.test_open_inference import error_of, inputs, outputs, tensor

COLUMNS = pa.table(
    {
        "place": ["a", "b"],
        "hour": [1, 2],
        "is_app": [True, False],
        "age": [1.5, 2.5],
        "tags": [["x", "y"], ["x"]],
        "rooms": [[1, 2], [3]],
        "words": ["x|y", "x"],
    }
)
CONTEXT = {
    "place": Category(),
    "hour": Category(),
    "hour_too": Number(column="hour"),
    "is_app": Category(),
    "age": Number(),
    "tags": Bag(),
    "rooms": Bag(),
    "words": Bag(separator="|"),
}
EVERY = {
    "item_ids": ("INT64", [[1], [2]]),
    "user_id": ("INT64", [[7], [8]]),
    "context.place": ("BYTES", [[b"a"], [b""]]),
    "context.hour": ("INT32", [[1], [2]]),
    "context.is_app": ("BOOL", [[True], [False]]),
    "context.age": ("FP64", [[1.5], [math.nan]]),
    "context.tags": ("BYTES", [[b"x", b"y"], [b"x", b""]]),
    "context.rooms": ("INT64", [[1, 2], [3, -1]]),
    "context.words": ("BYTES", [[b"x|y"], [b"x"]]),
    "user.vector": ("FP32", [[1.0, 2.0], [math.nan, math.nan]]),
}


@pytest.fixture(scope="module")
def tensors() -> RankingTensors:
    once = np.ones(2, np.int64)
    users, items = (
        pa.table({"country": ["de", "fr"], "vector": [[1.0, 2.0], [3.0, 4.0]]}),
        pa.table({"item_id": [1, 2]}),
    )
    schema = FeatureSchema({"country": Category(), "vector": Embedding(width=2)}, CONTEXT, {"item_id": Category()})
    transforms = Transforms.fit(schema, users=(users, once), items=(items, once), context=[COLUMNS])
    return RankingTensors(SimpleNamespace(transforms=transforms, values=("bid",), tasks=("click",)))  # type: ignore[arg-type]


def named(**changes: tuple[str, list] | None) -> list[NamedTensor]:
    given = {**EVERY, **{name.replace("__", "."): one for name, one in changes.items()}}
    dtypes = {"INT64": np.int64, "INT32": np.int32, "BOOL": bool, "FP64": float, "FP32": np.float32, "BYTES": object}
    return [NamedTensor(n, one[0], np.array(one[1], dtypes[one[0]])) for n, one in given.items() if one is not None]


def test_every_kind_of_column_has_a_tensor_that_its_features_read(tensors: RankingTensors) -> None:
    found = {one.name: (one.datatypes[0], one.shape) for one in tensors.inputs if "." in one.name}
    assert found == {
        "context.place": ("BYTES", (-1, 1)),
        "context.hour": ("INT64", (-1, 1)),
        "context.is_app": ("BOOL", (-1, 1)),
        "context.age": ("FP32", (-1, 1)),
        "context.tags": ("BYTES", (-1, -1)),
        "context.rooms": ("INT64", (-1, -1)),
        "context.words": ("BYTES", (-1, 1)),
        "value.bid": ("FP32", (-1, -1)),
        "user.country": ("BYTES", (-1, 1)),
        "user.vector": ("FP32", (-1, 2)),
    }


def test_rows_of_tensors_are_what_a_request_says_of_its_columns(tensors: RankingTensors) -> None:
    one, two = tensors.read(named(), 99).askers
    assert (one.user_id, one.time_ms, two.user_id) == (7, 99, 8)
    assert one.context == {
        "place": "a",
        "hour": 1,
        "is_app": True,
        "age": 1.5,
        "tags": ["x", "y"],
        "rooms": [1, 2],
        "words": "x|y",
    }
    assert two.context == {
        "place": None,
        "hour": 2,
        "is_app": False,
        "age": None,
        "tags": ["x"],
        "rooms": [3],
        "words": "x",
    }
    for asker in (one, two):
        tensors.transforms.encode_row("context", asker.context)
    assert (one.profile, two.profile) == ({"vector": [1.0, 2.0]}, {"vector": None})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"context__place": ("BYTES", [[b"\xff"], [b"a"]])}, "context.place: expected text in UTF-8, got b'\\xff'"),
        (
            {"user__vector": ("FP32", [[1.0], [2.0]])},
            "user.vector: expected FP32 or FP64 [-1, 2], got FP32 [2, 1]",
        ),
        ({"context__tags": ("BYTES", [b"x", b"y"])}, "context.tags: expected BYTES [-1, -1], got BYTES [2]"),
        ({"context__is_app": ("INT64", [1, 0])}, "context.is_app: expected BOOL [-1, 1], got INT64 [2]"),
        ({"context__hour": ("FP32", [1.0, 2.0])}, "context.hour: expected INT64 or INT32 or"),
    ],
)
def test_a_column_of_another_form_is_refused_by_name(tensors: RankingTensors, changes: dict, says: str) -> None:
    with pytest.raises(RequestError) as raised:
        tensors.read(named(**changes), 99)
    assert str(raised.value).startswith(says)


def test_where_the_utility_reads_several_values_each_is_an_input_of_its_own(tmp_path: Path) -> None:
    from prerank.serve.http import create_app

    plain = world.config().to_dict()
    features, utility = plain["features"], {"click": {"value": "bid_micros"}, "like": {"value": "bonus"}}
    assert isinstance(features, dict)
    features["item"]["bonus"] = {"kind": "value", "column": "bid_micros"}
    store = publish_live(tmp_path / "tiny", world.config(features=features, utility=utility))
    with Funnel.open(store) as funnel, Client(create_app(funnel)) as client:

        def infer(**own: dict):
            return client.post("/v2/models/tiny/infer", json={"inputs": inputs(**own)})

        bids = [[1.0] * 5, [2.0] * 5]
        says = "bids: expected no such input where the utility reads 2 values; name them: value.bid_micros, value.bonus"
        assert error_of(infer(bids=tensor("bids", "FP32", bids))) == (400, says)
        found = outputs(infer(one=tensor("value.bid_micros", "FP32", bids), two=tensor("value.bonus", "FP32", bids)))
        expected = found["probs"].sum(2) * [[1.0], [2.0]]
        np.testing.assert_allclose(found["utility"], expected, rtol=1e-5)
