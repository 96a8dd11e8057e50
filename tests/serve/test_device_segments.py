"""A ranker by segments on a device: a graph a segment, and nobody waits to see which it is."""

import threading
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prerank.bundle.item_table import ItemTable
from prerank.bundle.scorer import Scorer
from prerank.business.diversity import Diversity
from prerank.business.utility import Utility
from prerank.config import DiversityRule
from prerank.errors import DeviceFailed
from prerank.models.segmented import SEGMENT, SegmentedRanker
from prerank.serve.device import DeviceEngine
from prerank.serve.device_bundle import OnDevice
from prerank.serve.device_options import Options
from prerank.serve.device_replica import Asked, Replica
from prerank.serve.device_streams import CpuDevice
from prerank.serve.funnel import Funnel
from prerank.types import ItemChange, Request
from tests.bundle.test_scorer import ByNumber
from tests.serve import world as tiny
from tests.serve.conftest import publish_live
from tests.serve.late_device import LateDevice
from tests.serve.test_device import BUCKETS, NUM_ITEMS, asked, same
from tests.serve.test_device_whole import K, index, sought, stages, targeting, whole

SEGMENTS = 3


class Scaled(ByNumber):
    """The item's numbers times its own."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def item_side(self, items):
        return {name: self.factor * side for name, side in super().item_side(items).items()}


def segmented(seed=0):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(-2, 3, (2, NUM_ITEMS)).astype(np.float32)
    items = ItemTable.build(np.arange(NUM_ITEMS) * 10, {"a": a, "b": b, "bid": rng.integers(0, 4, NUM_ITEMS)})
    groups = pa.table({"brand": rng.integers(0, 40, NUM_ITEMS)})
    ranker = SegmentedRanker("tab", [5, 8], [Scaled(1.0), Scaled(2.0), Scaled(-1.0)])
    utility = Utility(("click", "like"), {"click": "bid"})
    return Scorer(items, ranker, utility, diversity=Diversity.build({"brand": DiversityRule(2)}, groups)).eval()


def user(model, number, segment):
    return model.ranker.user_side({"u": torch.tensor([number]), "tab": torch.tensor([[0, 5, 8][segment]])})


@pytest.fixture(params=["cpu", "late"])
def device(request):
    return {"cpu": CpuDevice, "late": lambda: LateDevice(threading.RLock())}[request.param]()


def unread(monkeypatch):
    """From here on nobody looks at whose ranker a request wants, within what is captured."""
    monkeypatch.setattr(SegmentedRanker, "forward", lambda *sides: pytest.fail("the segment is read on the host"))


@pytest.mark.parametrize("workers", [1, 2])
def test_every_request_is_answered_by_the_ranker_of_its_segment_whatever_its_size(device, workers, monkeypatch):
    model = segmented()
    nums = [1, 31, 32, 33, 64, 100, 128, 129, 300, 0, 5, 7, 9, 256]
    requests = [(user(model, n / 10, n % SEGMENTS), asked(num, n, n % 2 == 0), n % 21) for n, num in enumerate(nums)]
    wanted = [model.rank(*request) for request in requests]
    one, two, three = (model.rank(user(model, 0.0, segment), asked(64), 9) for segment in range(SEGMENTS))
    assert not same(one, two)
    assert not same(one, three)
    unread(monkeypatch)
    with DeviceEngine(device, workers, wait_ms=5) as engine:
        version = engine.load(model, user(model, 0.0, 0), Options(20, BUCKETS))
        futures = [version.submit(*request) for request in requests]
        for future, expected in zip(futures, wanted, strict=True):
            assert same(future.result(30), expected)
        counts = engine.snapshot()
    assert (counts.requests, counts.fallbacks, counts.eager, counts.eager_captures) == (14, 0, 0, 0)


def test_only_requests_of_one_segment_share_a_batch():
    model = segmented()
    with DeviceEngine(CpuDevice(), 1, wait_ms=300) as engine:
        version = engine.load(model, user(model, 0.0, 0), Options(20, BUCKETS))
        futures = [version.submit(user(model, 0.0, n % SEGMENTS), asked(9, n), 5) for n in range(9)]
        for n, future in enumerate(futures):
            assert same(future.result(30), model.rank(user(model, 0.0, n % SEGMENTS), asked(9, n), 5))
        assert engine.snapshot().batches == SEGMENTS


def test_what_changes_of_an_item_is_known_to_every_segment(device):
    model = segmented()
    with DeviceEngine(device, 1, wait_ms=0) as engine:
        version = engine.load(model, user(model, 0.0, 0), Options(20, BUCKETS))
        model.tell(version.put)
        rows = torch.arange(9).unsqueeze(0)
        candidates = replace(asked(9), rows=rows, valid=rows >= 0)
        features = {name: torch.tensor([9.0]) for name in ("a", "b")}
        model.put_side(torch.tensor([4]), model.ranker.item_side(features))
        model.live.change([7], [ItemChange(70, on=False)])
        for segment in range(SEGMENTS):
            side = user(model, 0.0, segment)
            assert same(version.submit(side, candidates, 9).result(30), model.rank(side, candidates, 9))


def test_a_segment_that_is_none_or_not_said_is_refused():
    model = segmented()
    with DeviceEngine(CpuDevice()) as engine:
        version = engine.load(model, user(model, 0.0, 0), Options(20, BUCKETS))
        side = user(model, 0.0, 1)
        with pytest.raises(DeviceFailed, match=r"of segment 7, expected one of \[0, 1, 2\]"):
            version.submit({**side, SEGMENT: torch.tensor([7])}, asked(5), 3)
        with pytest.raises(DeviceFailed, match=r"names, types or shapes of \['segment'\]"):
            version.submit({name: side[name] for name in side if name != SEGMENT}, asked(5), 3)


def test_users_of_several_segments_are_judged_together_where_that_may_wait():
    model = segmented()
    sides = model.ranker.user_side({"u": torch.tensor([0.0, 1.0, 2.0]), "tab": torch.tensor([8, 1, 5])})
    rows = torch.arange(9).repeat(3, 1)
    candidates = replace(asked(9), rows=rows, valid=rows >= 0, similarity=torch.zeros(rows.shape))
    found = Replica(model, CpuDevice()).judge(Asked(sides, rows, rows >= 0))
    assert torch.equal(found.probs, model.judge(sides, candidates).probs)


@given(st.lists(st.tuples(st.integers(0, SEGMENTS - 1), st.sampled_from(["a", "b", "elsewhere"])), max_size=4))
def test_a_whole_request_is_answered_by_the_ranker_of_its_segment(requests):
    model, who, found = segmented(), targeting(), index()
    one, _ = whole(LateDevice(threading.RLock()), model, who, found, like=user(model, 0.0, 0))
    for seed, (segment, country) in enumerate(requests):
        profile, side = {"country": country, "topics": ["a"]}, user(model, 0.5, segment)
        top = one.rank(side, sought(seed, who, profile), K)
        assert same(top, stages(model, who, found, seed, profile, side))


@pytest.mark.parametrize("whole", [False, True])
def test_a_funnel_of_segments_answers_on_a_device_what_it_answers_without(tmp_path, monkeypatch, whole):
    config = tiny.config(segments={"by": "surface", "own": ["feed"]})
    store = publish_live(tmp_path / "tiny", config)
    requests = [
        Request(user_id, 5, tiny.T0 + 10_000, {"hour": 1, "surface": surface})
        for user_id in (1, 2, 9)
        for surface in ("feed", "elsewhere")  # the second ranker is here that of what is unknown
    ]

    def said(funnel, request):
        return [(one.item_id, pytest.approx(one.utility_micros, rel=1e-5)) for one in funnel.recommend(request).winners]

    with Funnel.open(store, workers=0) as host:
        wanted = [said(host, request) for request in requests]
    assert wanted[0] != wanted[1]
    unread(monkeypatch)
    monkeypatch.setattr("prerank.bundle.golden.Golden.first_difference", lambda *of: None)  # which asks the host
    with DeviceEngine(CpuDevice(), 1, wait_ms=0) as engine:
        with Funnel.open(store, workers=0, device=OnDevice(engine, None, BUCKETS, whole)) as funnel:
            assert [said(funnel, request) for request in requests] == wanted
        assert (engine.snapshot().fallbacks, engine.snapshot().eager) == (0, 0)
