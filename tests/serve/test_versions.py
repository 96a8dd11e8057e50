"""Versions that go live while another serves, under load."""

import gc
import itertools
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path

import httpx
import psutil
import pyarrow as pa
import pytest
import structlog

from prerank.bundle.registry import Registry
from prerank.errors import BundleError, RegistryError
from prerank.serve import watch as watching
from prerank.serve.device import DeviceEngine
from prerank.serve.device_buckets import Buckets
from prerank.serve.device_bundle import OnDevice
from prerank.serve.device_group import DeviceGroup
from prerank.serve.device_streams import CpuDevice
from prerank.serve.funnel import Funnel
from prerank.serve.http import create_app
from prerank.serve.live_version import LiveVersion
from prerank.serve.watch import VersionWatch
from prerank.stores.live import LiveUsers
from prerank.types import ItemChange, Request
from tests.serve import world
from tests.serve.client import Client
from tests.serve.conftest import publish_live
from tests.serve.fake import FakeFunnel
from tests.serve.server import listening

CONTEXT = {"hour": 1, "surface": "feed"}
BODY = {"user_id": 2, "k": 5, "context": CONTEXT, "deadline_ms": 30_000}
ASKED = Request(user_id=2, k=5, time_ms=world.UNTIL + 1, context=CONTEXT)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A store with two versions, of other titles, bids and weights; the first is live."""
    store = tmp_path_factory.mktemp("two") / "tiny"
    config = world.config(inventory={"slack": 4})
    first = str(Registry(publish_live(store, config)).live())
    table = world.items()
    table = table.set_column(table.column_names.index("title"), "title", [pa.array([f"second {n}" for n in range(8)])])
    bids = pa.array([1000 * (8 - n) for n in range(8)])
    table = table.set_column(table.column_names.index("bid_micros"), "bid_micros", [bids])
    second = str(Registry(publish_live(store, config, items=table, seed=7)).live())
    Registry(store).rollback(first, "a test", "the first serves first")
    return store, first, second


@pytest.fixture
def store(two: tuple[Path, str, str], tmp_path: Path) -> Path:
    return Path(shutil.copytree(two[0], tmp_path / "store"))


def promote(store: Path, version: str) -> None:
    Registry(store).promote(version, "a test", "")


def facts(store: Path, version: str) -> dict[int, tuple[str, float]]:
    """Of each item that wins: its title, and how probable a click of the user asked about is."""
    found: dict[int, tuple[str, float]] = {}
    with Funnel.open(store, version) as funnel:
        for wanted in range(100, 108):
            absent = tuple(one for one in range(100, 108) if one != wanted)
            winners = funnel.recommend(Request(2, 5, ASKED.time_ms, CONTEXT, exclude=absent)).winners
            found |= {one.item_id: (str(one.metadata["title"]), float(one.prob["click"] or 0)) for one in winners}
    return found


@contextmanager
def again_and_again(
    work: Callable[[httpx.Client, int], None], address: str, times: int
) -> Iterator[tuple[list[int], list[Future[None]]]]:
    """`times` threads that do it until this ends, and how often each did; raises what one of them raised."""
    over, done = threading.Event(), [0] * times

    def go(number: int) -> None:
        with httpx.Client(base_url=address, timeout=60) as http:
            while not over.is_set():
                work(http, number)
                done[number] += 1

    with ThreadPoolExecutor(times) as pool:
        running = [pool.submit(go, number) for number in range(times)]
        try:
            yield done, running
        finally:
            over.set()
        for one in running:
            one.result()


def under_load(store: Path, first: str, second: str, num_switches: int, device: OnDevice | None = None) -> None:
    known = {version: facts(store, version) for version in (first, second)}
    assert all(title.startswith("title") for title, _ in known[first].values())
    assert all(title.startswith("second") for title, _ in known[second].values())
    seen: set[str] = set()
    clock, sent = itertools.count(world.UNTIL + 1), itertools.count()

    def ask(http: httpx.Client, _: int) -> None:
        answer = http.post("/v1/recommend", json=BODY)
        assert answer.status_code == 200, answer.text
        body = answer.json()
        assert not body["degraded"], body["notes"]
        assert body["winners"]
        for winner in body["winners"]:
            title, prob = known[body["version"]][winner["item_id"]]
            assert winner["metadata"]["title"] == title
            assert winner["prob"]["click"] == pytest.approx(prob, abs=1e-3)
        seen.add(body["version"])

    def happen(http: httpx.Client, _: int) -> None:
        event = {"user_id": 1, "item_id": 100, "event": "is_click", "time_ms": next(clock)}
        said = http.post("/v1/events", json={"events": [event]})
        assert (said.status_code, said.json()["already_logged"]) == (200, 0)
        next(sent)
        time.sleep(0.005)

    def change(http: httpx.Client, number: int) -> None:
        item_id = 100 + number
        for is_on in (False, True):
            said = http.post("/v1/items", json={"items": [{"item_id": item_id, "on": is_on}]})
            assert said.status_code == 200, said.text
            winners = {one["item_id"] for one in http.post("/v1/recommend", json=BODY).json()["winners"]}
            assert is_on or item_id not in winners, "what was answered with 200 holds for every request after"

    me, rss = psutil.Process(), []
    with (
        closing(VersionWatch.open(store, poll_s=0.02, device=device)) as watch,
        listening(create_app(watch.live)) as address,
    ):
        watch.start()
        left: list[weakref.ref[object]] = []

        def is_done(num_switches: int, num_asked: int) -> bool:
            """Switched, what was left is gone, and some were answered since."""
            is_gone = all(one() is None for one in left)
            return watch.live.loads.switched == num_switches and is_gone and sum(asked) >= num_asked

        handles: list[tuple[int, int]] = []
        with (
            again_and_again(ask, address, 4) as (asked, askers),
            again_and_again(happen, address, 1) as (_, happening),
            again_and_again(change, address, 2) as (_, changing),
        ):

            def until(is_so: Callable[[], bool]) -> None:
                end = time.monotonic() + 60
                while not is_so():
                    for one in (*askers, *happening, *changing):
                        assert not one.done(), one.result()
                    assert time.monotonic() < end, watch.live.loads
                    time.sleep(0.005)

            gc.disable()  # what was left must go by itself
            try:
                for number in range(num_switches):
                    with watch.live.taken() as funnel:
                        assert isinstance(funnel, Funnel)
                        left += [weakref.ref(one) for one in (funnel, funnel.inventory, funnel._items, funnel._graph)]
                    del funnel
                    promote(store, (second, first)[number % 2])
                    until(partial(is_done, number + 1, sum(asked) + 8))
                    gc.collect()  # of what clients and server made meanwhile
                    rss.append(me.memory_info().rss)
                    handles.append((me.num_fds(), len([t for t in threading.enumerate() if "stage" not in t.name])))
            finally:
                gc.enable()
        assert watch.live.loads.failed == 0
        assert seen == {first, second}
        assert min(asked) >= num_switches
        for kind in zip(*handles, strict=True):
            assert max(kind[2:]) <= max(kind[:2]) + 2, f"files or threads grow: {handles}"
    settled = num_switches // 5
    assert max(rss[-settled:], default=0) < max(rss[:settled], default=0) + (32 << 20), "memory grows"
    with LiveUsers.open(store / "users.lmdb", store / "events.lmdb") as users:
        record = users.get(1)
    assert record is not None
    assert (record.time_ms > world.UNTIL).sum() == min(next(sent), 1000), "every event that was answered is there"


def test_versions_change_under_load_and_no_request_fails_or_is_of_two(store: Path, two: tuple[Path, str, str]) -> None:
    under_load(store, *two[1:], num_switches=8)


@pytest.mark.parametrize(("num", "whole"), [(1, False), (2, False), (1, True)])
def test_versions_change_on_devices_under_load_and_they_answer_every_request(
    two: tuple[Path, str, str], store: Path, num: int, whole: bool
) -> None:
    with ExitStack() as engines:
        each = [engines.enter_context(DeviceEngine(CpuDevice(str(at)), 2, wait_ms=0.1)) for at in range(num)]
        engine = each[0] if num == 1 else DeviceGroup(each)
        under_load(store, *two[1:], 5, OnDevice(engine, None, Buckets((4, 16), 64, 4), whole))
        counts = engine.snapshot()
        assert counts.requests > 50
        assert (counts.fallbacks, counts.eager, counts.restarts, counts.table_bytes) == (0, 0, 0, 0)


@pytest.mark.slow
def test_versions_change_under_load_a_hundred_times(store: Path, two: tuple[Path, str, str]) -> None:
    under_load(store, *two[1:], num_switches=100)


def test_a_rollback_under_load_loses_no_request_though_the_newest_is_damaged(
    store: Path, two: tuple[Path, str, str]
) -> None:
    """Damaged as a file that was copied over is: what serves has the old one mapped still."""
    promote(store, two[2])
    seen: set[str] = set()

    def ask(http: httpx.Client, _: int) -> None:
        answer = http.post("/v1/recommend", json=BODY)
        assert answer.status_code == 200, answer.text
        assert answer.json()["winners"]
        assert not answer.json()["degraded"]
        seen.add(answer.json()["version"])

    with closing(VersionWatch.open(store, poll_s=0.02)) as watch, listening(create_app(watch.live)) as address:
        watch.start()
        with again_and_again(ask, address, 4) as (asked, askers):

            def until(is_so: Callable[[], bool]) -> None:
                end = time.monotonic() + 60
                while not is_so():
                    for one in askers:
                        assert not one.done(), one.result()
                    assert time.monotonic() < end
                    time.sleep(0.005)

            until(lambda: min(asked) >= 2)
            scorer = Registry(store).path(two[2]) / "scorer.safetensors"
            content = bytearray(scorer.read_bytes())
            content[len(content) // 2] ^= 1
            beside = scorer.with_name("beside")
            beside.write_bytes(content)
            beside.replace(scorer)
            start = time.perf_counter()
            Registry(store).rollback(None, "a test", "it is damaged")
            assert time.perf_counter() - start < 1, "it is decided at once"
            until(lambda: watch.live.version == two[1])
            before = sum(asked)
            until(lambda: sum(asked) >= before + 8)
        assert seen == {two[1], two[2]}
        assert (watch.live.loads.switched, watch.live.loads.failed) == (1, 0)


def test_while_a_version_loads_the_one_before_answers(
    store: Path, two: tuple[Path, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loading, go_on = threading.Event(), threading.Event()

    def slowly(*given: object) -> Funnel:
        loading.set()
        assert go_on.wait(30)
        return opened(*given)  # type: ignore[arg-type]

    with closing(VersionWatch.open(store)) as watch, Client(create_app(watch.live)) as client:
        opened = watching._opened
        monkeypatch.setattr(watching, "_opened", slowly)
        promote(store, two[2])
        thread = threading.Thread(target=watch.look)
        thread.start()
        assert loading.wait(30)
        for _ in range(3):
            assert client.post("/v1/recommend", json=BODY).json()["version"] == two[1]
            assert client.get("/readyz").json()["version"] == two[1]
        go_on.set()
        thread.join()
        assert client.post("/v1/recommend", json=BODY).json()["version"] == two[2]
        assert client.get("/readyz").json()["version"] == two[2]
        lines = client.get("/metrics").text.splitlines()
        assert f'prerank_version{{version="{two[2]}"}} 1.0' in lines
        assert f'prerank_version{{version="{two[1]}"}} 1.0' not in lines
        assert 'prerank_version_loads_total{outcome="switched"} 1.0' in lines
        assert next(float(one.split()[1]) for one in lines if one.startswith("prerank_version_load_seconds ")) > 0


def test_a_request_that_does_not_end_keeps_its_version_and_holds_up_no_other(
    store: Path, two: tuple[Path, str, str]
) -> None:
    def kept() -> float:
        lines = client.get("/metrics").text.splitlines()
        return float(next(one for one in lines if one.startswith("prerank_versions_kept ")).split()[1])

    with closing(VersionWatch.open(store, leave_s=0.2)) as watch, Client(create_app(watch.live)) as client:
        with watch.live.taken() as stuck, structlog.testing.capture_logs() as logs:
            assert isinstance(stuck, Funnel)
            for number, version in enumerate((two[2], two[1], two[2]), start=1):
                promote(store, version)
                assert watch.look()
                assert client.post("/v1/recommend", json=BODY).json()["version"] == version
                assert watch.live.loads.switched == number
                assert kept() == 1, "the first; those after it were let go"
            assert not watch.look()
            assert stuck.recommend(ASKED).version == two[1], "what it uses is open"
        said = [(one["event"], one["version"]) for one in logs if "version is kept" in one["event"]]
        assert said == [("a version is kept, for a request that uses it does not end", two[1])]
        assert [one["version"] for one in logs if one["event"] == "a version was let go"] == [two[2], two[1]]
        with structlog.testing.capture_logs() as logs:
            assert not watch.look()
        assert logs == [{"event": "a version was let go", "log_level": "info", "version": two[1]}]
        assert kept() == 0
        left = weakref.ref(stuck)
        del stuck
        assert left() is None


def test_events_are_swept_only_when_no_version_is_kept_that_may_need_them(
    store: Path, two: tuple[Path, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    swept: list[str] = []
    monkeypatch.setattr(Funnel, "sweep", lambda funnel: swept.append(funnel.version) or 0)
    with closing(VersionWatch.open(store, leave_s=0.0)) as watch:
        assert swept == [two[1]]
        with watch.live.taken():
            promote(store, two[2])
            assert watch.look()
            assert not watch.look()
            assert swept == [two[1]]
        assert not watch.look()
        assert swept == [two[1], two[2]]
        assert not watch.look()
        assert len(swept) == 2


def whole(item_id: int, title: str, **said: object) -> ItemChange:
    columns = {"item_id": item_id, "genre": "genre 1", "bid_micros": 5000, "title": title}
    return ItemChange(item_id, columns=columns, **said)  # type: ignore[arg-type]


def test_what_changes_while_a_version_loads_holds_in_it_too(
    store: Path, two: tuple[Path, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(VersionWatch.open(store)) as watch:
        live, opened = watch.live, watching._opened
        live.change([ItemChange(100, on=False), ItemChange(105, on=False), ItemChange(102, pacing=2.0)])

        def meanwhile(*given: object) -> Funnel:
            funnel = opened(*given)  # type: ignore[arg-type]
            live.change([ItemChange(103, on=False), ItemChange(104, removed=True), ItemChange(102, pacing=0.5)])
            live.change([ItemChange(100, on=True, values={"bid_micros": 7e6}), whole(200, "came")])
            live.change([ItemChange(105, removed=True)])
            live.change([whole(105, "came again")])  # so it is on, though it was off when the version was opened
            return funnel

        monkeypatch.setattr(watching, "_opened", meanwhile)
        promote(store, two[2])
        assert watch.look()
        assert live.version == two[2]
        monkeypatch.undo()
        with live.taken() as funnel, Funnel.open(store) as anew:
            assert isinstance(funnel, Funnel)
            for number, one in enumerate((funnel, anew)):
                ids = [100, 102, 103, 104, 105, 200]
                rows = one.inventory.rows_of(ids)
                state = one.inventory._scorer.live
                on = {item_id: row >= 0 and bool(state.on[row]) for item_id, row in zip(ids, rows, strict=True)}
                assert on == {100: True, 102: True, 103: False, 104: False, 105: True, 200: True}, number
                assert float(state.pacing[rows[1]]) == 0.5
                assert float(state.value("bid_micros")[rows[0]]) == 7e6


def test_what_changes_just_before_the_switch_holds_too(store: Path, two: tuple[Path, str, str]) -> None:
    """When `settled` is called the version has caught up once."""
    changes = iter([[ItemChange(103, on=False)]])
    with closing(VersionWatch.open(store, settled=lambda: watch.live.change(next(changes)) and None)) as watch:
        promote(store, two[2])
        assert watch.look()
        assert next(changes, None) is None
        with watch.live.taken() as funnel:
            assert isinstance(funnel, Funnel)
            assert not funnel.inventory._scorer.live.on[funnel.inventory.rows_of([103])[0]]
        assert 103 not in {one.item_id for one in watch.live.recommend(ASKED).winners}


def test_the_version_before_ends_when_its_last_request_has(store: Path, two: tuple[Path, str, str]) -> None:
    with closing(VersionWatch.open(store)) as watch:
        promote(store, two[2])
        with watch.live.taken() as before:
            switching = threading.Thread(target=watch.look)
            switching.start()
            until = time.monotonic() + 60
            while watch.live.version != two[2]:
                assert time.monotonic() < until
                time.sleep(0.005)
            assert watch.live.recommend(ASKED).version == two[2]
            assert before.recommend(ASKED).version == two[1], "it answers until nobody uses it"
            assert switching.is_alive()
        switching.join(timeout=30)
        assert not switching.is_alive()
        assert isinstance(before, Funnel)
        with pytest.raises(AssertionError, match="closed"):
            before._users.get(1)


def test_a_version_that_is_damaged_is_not_switched_to_and_said_once(store: Path, two: tuple[Path, str, str]) -> None:
    with closing(VersionWatch.open(store)) as watch, Client(create_app(watch.live)) as client:
        promote(store, two[2])
        scorer = Registry(store).path(two[2]) / "scorer.safetensors"
        content = scorer.read_bytes()
        scorer.write_bytes(content[:-7])
        with structlog.testing.capture_logs() as logs:
            assert not watch.look()
            assert not watch.look(), "it is not loaded again each second"
        assert [(log["event"], log["version"]) for log in logs] == [
            ("a version that is live cannot be served; the one before serves on", two[2])
        ]
        assert "scorer.safetensors" in logs[0]["error"]
        assert client.post("/v1/recommend", json=BODY).json()["version"] == two[1]
        assert client.get("/readyz").status_code == 200
        assert 'prerank_version_loads_total{outcome="failed"} 1.0' in client.get("/metrics").text
        scorer.write_bytes(content)
        promote(store, two[1])
        assert not watch.look()
        promote(store, two[2])
        assert watch.look(), "the pointer moved, so it is tried again"
        assert client.post("/v1/recommend", json=BODY).json()["version"] == two[2]


def test_a_version_that_cannot_catch_up_is_not_switched_to(
    store: Path, two: tuple[Path, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise ValueError("a mistake of ours")

    with closing(VersionWatch.open(store)) as watch:
        monkeypatch.setattr(Funnel, "catch_up", fails)
        promote(store, two[2])
        with structlog.testing.capture_logs() as logs:
            assert not watch.look()
        assert isinstance(logs[0]["exc_info"], ValueError)
        assert watch.live.recommend(ASKED).version == two[1]
        assert watch.live.change([ItemChange(100, on=True)]).accepted == 1
        assert not watch.live.noted(), "nobody needs to know"


def test_a_pointer_that_is_damaged_leaves_what_serves(store: Path) -> None:
    with closing(VersionWatch.open(store)) as watch:
        (store / "live").write_text("no version\n")
        with structlog.testing.capture_logs() as logs:
            assert not watch.look()
            assert not watch.look()
        assert len(logs) == 1
        assert "expected one version id" in logs[0]["error"]
        assert watch.live.recommend(ASKED).winners


def test_a_server_that_could_not_load_is_ready_when_another_version_is_live(
    store: Path, two: tuple[Path, str, str]
) -> None:
    (Registry(store).path(two[1]) / "scorer.safetensors").write_bytes(b"")
    with closing(VersionWatch.open(store)) as watch, Client(create_app(watch.live)) as client:
        assert client.get("/readyz").status_code == 503
        assert client.post("/v1/recommend", json=BODY).status_code == 503
        assert not watch.look()
        promote(store, two[2])
        assert watch.look()
        assert client.get("/readyz").json()["version"] == two[2]
        assert client.post("/v1/recommend", json=BODY).status_code == 200


def test_both_versions_share_the_native_threads(store: Path, two: tuple[Path, str, str]) -> None:
    with closing(VersionWatch.open(store, workers=1)) as watch:
        with watch.live.taken() as funnel:
            assert isinstance(funnel, Funnel)
            first = funnel.engine
        promote(store, two[2])
        assert watch.look()
        with watch.live.taken() as funnel:
            assert isinstance(funnel, Funnel)
            assert funnel.engine is first
            assert funnel.ranks_by == watch.live.ranks_by
        assert watch.live.recommend(ASKED).winners, "closing the first left its engine open"


def test_nothing_live_is_said_at_once(store: Path) -> None:
    (store / "live").unlink()
    with pytest.raises(RegistryError, match="no version is live"):
        VersionWatch.open(store)


def test_a_live_version_without_one_raises_why() -> None:
    why = BundleError("scorer.safetensors: cut")
    live = LiveVersion(why)
    with pytest.raises(BundleError, match="cut"):
        live.recommend(ASKED)
    with pytest.raises(BundleError, match="cut"):
        _ = live.version
    fake = FakeFunnel()
    assert live.switch(fake, lambda ids: None) is None
    assert (live.error, live.version) == (None, fake.version)
