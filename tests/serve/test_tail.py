"""Items that are not resident: fetched, ranked beside the others, and kept for a while."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prerank.bundle.load import load
from prerank.bundle.registry import Registry
from prerank.errors import DataError
from prerank.serve.funnel import Funnel
from prerank.serve.http import create_app
from prerank.serve.tail import Tail
from prerank.stores.live import LiveUsers
from prerank.stores.metadata import MetadataTable
from prerank.stores.redis_tail import RedisTail
from prerank.stores.tail import LmdbTail, Row, TailStore
from prerank.types import CandidateSet, Given, ItemChange, Request
from tests.serve import world
from tests.serve.client import Client
from tests.serve.conftest import publish_live
from tests.stores.redis_server import redis_server

COLUMNS = ["item_id", "genre", "bid_micros"]
REQUEST = Request(user_id=1, k=5, time_ms=world.T0 + 10_000, context={"hour": 1, "surface": "search"})
RESIDENT = 3  # of the dearest


class Shelf:
    """A store in memory that may be slow or fail."""

    def __init__(self, rows: Mapping[int, Row], wait_s: float = 0.0) -> None:
        self.rows, self.wait_s, self.asked = dict(rows), wait_s, []
        self.error: DataError | None = None

    def get(self, item_ids: Sequence[int]) -> list[Row | None]:
        self.asked += [list(item_ids)]
        time.sleep(self.wait_s)
        if self.error is not None:
            raise self.error
        return [self.rows.get(one) for one in item_ids]

    def close(self) -> None: ...


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def rows() -> dict[int, Row]:
    return {row["item_id"]: {name: row[name] for name in COLUMNS} for row in world.items().to_pylist()}


def published(store: Path, resident: bool = True, **inventory: Given) -> Path:
    options: dict[str, object] = {"slack": 4, "cached": 16, "fetch_ms": 2000.0, **inventory}
    if resident:
        options["resident"] = {"top": RESIDENT, "by": "bid_micros"}
    retrieval = world.config().to_dict()["retrieval"]
    assert isinstance(retrieval, dict)
    publish_live(store, world.config(inventory=options, retrieval={**retrieval, "keep": 20}))
    LmdbTail.write(store / "tail.lmdb", world.items(), "item_id", COLUMNS)
    return store


def opened(store: Path, tail: TailStore) -> Funnel:
    live = Registry(store).live()
    assert live is not None
    path = store / "versions" / live
    users = LiveUsers.open(store / "users.lmdb", store / "events.lmdb")
    return Funnel(load(path), users, MetadataTable.open(path / "metadata.arrow"), tail=tail)


def answer(funnel: Funnel, request: Request = REQUEST) -> dict[int, float | None]:
    return {one.item_id: one.utility_micros for one in funnel.recommend(request).winners}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published(tmp_path_factory.mktemp("tail") / "tiny")


@pytest.fixture(params=["lmdb", "redis"])
def funnel(request: pytest.FixtureRequest, store: Path, tmp_path: Path) -> Iterator[Funnel]:
    if request.param == "lmdb":
        with Funnel.open(store) as funnel:
            yield funnel
        return
    pytest.importorskip("redis")
    with redis_server(tmp_path) as url:
        RedisTail.open(url, "tiny", 5.0).write(world.items(), "item_id", COLUMNS)
        with Funnel.open(store, tail=url) as funnel:
            yield funnel


def test_the_winners_are_those_of_a_version_that_holds_every_item(funnel: Funnel, tmp_path: Path) -> None:
    items = funnel._items
    assert (items.num_resident, items.num_slots, items.num_rows) == (RESIDENT, RESIDENT + 4 + 16, world.NUM_ITEMS + 4)
    with Funnel.open(published(tmp_path / "whole", resident=False)) as whole:
        for user in (1, 2, 3, 9):
            expected = answer(whole, replace(REQUEST, user_id=user))
            got = answer(funnel, replace(REQUEST, user_id=user))
            assert list(got) == list(expected)
            assert list(got.values()) == pytest.approx(list(expected.values()), rel=1e-3)


def test_what_is_resident_is_the_dearest_and_the_rest_is_in_no_answer_without_a_store(store: Path) -> None:
    shelf = Shelf({})
    with opened(store, shelf) as funnel:
        told = funnel.recommend(REQUEST)
        assert {one.item_id for one in told.winners} == {105, 106, 107}
        assert "5 candidates are not resident and were not fetched in time, and could not win" in told.notes
        assert funnel.tail_counts["unknown"] == 5


def test_a_second_request_fetches_nothing(store: Path) -> None:
    shelf = Shelf(rows())
    with opened(store, shelf) as funnel:
        first = answer(funnel)
        assert answer(funnel) == first
        assert [sorted(asked) for asked in shelf.asked] == [[100, 101, 102, 103, 104]]
        assert funnel.tail_counts == {
            **dict.fromkeys(("host", "late", "unknown", "failed", "full"), 0),
            "store": 5,
            "slot": 5,
        }
        stages = {one.name: (one.num_in, one.num_out) for one in funnel.recommend(REQUEST).stages}
        assert stages["fetch_tail"] == (8, 8)


def test_a_late_fetch_drops_the_tail_says_so_and_is_there_for_the_next_request(tmp_path: Path) -> None:
    shelf = Shelf(rows(), wait_s=0.3)
    with opened(published(tmp_path / "tiny", fetch_ms=20.0), shelf) as funnel:
        funnel.recommend(REQUEST)
        start = time.perf_counter()
        told = funnel.recommend(replace(REQUEST, user_id=2))
        assert time.perf_counter() - start < 0.25
        assert {one.item_id for one in told.winners} <= {105, 106, 107}
        assert any("not fetched in time" in note for note in told.notes)
        assert funnel.tail_counts["late"] == 10
        time.sleep(0.7)
        assert len(answer(funnel)) == 5
        assert funnel.tail_counts["host"] == 5


def test_a_store_that_fails_costs_the_tail_alone(store: Path) -> None:
    shelf = Shelf(rows())
    shelf.error = DataError("gone")
    with opened(store, shelf) as funnel:
        assert set(answer(funnel)) == {105, 106, 107}
        assert funnel.tail_counts["failed"] == 5
        shelf.error = None
        assert len(answer(funnel)) == 5


def test_one_row_that_cannot_be_read_costs_no_other(store: Path) -> None:
    shelf = Shelf({**rows(), 100: {"genre": ["no", "name"]}})
    with opened(store, shelf) as funnel:
        told = funnel.recommend(REQUEST)
        assert "1 candidates are not resident and were not fetched in time, and could not win" in told.notes
        assert funnel.tail_counts["failed"] == 1


def test_what_was_fetched_grows_stale_and_is_fetched_again(store: Path) -> None:
    shelf, clock = Shelf(rows()), Clock()
    with opened(store, shelf) as funnel:
        bundle = funnel.inventory._bundle
        tail = Tail(bundle, shelf, funnel.inventory.readers, clock)
        everyone = CandidateSet(torch.arange(8)[None], torch.ones(1, 8), torch.ones(1, 8, dtype=torch.bool))
        assert bool((tail.locate(everyone).slots >= 0).all())
        clock.now = 299.0
        tail.locate(everyone)
        assert len(shelf.asked) == 1
        clock.now = 301.0
        assert bool((tail.locate(everyone).slots >= 0).all())
        assert len(shelf.asked) == 2
        assert tail.evictions() == {"stale": 5, "room": 0}
        tail.close()


def test_with_fewer_slots_than_items_those_used_least_lately_go_and_no_request_reads_anothers(tmp_path: Path) -> None:
    """Four slots for five items: whichever a request gets, what it computes is its own items'."""
    with Funnel.open(published(tmp_path / "whole", resident=False)) as whole:
        expected = {user: answer(whole, replace(REQUEST, user_id=user, k=5)) for user in (1, 2, 3)}
        every = {
            user: {
                w.item_id: w.utility_micros
                for w in whole.recommend(replace(REQUEST, user_id=user, exclude=tuple(expected[user]))).winners
            }
            | expected[user]
            for user in (1, 2, 3)
        }
    shelf, wrong = Shelf(rows()), []
    with opened(published(tmp_path / "few", cached=4), shelf) as funnel:

        def ask(user: int) -> None:
            for turn in range(60):
                without = (100 + turn % 5, 100 + (turn + user) % 5)
                for item, utility in answer(funnel, replace(REQUEST, user_id=user, exclude=without)).items():
                    if utility != pytest.approx(every[user][item], rel=1e-3):
                        wrong.append((user, item, utility, every[user][item]))

        threads = [threading.Thread(target=ask, args=(user,)) for user in (1, 2, 3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert funnel.tail_evictions["room"] > 0
        assert funnel.tail_counts["full"] > 0
        assert funnel.tail_counts["host"] > 0
        assert funnel.tail_counts["slot"] > 0


def test_an_item_of_the_tail_that_is_changed_is_resident_from_then_on(store: Path) -> None:
    shelf = Shelf({})
    with opened(store, shelf) as funnel:
        columns = {**rows()[101], "bid_micros": 10**8, "title": "now here"}
        funnel.change([ItemChange(101, columns=columns)])
        told = funnel.recommend(REQUEST)
        assert told.winners[0].item_id == 101
        assert told.winners[0].metadata["title"] == "now here"


def test_a_users_past_in_the_tail_is_known(store: Path) -> None:
    """User 1 saw 100 to 104, none of which is resident."""
    with opened(store, Shelf({})) as funnel:
        assert not any("unknown items in history" in note for note in funnel.recommend(REQUEST).notes)


def test_a_version_with_a_tail_and_no_store_is_refused(store: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a Redis that answers"):
        Funnel.open(store, tail="redis://127.0.0.1:1/0")
    copy = published(tmp_path / "tiny")
    (copy / "tail.lmdb").unlink()
    with pytest.raises(DataError, match=r"tail.lmdb: expected the items that are not in memory"):
        Funnel.open(copy)


def test_hit_rates_are_metrics(store: Path) -> None:
    with opened(store, Shelf(rows())) as funnel, Client(create_app(funnel)) as client:
        answer(funnel)
        answer(funnel)
        text = client.get("/metrics").text
        assert 'prerank_tail_candidates_total{outcome="store"} 5.0' in text
        assert 'prerank_tail_candidates_total{outcome="slot"} 5.0' in text


def test_a_funnel_that_is_closed_leaves_nothing_that_refers_to_itself(store: Path) -> None:
    """A server freezes what it has loaded, and frozen garbage is never looked for: it would stay for good."""

    def use() -> None:
        with Funnel.open(store) as funnel:
            assert answer(funnel)
            assert funnel.tail_counts["store"]

    use()  # what is made once
    gc.collect()
    gc.disable()
    try:
        use()
        assert gc.collect() < 20
    finally:
        gc.enable()
