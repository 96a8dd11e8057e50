"""Several devices as one engine: the scorer's answers, from whichever would be done first, and whichever are lost."""

import threading
import time
from contextlib import ExitStack

import pytest
import torch

from prerank.errors import BundleError, DeviceBusy, DeviceFailed, DeviceFull
from prerank.serve.device import DeviceEngine
from prerank.serve.device_buckets import Buckets
from prerank.serve.device_bundle import OnDevice
from prerank.serve.device_group import DeviceGroup
from prerank.serve.device_streams import CpuDevice
from prerank.serve.device_times import Times
from prerank.serve.device_version import DeviceVersion
from prerank.serve.funnel import Funnel
from prerank.serve.graph import Deadline
from prerank.serve.http import create_app
from prerank.types import CandidateSet, ItemChange
from tests.serve.client import Client
from tests.serve.late_device import LateDevice, Lost
from tests.serve.test_device import NUM_ITEMS, asked, load, same, user, world
from tests.serve.test_device_changes import in_threads
from tests.serve.test_device_funnel import said


def late(name):
    return LateDevice(threading.RLock(), name=name)


@pytest.fixture
def group():
    """A group of these devices, and what ends with the test."""
    with ExitStack() as ends:

        def opened(*devices, workers=1, wait_ms=0.0):
            return ends.enter_context(DeviceGroup([DeviceEngine(one, workers, wait_ms) for one in devices]))

        yield opened


@pytest.fixture
def alike(monkeypatch):
    """Every batch is taken to need a second."""
    monkeypatch.setattr(Times, "own_s", lambda self, num: 1.0)
    monkeypatch.setattr(Times, "share_s", lambda self, num: 1.0)


def lose(*devices):
    for one in devices:
        one.replay_error = one.capture_error = Lost("gone")


def mend(*devices):
    for one in devices:
        one.replay_error = one.capture_error = None


@pytest.mark.parametrize("kind", [CpuDevice, late])
def test_every_request_is_answered_as_the_scorer_would_whichever_device_has_it(group, kind, alike):
    model, engine = world(), group(kind("a"), kind("b"), workers=2, wait_ms=2)
    version = load(engine, model)
    requests = [(asked(num, num), num % 21, user(num / 10)) for num in (1, 40, 100, 128, 300, 0, 7, 256, 31, 64)]
    futures = [version.submit(side, those, k) for those, k, side in requests]
    for future, (those, k, side) in zip(futures, requests, strict=True):
        assert same(future.result(30), model.rank(side, those, k))
    each = engine.snapshots()
    assert min(one.requests for one in each.values()) > 0
    assert sum(one.requests for one in each.values()) == engine.snapshot().requests == 10
    assert engine.snapshot().sizes == {0: 1, 256: 8, 512: 1}
    assert engine.snapshot().table_bytes == 2 * each["a"].table_bytes
    assert version.name == "a,b"


def test_a_request_goes_where_it_will_be_done_first(group, alike):
    engine = group(CpuDevice("slow"), CpuDevice("fast"), wait_ms=60_000)  # what is put in waits for company
    version = load(engine, world())
    version.parts[0].own_s = lambda num: 2.5
    futures, went = [], []
    for number in range(5):  # a batch of four would leave
        before = engine.snapshots()
        futures.append(version.submit(user(0.0), asked(40, number), 5))
        went += [name for name, one in engine.snapshots().items() if one.waiting > before[name].waiting]
    # slow would be done after 2.5 s, fast after 1; then 2.5 or 2; 2.5 or 3; 3.5 or 3; 3.5 or 4
    assert went == ["fast", "fast", "slow", "fast", "slow"]
    for future in futures:
        future.cancel()


def test_a_request_that_would_be_late_on_each_is_refused_and_by_one_only(group, alike):
    engine = group(CpuDevice("a"), CpuDevice("b"))
    version = load(engine, world())
    now = time.perf_counter()
    with pytest.raises(DeviceBusy, match="would pass first"):
        version.submit(user(0.0), asked(40), 5, Deadline(now, 900.0))
    assert engine.snapshot().refused == 1
    assert version.submit(user(0.0), asked(40), 5, Deadline(now, 60_000.0)).result(30).valid.any()


def test_one_lost_device_leaves_the_others_serving_and_none_of_its_requests_fails(group, alike):
    model, devices = world(), [late("a"), late("b")]
    engine = group(*devices)
    version = load(engine, model)  # without a fallback
    lose(devices[0])
    for number in range(6):
        future = version.submit(user(0.0), asked(40, number), 5)
        assert same(future.result(30), model.rank(user(0.0), asked(40, number), 5))
    each = engine.snapshots()
    assert (each["a"].requests, each["b"].requests, each["a"].restarts) == (0, 6, 1)
    assert engine.snapshot().fallbacks == 0


def test_a_device_that_is_back_is_asked_again_and_knows_what_changed_meanwhile(group, alike):
    model, devices = world(), [late("a"), late("b")]
    engine = group(*devices)
    version = load(engine, model, retry_s=0.01)
    lose(devices[0])
    assert version.submit(user(0.0), asked(40), 5).result(30).valid.any()
    best = int(model.rank(user(0.0), asked(40), 1).rows[0, 0])
    model.live.change([best], [ItemChange(0, on=False)])
    version.put(torch.tensor([best]))
    mend(devices[0])
    until = time.monotonic() + 30
    while not engine.snapshots()["a"].requests:
        assert time.monotonic() < until
        assert same(version.submit(user(0.0), asked(40), 5).result(30), model.rank(user(0.0), asked(40), 5))
    assert best not in version.parts[0].submit(user(0.0), asked(40), 5).result(30).rows


def test_where_all_are_lost_the_fallback_answers_or_the_error_says_so(group, alike):
    model, devices = world(), [late("a"), late("b")]
    engine = group(*devices)
    with_one, without = load(engine, model, fallback=model.rank), load(engine, model)
    lose(*devices)
    for _ in range(3):
        assert same(with_one.submit(user(0.0), asked(40), 5).result(30), model.rank(user(0.0), asked(40), 5))
    assert engine.snapshot().fallbacks == 3
    with pytest.raises(DeviceFailed, match="the device failed: gone"):
        without.submit(user(0.0), asked(40), 5).result(30)
    with pytest.raises(DeviceFailed, match=r"lost, and (none is|is not) back yet"):
        without.submit(user(0.0), asked(40), 5).result(30)
    mend(*devices)


def test_devices_are_lost_and_back_while_items_change_and_every_answer_is_right(group):
    model, devices = world(), [late("a"), late("b"), late("c")]
    engine = group(*devices, workers=2)
    version, changing = load(engine, model, fallback=model.rank, retry_s=0.01), threading.Lock()
    generator = torch.Generator().manual_seed(1)

    def ask(number):
        with changing:
            those = asked(40 + number, number)
            wanted, future = model.rank(user(0.0), those, 9), version.submit(user(0.0), those, 9)
            assert same(future.result(60), wanted)

    def lose_and_mend():
        for turn in range(30):
            lose(devices[turn % 3])
            ask(0)
            with changing:
                rows = torch.randint(NUM_ITEMS, (5,), generator=generator).unique()
                model.live.change(rows.tolist(), [ItemChange(0, on=turn % 2 == 0) for _ in rows])
                version.put(rows)
            ask(1)
            mend(devices[turn % 3])

    in_threads(3, ask, lose_and_mend)
    assert engine.snapshot().restarts > 0
    assert engine.snapshot().requests > 60


def test_a_request_that_nobody_waits_for_is_not_computed(group):
    engine = group(CpuDevice("a"), CpuDevice("b"), wait_ms=200)
    version = load(engine, world())
    assert version.submit(user(0.0), asked(40), 5).cancel()
    version.close()
    assert engine.snapshot().requests == 0
    with pytest.raises(DeviceFailed, match="left the device"):
        version.submit(user(0.0), asked(40), 5)


def test_several_requests_of_one_call_spread_over_the_devices(group, alike):
    model, rows = world(), torch.cat([asked(40, n).rows for n in range(6)])
    candidates, sides = CandidateSet(rows, rows.float(), rows >= 0), {"u": torch.arange(6.0)}
    engine = group(CpuDevice("a"), CpuDevice("b"), wait_ms=50)
    version = load(engine, model)
    assert same(version.rank(sides, candidates, 5), model.rank(sides, candidates, 5))
    assert [one.requests for one in engine.snapshots().values()] == [3, 3]


def test_a_version_that_one_device_has_no_room_for_is_on_none(group):
    engine = group(CpuDevice("a"), LateDevice(threading.RLock(), free=10, name="b"))
    with pytest.raises(DeviceFull):
        load(engine, world())
    assert (engine.snapshot().table_bytes, engine.snapshot().buffer_bytes) == (0, 0)


def test_each_device_is_held_against_the_golden_answers(store, group, monkeypatch):
    right = DeviceVersion.probs
    monkeypatch.setattr(DeviceVersion, "probs", lambda self, *of: right(self, *of) + (self.name == "b"))
    engine = group(CpuDevice("a"), CpuDevice("b"))
    with pytest.raises(BundleError, match="the kernels of b are far off"):
        Funnel.open(store, workers=0, device=OnDevice(engine, None, Buckets((16,))))
    assert engine.snapshot().table_bytes == 0


def test_a_server_on_several_devices_answers_as_one_without_and_tells_of_each(store, group):
    engine = group(CpuDevice("a"), CpuDevice("b"))
    place = OnDevice(engine, None, Buckets((4, 16), 64, 4))
    with Funnel.open(store, workers=0) as host, Funnel.open(store, workers=0, device=place) as funnel:
        assert said(funnel) == said(host)
        best = said(funnel)[0][0]
        funnel.change([ItemChange(best, on=False)])
        assert best not in dict(said(funnel))
        with Client(create_app(funnel, device=place)) as client:
            text = client.get("/metrics").text
    assert 'prerank_ranks_by{level="a,b"} 1.0' in text
    assert 'prerank_device_restarts_total{device="b"} 0.0' in text
