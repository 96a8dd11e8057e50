"""Bids, budgets and pacing changed while a version serves."""

import datetime
import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from prerank.errors import RequestError
from prerank.serve.changes import MOST_CHANGES
from prerank.serve.funnel import Funnel
from prerank.serve.http import create_app
from prerank.types import ItemChange, Request
from tests.serve.client import Client
from tests.serve.fake import FakeFunnel, error_of

REQUEST = Request(user_id=1, k=5, time_ms=1_650_000_000_000, context={"hour": 1, "surface": "feed"})


@pytest.fixture
def store(published: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "store"))


def winners(funnel: Funnel) -> dict[int, float | None]:
    return {one.item_id: one.utility_micros for one in funnel.recommend(REQUEST).winners}


def test_an_item_that_is_off_wins_no_more_and_one_that_is_on_again_does(store: Path) -> None:
    with Funnel.open(store) as funnel:
        before = winners(funnel)
        best = next(iter(before))
        told = funnel.change([ItemChange(best, on=False), ItemChange(10**9, on=False)])
        assert (told.accepted, told.unknown_items) == (2, 1)
        assert best not in winners(funnel)
        assert len(winners(funnel)) == 5
        funnel.change([ItemChange(best, on=True)])
        assert winners(funnel) == before


def test_pacing_changes_what_an_item_is_worth(store: Path) -> None:
    with Funnel.open(store) as funnel:
        before = winners(funnel)
        best, worth = next(iter(before.items()))
        assert worth is not None
        funnel.change([ItemChange(best, pacing=1.5)])
        assert winners(funnel)[best] == pytest.approx(1.5 * worth, rel=1e-5)
        funnel.change([ItemChange(best, pacing=0.0)])
        assert best not in winners(funnel)


def test_a_new_bid_is_what_the_next_request_reckons_with(store: Path) -> None:
    with Funnel.open(store) as funnel:
        best = next(iter(winners(funnel)))
        one = next(w for w in funnel.recommend(REQUEST).winners if w.item_id == best)
        assert one.prob["click"] is not None
        assert one.prob["like"] is not None
        funnel.change([ItemChange(best, values={"bid_micros": 5e9})])  # more than the published column's type holds
        expected = one.prob["click"] * 5e9 + one.prob["like"] * 10
        assert winners(funnel)[best] == pytest.approx(expected, rel=1e-4)


def test_what_was_changed_is_known_after_a_restart(store: Path) -> None:
    with Funnel.open(store) as funnel:
        best = next(iter(winners(funnel)))
        funnel.change([ItemChange(best, on=False, pacing=0.25)])
        expected = winners(funnel)
    with Funnel.open(store) as again:
        assert winners(again) == expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (ItemChange(1), r"items\[0\]: expected at least one of on, pacing, values, columns and removed"),
        (ItemChange(1, pacing=-0.5), r"items\[0\].pacing: expected a finite number of 0 or more, got -0.5"),
        (ItemChange(1, pacing=float("nan")), r"items\[0\].pacing: expected a finite number of 0 or more, got nan"),
        (ItemChange(1 << 63, on=True), r"items\[0\].item_id: expected an int64"),
        (ItemChange(1, values={"none such": 1.0}), r"items\[0\].values: expected .*, got 'none such'"),
    ],
)
def test_a_change_that_is_wrong_is_refused_and_nothing_is_taken(store: Path, change: ItemChange, expected: str) -> None:
    with Funnel.open(store) as funnel:
        before = winners(funnel)
        best = next(iter(before))
        with pytest.raises(RequestError, match=expected):
            funnel.change([change, ItemChange(best, on=False)])
        with pytest.raises(RequestError, match="items: expected 1 to"):
            funnel.change([])
        assert winners(funnel) == before


def test_what_a_request_excludes_does_not_win_and_takes_nobodys_place(store: Path) -> None:
    with Funnel.open(store) as funnel:
        before = list(winners(funnel))
        asked = Request(1, 5, REQUEST.time_ms, REQUEST.context, exclude=(before[0], before[2], -7))
        after = [one.item_id for one in funnel.recommend(asked).winners]
        assert len(after) == 5
        assert not {before[0], before[2]} & set(after)
        everything = tuple(funnel._items.item_ids.tolist())
        none = funnel.recommend(Request(1, 5, REQUEST.time_ms, REQUEST.context, exclude=everything))
        assert not none.winners
        assert "no item is eligible for this request" in none.notes


@pytest.mark.parametrize(
    ("exclude", "expected"),
    [((1 << 63,), "exclude: expected int64 item_ids, got"), ((1,) * 10_001, "exclude: expected at most 10,000")],
)
def test_what_cannot_be_excluded_is_said(store: Path, exclude: tuple[int, ...], expected: str) -> None:
    with Funnel.open(store) as funnel, pytest.raises(RequestError, match=expected):
        funnel.recommend(Request(1, 5, REQUEST.time_ms, REQUEST.context, exclude=exclude))


def test_changes_over_http_are_taken_as_they_are_and_counted() -> None:
    funnel = FakeFunnel()
    with Client(create_app(funnel)) as client:
        body = {"items": [{"item_id": 5, "on": False}, {"item_id": 6, "pacing": 0.5, "values": {"bid": 3}}]}
        response = client.post("/v1/items", json=body)
        assert response.status_code == 200
        assert response.json() == {"accepted": 2, "unknown_items": 1, "free_rows": 7}
        assert funnel.changed == [ItemChange(5, on=False), ItemChange(6, pacing=0.5, values={"bid": 3.0})]
        text = client.get("/metrics").text
        assert "prerank_items_changed_total 2.0" in text
        assert "prerank_items_unknown_total 1.0" in text


@pytest.mark.parametrize(
    ("content", "status", "expected"),
    [
        (
            '{"items": [{"item_id": 5, "onn": true}]}',
            422,
            "items[0].onn: unknown field, expected one of ['item_id', 'on'",
        ),
        ('{"items": [{"item_id": 5}, {"item_id": "5"}]}', 422, "items[1].item_id: expected"),
        ('{"items": [{"item_id": 5, "pacing": NaN}]}', 400, "body: expected one JSON object"),
        ("{", 400, "body: expected one JSON object"),
    ],
)
def test_a_body_that_is_wrong_is_said_in_a_sentence(content: str, status: int, expected: str) -> None:
    with Client(create_app(FakeFunnel())) as client:
        response = client.post("/v1/items", content=content)
        got, _, message = error_of(response)
        assert got == status
        assert expected in message


def test_the_example_of_the_docs_works(store: Path) -> None:
    with Funnel.open(store) as funnel, Client(create_app(funnel)) as client:
        path = client.get("/openapi.json").json()["paths"]["/v1/items"]["post"]
        example = path["requestBody"]["content"]["application/json"]["example"]
        assert client.post("/v1/items", json=example).json() == {"accepted": 1, "unknown_items": 0, "free_rows": 0}
        assert "/v1/items" in client.get("/docs").text
        schema = client.get("/openapi.json").json()["components"]["schemas"]["ItemsBody"]
        assert schema["properties"]["items"]["maxItems"] == MOST_CHANGES


def stream(**columns: pa.Array) -> bytes:
    table, sink = pa.table(columns), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


ARROW = {"content-type": "application/vnd.apache.arrow.stream"}


def test_changes_come_as_an_arrow_stream_too() -> None:
    funnel = FakeFunnel()
    content = stream(
        item_id=pa.array([5, 6, 7, 8], pa.int32()),
        on=pa.array([False, None, None, None]),
        pacing=pa.array([None, 0.5, None, None], pa.float32()),
        removed=pa.array([None, None, True, False]),
        values=pa.array([None, {"bid": 3, "cost": None}, None, {"bid": None, "cost": 1}]),
        columns=pa.array(
            [None, None, None, {"title": None, "tags": ["a"], "made": datetime.date(2026, 1, 2)}],
            pa.struct({"title": pa.string(), "tags": pa.list_(pa.string()), "made": pa.date32()}),
        ),
    )
    with Client(create_app(funnel)) as client:
        response = client.post("/v1/items", content=content, headers=ARROW)
        assert response.json() == {"accepted": 4, "unknown_items": 1, "free_rows": 7}
    assert funnel.changed == [
        ItemChange(5, on=False),
        ItemChange(6, pacing=0.5, values={"bid": 3.0}),
        ItemChange(7, removed=True),
        ItemChange(8, values={"cost": 1.0}, columns={"title": None, "tags": ["a"], "made": "2026-01-02"}),
    ]


@pytest.mark.parametrize(
    ("content", "status", "expected"),
    [
        (b"{}", 400, "body: expected an Arrow IPC stream"),
        (stream(item=pa.array([1])), 422, "item: unknown column, expected item_id int64, and any of on bool"),
        (stream(on=pa.array([True])), 422, "item_id: expected one in every row"),
        (stream(item_id=pa.array([1, None])), 422, "item_id: expected one in every row"),
        (stream(item_id=pa.array([2**63], pa.uint64())), 422, "item_id: expected int64, got uint64"),
        (stream(item_id=pa.array([1]), pacing=pa.array([["x"]])), 422, "pacing: expected double, got list"),
        (stream(item_id=pa.array([1]), values=pa.array([3.0])), 422, "values: expected a struct, got double"),
        (stream(item_id=pa.array([1]), values=pa.array([{"bid": "x"}])), 422, "bid: expected double, got string"),
    ],
)
def test_a_stream_that_is_wrong_is_said_in_a_sentence(content: bytes, status: int, expected: str) -> None:
    with Client(create_app(FakeFunnel())) as client:
        got, _, message = error_of(client.post("/v1/items", content=content, headers=ARROW))
        assert got == status
        assert expected in message


def test_a_hundred_thousand_bids_come_in_one_call(store: Path) -> None:
    with Funnel.open(store) as funnel, Client(create_app(funnel)) as client:
        best = next(iter(winners(funnel)))
        ids = [*range(10**6, 10**6 + 99_999), best]
        content = stream(item_id=pa.array(ids), values=pa.array([{"bid_micros": 5e9}] * len(ids)))
        told = client.post("/v1/items", content=content, headers=ARROW).json()
        assert told == {"accepted": 100_000, "unknown_items": 99_999, "free_rows": 0}
        assert winners(funnel)[best] == max(u for u in winners(funnel).values() if u is not None)
