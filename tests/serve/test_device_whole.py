"""A request in one graph is what its stages give one after the other on the host."""

import threading
import time
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prerank.business.targeting import Targeting
from prerank.config import TargetingRule
from prerank.errors import DeviceBusy, DeviceFailed, DeviceFull
from prerank.index.exact import ExactIndex
from prerank.kernels import triton
from prerank.serve.device import DeviceEngine
from prerank.serve.device_buckets import Buckets
from prerank.serve.device_counts import Counts
from prerank.serve.device_cuda import cuda_device
from prerank.serve.device_graphs import Graphs
from prerank.serve.device_ground import Ground
from prerank.serve.device_replica import Replica
from prerank.serve.device_retrieval import Retrieval, RetrievalReplica
from prerank.serve.device_sought import Chosen, Sought
from prerank.serve.device_streams import CpuDevice
from prerank.serve.device_times import Times
from prerank.serve.device_updates import Updates
from prerank.serve.device_whole import DeviceWhole
from prerank.serve.graph import Deadline
from prerank.types import ItemChange
from tests.kernels.ways import IS_INTERPRETED
from tests.serve.late_device import LateDevice
from tests.serve.test_device import LIKE, NUM_ITEMS, asked, load, same, user, world

RULES = {
    "country": TargetingRule(item="country", user="country"),
    "blocked": TargetingRule(item="blocked", user="topics", excludes=True),
}
KEEP, K = 60, 20
VALUES = ["a", "b", "c", "elsewhere"]


@pytest.fixture(params=["cpu", "late", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return {"cpu": CpuDevice, "late": lambda: LateDevice(threading.RLock()), "cuda": cuda_device}[request.param]()


def lists(rng, most):
    return pa.chunked_array(
        [[rng.choice(["a", "b", "c"], rng.integers(0, most), replace=False).tolist() for _ in range(NUM_ITEMS)]]
    )


def targeting(seed=3):
    rng = np.random.default_rng(seed)
    return Targeting.fit(RULES, {"country": lists(rng, 3), "blocked": lists(rng, 2)}, NUM_ITEMS)


def index(storage="float32"):
    # whole numbers: products are the same wherever they are added
    rng = np.random.default_rng(5)
    return ExactIndex(torch.from_numpy(rng.integers(-3, 4, (NUM_ITEMS, 8)).astype(np.float32)), storage)


def whole(device, model, who=None, found=None, like=LIKE, **limits):
    """One to ask, and what it is told of changes by."""
    those = Retrieval(who, index() if found is None else found, KEEP, **{"most_chosen": 8, "most_excluded": 5} | limits)
    updates = Updates(device, Replica(model, device), RetrievalReplica(those, device))
    counts, buckets = Counts(), Buckets()
    ground = Ground(device, device.stream(), updates, buckets, Times(buckets), counts)
    return DeviceWhole(0, ground, like, K, Graphs(device, counts), device.stream()), updates


def query(seed):
    return torch.from_numpy(np.random.default_rng(seed).integers(-3, 4, (1, 8)).astype(np.float32))


def stages(model, who, found, seed, profile, side, excluded=()):
    """One after the other, on the host."""
    rows = torch.arange(NUM_ITEMS) if who is None else who.rows(profile, {}, 0)
    rows = model.live.among(rows)
    return model.rank(side, found.search(query(seed), KEEP, rows[~torch.isin(rows, torch.tensor(excluded))]), K)


def sought(seed, who, profile, excluded=(), with_candidates=False):
    chosen = None if who is None else Chosen(*who.choose(profile, {}, 0))
    return Sought(query(seed), chosen, torch.tensor(excluded, dtype=torch.int64), with_candidates)


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
def test_it_answers_as_the_stages_do_one_after_the_other(device, storage):
    model, who, found = world(), targeting(), index(storage)
    one, _ = whole(device, model, who, found)
    for seed, country in enumerate(VALUES):
        for topics in ([], ["a"], ["b", "c"]):
            profile = {"country": country, "topics": topics}
            wanted = stages(model, who, found, seed, profile, user(seed / 10))
            assert same(one.rank(user(seed / 10), sought(seed, who, profile), K), wanted, device)
            assert wanted.valid.any()


@pytest.mark.skipif(not IS_INTERPRETED, reason="Triton is not installed, or runs on a GPU")
@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_by_the_kernels_of_a_gpu_it_answers_the_same(monkeypatch, storage):
    model, who, found = world(), targeting(), index(storage)
    profiles = [{"country": country, "topics": ["a"]} for country in VALUES]
    wanted = [stages(model, who, found, seed, profile, user(0.0)) for seed, profile in enumerate(profiles)]
    monkeypatch.setattr(triton, "serves", lambda device: True)
    one, _ = whole(CpuDevice(), model, who, found)
    for seed, profile in enumerate(profiles):
        assert same(one.rank(user(0.0), sought(seed, who, profile), K), wanted[seed])


@given(countries=st.lists(st.sampled_from(VALUES), max_size=3), topics=st.lists(st.sampled_from(VALUES), max_size=3))
def test_whoever_asks_after_whomever_gets_an_answer_of_its_own(countries, topics):
    model, who, found = world(), targeting(), index()
    one, _ = whole(CpuDevice(), model, who, found)
    for profile in ({"country": countries, "topics": topics}, {"country": None, "topics": None}):
        wanted = stages(model, who, found, 1, profile, user(0.5))
        assert same(one.rank(user(0.5), sought(1, who, profile), K), wanted)


def test_where_few_are_eligible_fewer_win_and_where_nobody_is_nobody_does(device):
    model, who, found = world(), targeting(), index()
    one, updates = whole(device, model, who, found)
    profile = {"country": "a", "topics": []}
    eligible = who.rows(profile, {}, 0).tolist()
    changes = [ItemChange(10 * row, on=False) for row in range(NUM_ITEMS) if row not in eligible[:3]]
    for left in (changes, [ItemChange(10 * row, on=False) for row in eligible[:3]]):
        model.live.change([change.item_id // 10 for change in left], left)
        updates.put(torch.arange(NUM_ITEMS))
        found_now = one.rank(user(0.0), sought(2, who, profile), K)
        assert same(found_now, stages(model, who, found, 2, profile, user(0.0)), device)
    assert not found_now.valid.any()


def test_what_changes_of_items_is_known_to_the_next_request(device):
    model, who, found = world(), targeting(), index()
    one, updates = whole(device, model, who, found)
    profile = {"country": "b", "topics": []}
    before = one.rank(user(0.0), sought(0, who, profile), K)
    best = int(before.rows[0, 0])
    model.live.change([best], [ItemChange(10 * best, on=False)])
    updates.put(torch.tensor([best]))
    after = one.rank(user(0.0), sought(0, who, profile), K)
    assert best not in after.rows.tolist()[0]
    assert same(after, stages(model, who, found, 0, profile, user(0.0)), device)


def test_a_request_waits_for_the_device_once():
    device = LateDevice(threading.RLock())
    who = targeting()
    one, _ = whole(device, world(), who)
    for with_candidates in (False, True):
        device.waits = 0
        one.rank(user(0.0), sought(0, who, {}, with_candidates=with_candidates), K)
        assert device.waits == 1


def test_without_targeting_every_item_that_is_on_may_win(device):
    model, found = world(), index()
    one, updates = whole(device, model, None, found)
    model.live.change([3, 4], [ItemChange(30, on=False), ItemChange(40, on=False)])
    updates.put(torch.tensor([3, 4]))
    wanted = stages(model, None, found, 0, {}, user(0.0), (7, 9))
    assert same(top := one.rank(user(0.0), sought(0, None, {}, (7, 9)), K), wanted, device)
    assert top.num_eligible == NUM_ITEMS - 4
    assert top.candidates is None


def test_candidates_come_down_where_they_are_asked_for_and_are_those_of_the_index(device):
    model, who, found = world(), targeting(), index()
    one, _ = whole(device, model, who, found)
    for topics in ([], ["a", "b", "c"]):
        profile = {"country": "elsewhere", "topics": topics}
        rows = who.rows(profile, {}, 0)
        wanted = found.search(query(4), min(KEEP, max(len(rows), 1)), rows)
        top = one.rank(user(0.0), sought(4, who, profile, with_candidates=True), 3)
        assert top.num_eligible == len(rows)
        assert top.rows.shape == (1, 3)
        for name in ("rows", "similarity", "valid"):
            assert torch.equal(getattr(top.candidates, name), getattr(wanted, name))


@pytest.mark.parametrize("storage", ["float32", "int8"])
@given(data=st.data())
def test_items_that_come_or_list_other_values_are_found_by_the_next_request(storage, data):
    model, who, found = world(), targeting(), index(storage)
    device = LateDevice(threading.RLock())
    one, updates = whole(device, model, who, found, room=2)
    values = st.lists(st.sampled_from(["a", "b", "new", "newer", "newest"]), max_size=2, unique=True)
    for seed in range(3):
        rows = data.draw(st.lists(st.integers(0, NUM_ITEMS - 1), min_size=1, max_size=4, unique=True))
        listed = {name: pa.chunked_array([[data.draw(values) for _ in rows]], pa.list_(pa.string())) for name in RULES}
        at = torch.tensor(rows)
        who.put(at, who.read(listed))
        found.put(at, torch.from_numpy(np.random.default_rng(seed).integers(-9, 10, (len(rows), 8)).astype(np.float32)))
        updates.put(at, None, at)
        profile = {"country": data.draw(values), "topics": data.draw(values)}
        asked, excluded = sought(seed, who, profile, rows[:1]), rows[:1]
        if max(asked.chosen.chosen.tolist(), default=0) < room_of(updates):
            updates.retrieval.check(asked)
            assert same(one.rank(user(0.5), asked, K), stages(model, who, found, seed, profile, user(0.5), excluded))
        else:  # more values are new than there is room for, and whoever asks by them is another's to answer
            with pytest.raises(DeviceFailed, match="expected bitmaps 0 to"):
                updates.retrieval.check(asked)


def room_of(updates):
    return len(updates.retrieval._bitmaps)


def test_who_asks_by_a_bitmap_that_is_not_there_yet_is_refused():
    who = targeting()
    _, updates = whole(CpuDevice(), world(), who)
    at = torch.tensor([1])
    who.put(at, who.read({name: pa.chunked_array([[["new"]]]) for name in RULES}))
    asked = sought(0, who, {"country": "new"})
    with pytest.raises(DeviceFailed, match="expected bitmaps 0 to"):
        updates.retrieval.check(asked)
    updates.put(at, None, at)
    updates.retrieval.check(asked)


def test_vectors_and_bitmaps_that_do_not_fit_say_so():
    device = LateDevice(threading.RLock(), free=1 << 10)
    with pytest.raises(DeviceFull, match="vectors and bitmaps of 400 items need"):
        RetrievalReplica(Retrieval(targeting(), index(), KEEP), device)


def test_what_a_device_would_not_notice_is_refused():
    who = targeting()
    _, updates = whole(CpuDevice(), world(), who)
    asked = sought(0, who, {"country": ["a", "b"]})
    those = asked.chosen
    many = sought(0, who, {"country": ["a"] * 9})
    nowhere = Chosen(torch.full_like(those.chosen, 99), those.starts, those.inverted)
    falling = Chosen(those.chosen, those.starts.flip(0), those.inverted)
    for one, wrong in [
        (replace(asked, query=query(0)[:, :4]), r"a vector float32 \[1, 8\], got torch.float32 \[1, 4\]"),
        (replace(asked, query=query(0).double()), r"a vector float32 \[1, 8\], got torch.float64"),
        (many, "9 bitmaps are chosen, expected 8 at most"),
        (replace(asked, chosen=nowhere), r"expected bitmaps 0 to \d+, got 99 to 99"),
        (replace(asked, chosen=falling), "expected starts that split 2 bitmaps"),
        (replace(asked, chosen=None), "expected who asks where there is targeting"),
        (replace(asked, excluded=torch.arange(6)), "6 items are excluded, expected 5 at most"),
        (replace(asked, excluded=torch.tensor([400])), "rows that are excluded 0 to 399, got 400"),
    ]:
        with pytest.raises(DeviceFailed, match=wrong):
            updates.retrieval.check(one)
    updates.retrieval.check(asked)


def test_a_version_takes_whole_requests_beside_others_and_refuses_what_it_cannot_answer():
    model, who, found = world(), targeting(), index()
    asked_by = sought(1, who, {"country": "a"})
    with DeviceEngine(CpuDevice(), 2, wait_ms=0) as engine:
        version = load(engine, model, retrieval=Retrieval(who, found, KEEP))
        ranked, whole_one = version.submit(user(0.5), asked(40), 5), version.submit(user(0.5), asked_by, K)
        assert same(ranked.result(30), model.rank(user(0.5), asked(40), 5))
        assert same(whole_one.result(30), stages(model, who, found, 1, {"country": "a"}, user(0.5)))
        sizes = engine.snapshot().sizes
        assert sum(sizes.values()) == 1  # a whole request is of no size
        with pytest.raises(DeviceBusy, match=r"0.001 ms would pass first.* and a whole request about"):
            version.submit(user(0.5), asked_by, K, Deadline(time.perf_counter(), 0.001))
        with pytest.raises(DeviceFailed, match=f"expected 0 to 20 winners, got {K + 1}"):
            version.find(user(0.5), asked_by, K + 1)
        assert (engine.snapshot().refused, engine.snapshot().fallbacks) == (1, 1)
        without = load(engine, model)
        with pytest.raises(DeviceFailed, match="this version finds no candidates on the device"):
            without.submit(user(0.5), asked_by, K)
        version.close()
        with pytest.raises(DeviceFailed, match="or has left it"):
            version.submit(user(0.5), asked_by, K)
