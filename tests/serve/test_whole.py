"""Funnels that answer whole requests on a device, here of a CPU: the answers of the host's stages, whatever changes."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prerank.errors import BundleError, NoRoom, NotOnDevice
from prerank.serve import device_bundle
from prerank.serve.answer import Answer
from prerank.serve.device import DeviceEngine
from prerank.serve.device_buckets import Buckets
from prerank.serve.device_bundle import OnDevice
from prerank.serve.device_group import DeviceGroup
from prerank.serve.device_retrieval import RetrievalReplica
from prerank.serve.device_streams import CpuDevice
from prerank.serve.device_version import DeviceVersion
from prerank.serve.funnel import Funnel
from prerank.serve.seen import Seen, begin, end
from prerank.serve.served import Served
from prerank.serve.trace_pages import narrowing
from prerank.serve.whole import Whole
from prerank.stores.live import LiveUsers
from prerank.types import ItemChange, Request
from tests.serve import spaces, test_tail, world
from tests.serve.cluster import running
from tests.serve.conftest import publish_live
from tests.serve.late_device import LateDevice, Lost
from tests.serve.test_generators import GENERATORS
from tests.serve.test_inventory import COLUMNS, LISTS, REQUEST, TARGETING

BUCKETS = Buckets((4, 16), 64, 4)
FAILED = "the device could not answer this request; the host's own stages did"
OLD, NEW = range(100, 100 + world.NUM_ITEMS), range(500, 506)


def published(store: Path, keep: int = 6, **changes: object) -> Path:
    retrieval = world.config().to_dict()["retrieval"]
    assert isinstance(retrieval, dict)
    options: dict[str, object] = {
        "inventory": {"slack": 60},
        "targeting": TARGETING,
        "diversity": {"genre": {"at_most": 3}},
        "retrieval": {**retrieval, "keep": keep},
    }
    return publish_live(store, world.config(**options | changes), LISTS)


@contextmanager
def on(*devices: CpuDevice, **options: object) -> Iterator[OnDevice]:
    with ExitStack() as ends:
        engines = [ends.enter_context(DeviceEngine(one, 2, wait_ms=0)) for one in devices]
        engine = engines[0] if len(engines) == 1 else ends.enter_context(DeviceGroup(engines))
        yield OnDevice(engine, None, BUCKETS, whole=True, **options)  # type: ignore[arg-type]


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


def assert_same(found: Answer, wanted: Answer) -> None:
    assert [one.item_id for one in found.winners] == [one.item_id for one in wanted.winners]
    assert [one.metadata for one in found.winners] == [one.metadata for one in wanted.winners]
    utility, expected = ([one.utility_micros for one in answer.winners] for answer in (found, wanted))
    assert utility == pytest.approx(expected, rel=1e-5)
    assert found.notes == wanted.notes
    assert not found.degraded


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


def test_what_a_lost_device_cannot_answer_the_host_does_and_it_comes_back_with_what_changed(
    store: Path, tmp_path: Path
) -> None:
    folder, device = shutil.copytree(store, tmp_path / "store"), LateDevice(threading.RLock())
    with DeviceEngine(device, 1, wait_ms=0) as engine:
        place = OnDevice(engine, None, BUCKETS, whole=True)
        with Funnel.open(store, workers=0) as host, Funnel.open(folder, workers=0, device=place) as funnel:
            version = funnel._on_device
            assert version is not None
            device.replay_error = device.capture_error = Lost("gone")
            wanted = host.recommend(REQUEST)
            answer = funnel.recommend(REQUEST)
            assert answer.notes == [*wanted.notes, FAILED]
            assert_same(replace(answer, notes=wanted.notes), wanted)
            assert engine.snapshot().fallbacks == 1
            assert engine.snapshot().restarts == 1
            funnel.change([ItemChange(500, columns={**COLUMNS, "countries": ["de", "zz"]})])
            assert funnel.recommend(REQUEST).winners[0].item_id == 500
            device.replay_error = device.capture_error = None
            for part in version.parts:
                assert isinstance(part, DeviceVersion)
                part._retry_at = 0.0
                part._revive()
            before = engine.snapshot().fallbacks
            answer = funnel.recommend(REQUEST)
            assert answer.winners[0].item_id == 500
            assert answer.notes == wanted.notes
            assert engine.snapshot().fallbacks == before


def test_of_several_devices_another_answers_for_one_that_is_lost(store: Path, tmp_path: Path) -> None:
    folder, devices = shutil.copytree(store, tmp_path / "store"), [LateDevice(threading.RLock(), name=n) for n in "ab"]
    with on(*devices) as place, Funnel.open(folder, workers=0, device=place) as funnel:
        wanted = funnel.recommend(REQUEST)
        devices[0].replay_error = devices[0].capture_error = Lost("gone")
        for _ in range(4):
            assert_same(funnel.recommend(REQUEST), wanted)
        funnel.change([ItemChange(500, columns=COLUMNS)])
        assert funnel.recommend(REQUEST).winners[0].item_id == 500
        assert place.engine.snapshot().fallbacks == 0
        devices[0].replay_error = devices[0].capture_error = None


def test_what_a_device_has_no_room_for_the_host_answers(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = device_bundle.retrieval_of
    monkeypatch.setattr(device_bundle, "retrieval_of", lambda *of: replace(right(*of), most_excluded=1, room=1))
    folder = shutil.copytree(store, tmp_path / "store")
    with on(CpuDevice()) as place, Funnel.open(folder, workers=0, device=place) as funnel:
        assert FAILED not in funnel.recommend(replace(REQUEST, exclude=(100,))).notes
        answer = funnel.recommend(replace(REQUEST, exclude=(100, 101)))
        assert FAILED in answer.notes
        assert not {100, 101} & {one.item_id for one in answer.winners}
        # of two values that are new there is room for the first; whoever asks by none of them is answered as ever
        funnel.change([ItemChange(500, columns={**COLUMNS, "banned": ["search", "elsewhere"]})])
        for surface, notes in {"feed": [], "elsewhere": [], "search": [FAILED]}.items():
            answer = funnel.recommend(replace(REQUEST, context={"hour": 1, "surface": surface}))
            assert answer.notes == notes
            assert (500 in {one.item_id for one in answer.winners}) == (surface == "feed")
        assert place.engine.snapshot().fallbacks == 2


def test_an_excluded_item_that_is_written_anew_as_it_is_asked_does_not_win(
    funnel: Funnel, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Whole.sought
    nowhere = torch.zeros(0, dtype=torch.int64)  # its row is no more what it was when it was looked up
    monkeypatch.setattr(Whole, "sought", lambda self, *of: replace(right(self, *of), excluded=nowhere))
    best = funnel.recommend(REQUEST).winners[0].item_id
    answer = funnel.recommend(replace(REQUEST, exclude=(best,)))
    assert best not in {one.item_id for one in answer.winners}
    assert FAILED in answer.notes


def test_where_a_device_is_late_the_candidates_are_ordered_by_similarity(
    funnel: Funnel, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait, right = threading.Event(), DeviceVersion.find
    monkeypatch.setattr(DeviceVersion, "find", lambda self, *of: wait.wait(60) and right(self, *of))
    try:
        answer = funnel.recommend(replace(REQUEST, deadline_ms=300.0))
    finally:
        wait.set()
    assert answer.degraded
    assert answer.winners
    assert {one.utility_micros for one in answer.winners} == {None}
    assert "whole_by_similarity took its place" in answer.notes[-1]
    assert [(one.name, one.num) for one in narrowing(answer.stages)] == [("items", 8), ("winners", 5)]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"generators": GENERATORS}, r"it has candidate generators beside its index \(dear, same_genre, chosen\)"),
        ({"retrieval": {"index": {"kind": "hnsw"}}}, "its index is hnsw in 1 shards, not exact in one"),
        ({"retrieval": {"index": {"shards": 2}}}, "its index is exact in 2 shards, not exact in one"),
        ({"serve": {"stages": {"rank": {"deadline_ms": 50.0}}}}, r"\[serve.stages\] limits rank, which would be one"),
    ],
)
def test_a_funnel_that_a_device_cannot_answer_whole_is_refused_and_says_why(
    tmp_path: Path, changes: dict[str, object], why: str
) -> None:
    retrieval = world.config().to_dict()["retrieval"]
    more = changes.get("retrieval", {})
    assert isinstance(retrieval, dict)
    assert isinstance(more, dict)
    store = published(tmp_path / "tiny", **changes | {"retrieval": retrieval | more})
    with on(CpuDevice()) as place:
        with pytest.raises(NotOnDevice, match=f"--device-whole: .*: {why}.*; leave --device-whole out"):
            Funnel.open(store, workers=0, device=place)
        assert place.engine.snapshot().table_bytes == 0


def test_where_some_items_are_not_resident_it_is_refused_too(tmp_path: Path) -> None:
    with (
        on(CpuDevice()) as place,
        pytest.raises(NotOnDevice, match=r"--device-whole: .*: not all of its items are resident; leave"),
    ):
        Funnel.open(test_tail.published(tmp_path / "tail"), workers=0, device=place)


def test_beside_index_hosts_it_is_refused_too(tmp_path: Path) -> None:
    store = tmp_path / "tiny"
    version = spaces.publish_space(store, 0, spaces.config())
    with (
        running(store, [version], 1, 1) as cluster,
        on(CpuDevice()) as place,
        pytest.raises(NotOnDevice, match=r"--device-whole: .*: index hosts retrieve; leave"),
    ):
        Funnel.open(store, workers=0, hosts=cluster.hosts, device=place)


@pytest.mark.parametrize(
    ("shifted", "says"),
    [
        (lambda rows, similarity, num: (rows, similarity, num + 1), "expected 8 eligible items, got 9"),
        (lambda rows, similarity, num: (rows, 1.01 * similarity, num), "expected similarity .* in place 0, got"),
        (
            lambda rows, similarity, num: (rows.index_fill(1, rows[0, :1] * 0, -1), similarity, num),
            "expected 6 candidates, got 5",
        ),
    ],
)
def test_a_version_that_finds_others_on_the_device_is_not_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shifted: object, says: str
) -> None:
    right = RetrievalReplica.find
    assert callable(shifted)
    monkeypatch.setattr(RetrievalReplica, "find", lambda self, *of: shifted(*right(self, *of)))
    store = published(tmp_path / "tiny", targeting={})
    with on(CpuDevice("cpu")) as place:
        with pytest.raises(BundleError, match=f"cpu finds others: golden user 0: {says}"):
            Funnel.open(store, workers=0, device=place)
        assert place.engine.snapshot().table_bytes == 0


def test_users_who_are_not_there_any_more_are_served_as_new_ones(
    funnel: Funnel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LiveUsers, "get", lambda self, user_id: None)
    assert any("served as a new user" in note for note in funnel.recommend(REQUEST).notes)
