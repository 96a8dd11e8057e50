"""Funnels that answer whole requests on a device, here of a CPU: the answers of the host's stages, whatever changes."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prerank.errors import NoRoom
from prerank.serve.answer import Answer
from prerank.serve.device_streams import CpuDevice
from prerank.serve.funnel import Funnel
from prerank.serve.seen import Seen, begin, end
from prerank.serve.served import Served
from prerank.serve.trace_pages import narrowing
from prerank.stores.live import LiveUsers
from prerank.types import ItemChange, Request
from tests.serve import world
from tests.serve.test_inventory import COLUMNS, REQUEST
from tests.serve.whole import assert_same, on, published

OLD, NEW = range(100, 100 + world.NUM_ITEMS), range(500, 506)


@dataclass(frozen=True)
class Pair:
    """The same version twice, each with a store of its own: as the host answers, and as a device does."""

    host: Funnel
    device: Funnel

    def both(self, changes: list[ItemChange]) -> None:
        """Tell both; one that has no room for them has none in the other either."""
        is_full = []
        for one in (self.host, self.device):
            try:
                one.change(changes)
                is_full.append(False)
            except NoRoom:
                is_full.append(True)
        assert is_full[0] == is_full[1]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published(tmp_path_factory.mktemp("whole") / "tiny")


@pytest.fixture(scope="module", params=["one", "two"])
def pair(request: pytest.FixtureRequest, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folders = [shutil.copytree(store, tmp_path_factory.mktemp("pair") / "store") for _ in range(2)]
    devices = [CpuDevice(name) for name in ("a", "b")[: 1 if request.param == "one" else 2]]
    with (
        on(*devices) as place,
        Funnel.open(folders[0], workers=0) as host,
        Funnel.open(folders[1], workers=0, device=place) as device,
    ):
        yield Pair(host, device)
        counts = place.engine.snapshot()
        assert (counts.fallbacks, counts.eager, counts.restarts) == (0, 0, 0)


@pytest.fixture
def funnel(store: Path, tmp_path: Path) -> Iterator[Funnel]:
    folder = shutil.copytree(store, tmp_path / "store")
    with on(CpuDevice()) as place, Funnel.open(folder, workers=0, device=place) as funnel:
        yield funnel


def logged(funnel: Funnel, request: Request) -> tuple[Answer, Served]:
    """The answer to a request of which the log keeps a row, and what it keeps."""
    seen = Seen(request.request_id, is_logged=True)
    token = begin(seen)
    try:
        answer = funnel.recommend(request)
    finally:
        end(token)
    assert seen.served is not None
    return answer, seen.served


LISTED = st.lists(st.sampled_from(["de", "fr", "xx", "yy"]), max_size=2, unique=True)
COMING = st.builds(
    lambda item_id, genre, bid, countries, banned: ItemChange(
        item_id,
        columns={
            **COLUMNS,
            "item_id": item_id,
            "genre": f"genre {genre}",
            "bid_micros": bid,
            "countries": countries,  # type: ignore[dict-item]
            "banned": banned,
        },
    ),
    st.sampled_from([*OLD[:3], *NEW]),
    st.integers(0, 3),
    st.sampled_from([10**3, 10**7, 10**8]),
    LISTED,
    st.sampled_from([None, ["feed"], ["search"], ["elsewhere"]]),
)
LIVE = st.builds(
    ItemChange,
    st.sampled_from([*OLD, *NEW]),
    on=st.sampled_from([True, False, None]),
    pacing=st.sampled_from([0.0, 0.5, 1.0]),
)
LEAVING = st.builds(ItemChange, st.sampled_from([*OLD[5:], *NEW]), removed=st.just(True))
ASKED = st.builds(
    Request,
    user_id=st.sampled_from([1, 2, 3, 999]),
    k=st.integers(1, 5),
    time_ms=st.just(world.T0 + 10_000),
    context=st.fixed_dictionaries({"hour": st.just(1), "surface": st.sampled_from(["feed", "search", "elsewhere"])}),
    exclude=st.lists(st.sampled_from([*OLD, *NEW, 12345]), max_size=4).map(tuple),
)


@settings(max_examples=60)
@given(st.lists(st.one_of(COMING, LIVE, LEAVING), max_size=3), st.lists(ASKED, min_size=1, max_size=3))
def test_whatever_changed_before_it_is_asked_a_device_answers_as_the_host(
    pair: Pair, changes: list[ItemChange], requests: list[Request]
) -> None:
    if changes:
        pair.both(changes)
    for request in requests:
        found, wanted = (one.recommend(request) for one in (pair.device, pair.host))
        assert_same(found, wanted)
        assert not set(request.exclude) & {one.item_id for one in found.winners}
        assert "whole" in {one.name for one in found.stages}
        (answer, of_device), (_, of_host) = (logged(one, request) for one in (pair.device, pair.host))
        assert_same(answer, wanted)
        assert of_device.num_candidates == of_host.num_candidates
        assert torch.equal(of_device.lost_item_ids, of_host.lost_item_ids)
        assert torch.allclose(of_device.lost_similarity, of_host.lost_similarity, rtol=1e-5)


def test_one_stage_is_in_the_place_of_three_and_the_trace_tells_it(funnel: Funnel) -> None:
    answer = funnel.recommend(REQUEST)
    names = {one.name for one in answer.stages}
    assert names == {"expand_user", "expand_targeting", "prepare_user", "whole", "describe"}
    assert [(one.name, one.num) for one in narrowing(answer.stages)] == [("items", 8), ("winners", 5)]
    funnel.look_up_in(funnel._users)
    assert {one.name for one in funnel.recommend(REQUEST).stages} == names


def test_without_targeting_and_where_all_items_are_kept_it_is_the_same(tmp_path: Path) -> None:
    folders = [published(tmp_path / name, keep=20, targeting={}) for name in "ab"]
    with (
        on(CpuDevice()) as place,
        Funnel.open(folders[0], workers=0) as host,
        Funnel.open(folders[1], workers=0, device=place) as device,
    ):
        for exclude in ((), (100, 104)):
            request = replace(REQUEST, exclude=exclude)
            assert_same(device.recommend(request), host.recommend(request))
        come = {name: value for name, value in COLUMNS.items() if name not in ("countries", "banned")}
        for one in (host, device):
            one.change([ItemChange(500, columns=come), ItemChange(103, on=False)])
        assert_same(device.recommend(REQUEST), host.recommend(REQUEST))
        assert device.recommend(REQUEST).winners[0].item_id == 500


def test_requests_at_once_know_of_every_item_that_came_before_them(funnel: Funnel) -> None:
    over, failed = threading.Event(), list[str]()

    def ask() -> None:
        while not over.is_set():
            answer = funnel.recommend(REQUEST)
            failed.extend(answer.notes)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for one in threads:
        one.start()
    try:
        for number in range(30):
            item_id = NEW[number % len(NEW)]
            funnel.change([ItemChange(item_id, columns={**COLUMNS, "item_id": item_id})])
            assert item_id in {one.item_id for one in funnel.recommend(REQUEST).winners}
            funnel.change([ItemChange(item_id, removed=True)])
            assert item_id not in {one.item_id for one in funnel.recommend(REQUEST).winners}
    finally:
        over.set()
        for one in threads:
            one.join()
    assert failed == []


def test_users_who_are_not_there_any_more_are_served_as_new_ones(
    funnel: Funnel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LiveUsers, "get", lambda self, user_id: None)
    assert any("served as a new user" in note for note in funnel.recommend(REQUEST).notes)
