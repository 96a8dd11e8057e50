"""Items that come, change and leave while a version serves."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import structlog
import torch

from prerank.errors import NoRoom, RequestError
from prerank.serve.funnel import Funnel
from prerank.serve.http import create_app
from prerank.stores.items import ItemStore
from prerank.types import Given, ItemChange, Request
from tests.serve import world
from tests.serve.client import Client
from tests.serve.conftest import publish_live

SLACK = 6
TARGETING = {
    "country": {"item": "countries", "user": "country"},
    "surface": {"item": "banned", "context": "surface", "excludes": True},
}
LISTS = pa.table({"countries": [["de"], None] * 4, "banned": [None, ["feed"]] * 4})
REQUEST = Request(user_id=1, k=5, time_ms=world.T0 + 10_000, context={"hour": 1, "surface": "search"})
COLUMNS: dict[str, Given] = {
    "item_id": 500,
    "genre": "genre 1",
    "bid_micros": 10**8,  # the ranker hardly believes in its item_id
    "title": "new",
    "countries": None,
    "banned": None,
}


@pytest.fixture(params=["float32", "bfloat16", "int8"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    plain = world.config().to_dict()["retrieval"]
    assert isinstance(plain, dict)
    config = world.config(
        inventory={"slack": SLACK},
        targeting=TARGETING,
        diversity={"genre": {"at_most": 3}},
        retrieval={**plain, "index": {"kind": "exact", "storage": request.param}, "keep": 20},
    )
    return publish_live(tmp_path / "tiny", config, LISTS)


@pytest.fixture
def funnel(store: Path) -> Iterator[Funnel]:
    with Funnel.open(store) as funnel:
        yield funnel


def winners(funnel: Funnel, request: Request = REQUEST) -> dict[int, float | None]:
    return {one.item_id: one.utility_micros for one in funnel.recommend(request).winners}


def new(item_id: int = 500, **columns: Given) -> ItemChange:
    return ItemChange(item_id, columns={**COLUMNS, "item_id": item_id, **columns})


def like(item_id: int) -> dict[str, Given]:
    """What the table says of a published item."""
    row = world.items().slice(item_id - 100, 1).to_pylist()[0]
    lists = LISTS.slice(item_id - 100, 1).to_pylist()[0]
    return {name: {**row, **lists}[name] for name in COLUMNS}


def test_an_item_that_comes_wins_with_its_metadata_and_one_that_leaves_does_not(funnel: Funnel) -> None:
    before = winners(funnel)
    told = funnel.change([new()])
    assert (told.accepted, told.unknown_items) == (1, 0)
    answer = funnel.recommend(REQUEST)
    assert answer.winners[0].item_id == 500
    assert answer.winners[0].metadata == {"title": "new", "genre": "genre 1"}
    assert funnel._items.num_items == world.NUM_ITEMS + 1
    funnel.change([ItemChange(500, removed=True)])
    assert winners(funnel) == before
    assert funnel._items.num_items == world.NUM_ITEMS


def test_an_item_written_again_as_it_was_is_worth_what_it_was(funnel: Funnel) -> None:
    before = winners(funnel)
    funnel.change([ItemChange(i, columns=like(i)) for i in before])
    after = winners(funnel)
    assert list(after) == list(before)
    assert list(after.values()) == pytest.approx(list(before.values()), rel=1e-3)
    assert funnel._items.num_items == world.NUM_ITEMS


def test_what_a_version_scores_anew_is_what_publishing_would(store: Path, tmp_path: Path) -> None:
    """The item side, the vector, the bits and the group of a new row are those of the same item in a version."""
    with Funnel.open(store) as funnel:
        scorer, items = funnel.inventory._bundle.scorer, funnel._items
        change = ItemChange(103, columns=like(103))
        funnel.change([change])
        (old,), (row,) = funnel.inventory.rows_of([102]), funnel.inventory.rows_of([103])
        assert (old, row) == (2, world.NUM_ITEMS)
        for tensor in scorer.item_side.tensors().values():
            assert torch.allclose(tensor[row], tensor[3], atol=1e-6)
        for column in items.features().values():
            assert torch.equal(column[row], column[3])
        assert torch.equal(scorer.diversity.codes[row], scorer.diversity.codes[3])
        bitmaps = scorer.targeting.bitmaps
        assert torch.equal(bitmaps[:, 0] >> row & 1, bitmaps[:, 0] >> 3 & 1)


def test_targeting_and_diversity_hold_for_an_item_that_came(funnel: Funnel) -> None:
    funnel.change([new(countries=["fr"], genre="new genre")])
    assert 500 not in winners(funnel)
    assert 500 in winners(funnel, replace(REQUEST, user_id=2))
    # a value that no item listed before
    funnel.change([new(countries=["de", "xx"], banned=["search"])])
    assert 500 not in winners(funnel)
    assert 500 in winners(funnel, replace(REQUEST, context={"hour": 1, "surface": "feed"}))
    funnel.change([new(n, genre="new genre", bid_micros=10**9) for n in (500, 501, 502, 503)])
    assert len({500, 501, 502, 503} & set(winners(funnel))) == 3


def test_a_new_item_of_a_known_group_takes_a_place_of_it(funnel: Funnel) -> None:
    funnel.change([new(n, genre="genre 0", bid_micros=10**9) for n in (500, 501, 502)])
    said = {w.item_id: w.metadata["genre"] for w in funnel.recommend(REQUEST).winners}
    assert sorted(i for i, genre in said.items() if genre == "genre 0") == [500, 501, 502]


def test_ties_go_to_the_smaller_item_id_wherever_its_row_is(funnel: Funnel) -> None:
    funnel.change([new(500), new(-7), new(90)])
    ids = [w for w in winners(funnel) if w in (500, -7, 90)]
    assert ids == sorted(ids)


def test_what_was_said_of_an_item_before_it_came_is_true_of_it(store: Path) -> None:
    with Funnel.open(store) as funnel:
        told = funnel.change([ItemChange(500, on=False), ItemChange(501, pacing=2.0)])
        assert told.unknown_items == 2
        funnel.change([new(500), new(501), new(502)])
        found = winners(funnel)
        assert 500 not in found
        assert found[501] == pytest.approx(2 * (found[502] or 0), rel=1e-3)
        funnel.change([ItemChange(500, on=True), ItemChange(502, values={"bid_micros": 0.0})])
        found = winners(funnel)
    with Funnel.open(store) as again:
        assert winners(again) == found


def test_an_item_that_a_later_version_cannot_read_is_left_out_and_the_others_come(store: Path) -> None:
    with ItemStore.open(store / "items.lmdb") as items:
        items.put([new(500), new(501, bid_micros="dear"), new(502), new(503, genre=["a", "list"]), new(504)])
    with structlog.testing.capture_logs() as logs, Funnel.open(store) as funnel:
        assert {500, 502, 504} <= set(winners(funnel))
        assert funnel.inventory.rows_of([501, 503]) == [-1, -1]
        assert funnel.inventory.num_free == SLACK - 3
    said = [one["error"] for one in logs if one["event"] == "an item that came is not as this version reads it"]
    assert [one.split(":")[0] for one in said] == ["item 501", "item 503"]


def test_changes_of_one_call_are_taken_in_their_order(funnel: Funnel) -> None:
    funnel.change([new(500), ItemChange(500, removed=True)])
    assert 500 not in winners(funnel)
    funnel.change([ItemChange(500, removed=True), new(500), ItemChange(500, on=False), ItemChange(500, on=True)])
    assert 500 in winners(funnel)


def test_an_item_of_the_past_that_came_is_known_to_histories(store: Path) -> None:
    with Funnel.open(store) as funnel:
        before = funnel.recommend(replace(REQUEST, user_id=2)).notes
        assert any("unknown items in history" in note for note in before)
        funnel.change([new(999)])
        after = funnel.recommend(replace(REQUEST, user_id=2)).notes
        assert not any("unknown items in history" in note for note in after)


def test_when_slack_runs_out_the_error_says_so_and_nothing_is_taken(funnel: Funnel) -> None:
    funnel.change([new(500 + n) for n in range(SLACK - 1)])
    before = winners(funnel)
    with pytest.raises(
        NoRoom, match=r"items: 2 of them need a row each, and of 6 rows of slack 1 are free; publish again"
    ):
        funnel.change([new(600), new(601), ItemChange(100, on=False)])
    assert winners(funnel) == before
    # rows that items left are given again
    for n in range(1, 20):
        funnel.change([new(500, bid_micros=n * 10**8)])
    assert funnel.inventory.num_free == 1


def test_a_row_that_is_read_is_not_given_away(funnel: Funnel) -> None:
    with funnel.inventory.readers.reading():
        for _ in range(SLACK):
            funnel.change([new(500)])
        with pytest.raises(NoRoom, match="0 are free"):
            funnel.change([new(500)])
    funnel.change([new(500)])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (ItemChange(1, columns={**COLUMNS, "genre": 3}), r"items\[1\].columns: genre: expected text.*, got 3"),
        (ItemChange(1, columns={"genre": "x"}), r"items\[1\].columns: expected a value, or null .*'bid_micros'"),
        (ItemChange(1, columns={**COLUMNS, "colour": 3}), r"items\[1\].columns: .*nothing reads \['colour'\]"),
        (ItemChange(1, columns={**COLUMNS, "countries": [[1]]}), "targeting.country.item"),
        (ItemChange(1, removed=True, on=True), r"items\[1\]: expected nothing beside removed, for the item is gone"),
    ],
)
def test_an_item_that_is_wrong_is_refused_and_nothing_is_taken(
    funnel: Funnel, change: ItemChange, expected: str
) -> None:
    before = winners(funnel)
    with pytest.raises(RequestError, match=expected):
        funnel.change([new(500), change])
    assert winners(funnel) == before
    assert funnel.inventory.num_free == SLACK


def test_a_version_without_slack_says_how_to_have_some(tmp_path: Path) -> None:
    with Funnel.open(publish_live(tmp_path / "tiny", world.config())) as funnel:
        with pytest.raises(NoRoom, match=r"of 0 rows of slack 0 are free; .* \[inventory\] slack"):
            funnel.change([ItemChange(500, columns={n: COLUMNS[n] for n in funnel.inventory.columns})])
        assert funnel.change([ItemChange(100, removed=True)]).unknown_items == 0
        assert 100 not in winners(funnel)


def test_a_reader_sees_an_item_once_and_whole_while_it_is_written_again_and_again(store: Path) -> None:
    """Of one item: worth and title belong together, whichever of its versions a request meets."""
    with Funnel.open(store) as funnel:
        done, wrong = threading.Event(), []

        def read() -> None:
            while not done.is_set():
                found = [w for w in funnel.recommend(REQUEST).winners if w.item_id == 500]
                for one in found:
                    number = int(str(one.metadata["title"]))
                    expected = one.prob["click"] * 1e8 * number + one.prob["like"] * 10  # type: ignore[operator]
                    if len(found) > 1 or not np.isclose(one.utility_micros or 0, expected, rtol=1e-4):
                        wrong.append((one, number))

        threads = [threading.Thread(target=read) for _ in range(2)]
        funnel.change([new(500, title="1", bid_micros=10**8)])
        for thread in threads:
            thread.start()
        number, until = 2, time.monotonic() + 60
        while number < 150 and time.monotonic() < until:
            try:
                funnel.change([new(500, title=str(number), bid_micros=10**8 * number)])
                number += 1
            except NoRoom:  # readers hold the rows that were left
                time.sleep(0.001)
        done.set()
        for thread in threads:
            thread.join()
        assert not wrong
        assert number == 150


def test_items_come_and_leave_over_http_and_no_room_is_507(store: Path) -> None:
    with Funnel.open(store) as funnel, Client(create_app(funnel)) as client:
        assert f"prerank_items_free_rows {SLACK}.0" in client.get("/metrics").text
        body = {"items": [{"item_id": 500, "columns": COLUMNS}, {"item_id": 100, "removed": True}]}
        assert client.post("/v1/items", json=body).json() == {"accepted": 2, "unknown_items": 0, "free_rows": SLACK - 1}
        assert 500 in winners(funnel)
        assert "prerank_items_free_rows 5.0" in client.get("/metrics").text
        many = {"items": [{"item_id": n, "columns": COLUMNS} for n in range(SLACK)]}
        response = client.post("/v1/items", json=many)
        assert response.status_code == 507
        assert response.json()["error"]["type"] == "NoRoom"
