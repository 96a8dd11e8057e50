"""Funnels whose winners are ranked by the device engine, here of a CPU: the answers of the scorer, whatever changes."""

import threading
from dataclasses import replace

import pytest
import torch

from prerank.errors import BundleError, DeviceFull
from prerank.serve.device import DeviceEngine
from prerank.serve.device_buckets import COMMON, Buckets
from prerank.serve.device_bundle import OnDevice
from prerank.serve.device_replica import Replica
from prerank.serve.device_streams import CpuDevice
from prerank.serve.funnel import Funnel
from prerank.serve.ranking import Asker
from prerank.types import ItemChange, Request
from tests.serve import world
from tests.serve.late_device import LateDevice

REQUEST = Request(user_id=1, k=5, time_ms=world.T0 + 10_000, context={"hour": 1, "surface": "search"})


@pytest.fixture
def on_device():
    with DeviceEngine(CpuDevice(), 2, wait_ms=0.1) as engine:
        yield OnDevice(engine, None, Buckets((4, 16), 64, 4))


def said(funnel, request=REQUEST):
    return [(one.item_id, pytest.approx(one.utility_micros, rel=1e-5)) for one in funnel.recommend(request).winners]


def test_a_funnel_answers_on_a_device_what_it_answers_without(store, on_device):
    with Funnel.open(store, workers=0) as host, Funnel.open(store, workers=0, device=on_device) as funnel:
        for user_id in (1, 2, 999):
            request = replace(REQUEST, user_id=user_id)
            assert said(funnel, request) == said(host, request)
            assert not funnel.recommend(request).degraded
        ids = torch.arange(100, 108).repeat(3, 1)
        askers = [Asker(world.UNTIL + 1, user_id, context=REQUEST.context) for user_id in (1, 2, None)]
        found, wanted = (one.ranking.rank(ids, askers, 4).winners for one in (funnel, host))
        assert torch.equal(found.item_ids, wanted.item_ids)
        assert torch.equal(found.valid, wanted.valid)
        counts = on_device.engine.snapshot()
        assert (counts.fallbacks, counts.eager) == (0, 0)
        assert counts.requests >= 9


def test_what_is_told_of_items_holds_for_every_request_after(store, on_device):
    with Funnel.open(store, workers=0, device=on_device) as funnel:
        best, second = said(funnel)[0][0], said(funnel)[1][0]
        funnel.change([ItemChange(best, on=False)])
        assert best not in dict(said(funnel))
        assert said(funnel)[0][0] == second
        funnel.change([ItemChange(best, on=True), ItemChange(second, pacing=0.0)])
        assert said(funnel)[0][0] == best
        assert second not in dict(said(funnel))  # worth nothing, and five are worth more


def test_a_version_that_is_closed_leaves_the_device_and_another_is_there_beside_it(store, on_device):
    with Funnel.open(store, workers=0, device=on_device) as one:
        alone = on_device.engine.snapshot().table_bytes
        with Funnel.open(store, workers=0, device=on_device) as other:
            assert on_device.engine.snapshot().table_bytes == 2 * alone
            assert said(one) == said(other)
        assert on_device.engine.snapshot().table_bytes == alone
        one.change([ItemChange(100, on=False)])
        assert 100 not in dict(said(one))
    assert on_device.engine.snapshot().table_bytes == 0


def test_the_next_version_has_the_sizes_that_were_asked_if_they_were_asked_often(store, on_device, monkeypatch):
    taken = []
    right = DeviceEngine.load
    monkeypatch.setattr(DeviceEngine, "load", lambda self, *of: taken.append(of[-1].buckets.sizes) or right(self, *of))
    place = replace(on_device, buckets=None)
    with Funnel.open(store, workers=0, device=place) as funnel:
        assert taken == [COMMON]
        ids = torch.full((250, 300), 101)
        askers = [Asker(world.UNTIL + 1, 1, context=REQUEST.context)] * 250
        for _ in range(4):
            funnel.ranking.rank(ids, askers, 1)
    with Funnel.open(store, workers=0, device=place) as funnel:
        assert taken[1:] == [(256, 512)]  # what it retrieves, and what was asked
        assert said(funnel)


def test_a_version_that_is_far_off_on_the_device_is_not_served(store, on_device, monkeypatch):
    right = Replica.judge

    def wrong(self, asked, segment=None):
        judged = right(self, asked, segment)
        return replace(judged, probs=1 - judged.probs)

    monkeypatch.setattr(Replica, "judge", wrong)
    with pytest.raises(BundleError, match="the kernels of cpu are far off: golden request 0: expected item"):
        Funnel.open(store, workers=0, device=on_device)
    assert on_device.engine.snapshot().table_bytes == 0


def test_a_version_that_does_not_fit_is_not_served_and_says_why(store):
    with (
        DeviceEngine(LateDevice(threading.RLock(), free=10), 1) as engine,
        pytest.raises(DeviceFull, match="keep fewer items resident"),
    ):
        Funnel.open(store, workers=0, device=OnDevice(engine, None))
