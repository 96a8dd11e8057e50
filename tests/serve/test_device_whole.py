"""A request in one graph is what its stages give one after the other on the host."""

import threading

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prerank.business.targeting import Targeting
from prerank.config import TargetingRule
from prerank.errors import DeviceFailed
from prerank.index.exact import ExactIndex
from prerank.kernels import triton
from prerank.serve.device_cuda import cuda_device
from prerank.serve.device_replica import Replica
from prerank.serve.device_streams import CpuDevice
from prerank.serve.device_updates import Updates
from prerank.serve.device_whole import Chosen, DeviceWhole, Sizes
from prerank.types import ItemChange
from tests.kernels.ways import IS_INTERPRETED
from tests.serve.late_device import LateDevice
from tests.serve.test_device import LIKE, NUM_ITEMS, same, user, world

RULES = {
    "country": TargetingRule(item="country", user="country"),
    "blocked": TargetingRule(item="blocked", user="topics", excludes=True),
}
SIZES = Sizes(keep=60, k=20, most_chosen=8)
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


def whole(device, model, who=None, found=None, sizes=SIZES):
    updates = Updates(device, Replica(model, device))
    return DeviceWhole(device, updates, who or targeting(), found or index(), LIKE, sizes), updates


def query(seed):
    return torch.from_numpy(np.random.default_rng(seed).integers(-3, 4, (1, 8)).astype(np.float32))


def stages(model, who, found, asked, profile, number):
    """One after the other, on the host."""
    rows = model.live.among(who.rows(profile, {}, 0))
    return model.rank(user(number), found.search(asked, SIZES.keep, rows), SIZES.k)


def chosen(who, profile):
    return Chosen(*who.choose(profile, {}, 0))


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
def test_it_answers_as_the_stages_do_one_after_the_other(device, storage):
    model, who, found = world(), targeting(), index(storage)
    one, _ = whole(device, model, who, found)
    for seed, country in enumerate(VALUES):
        for topics in ([], ["a"], ["b", "c"]):
            profile = {"country": country, "topics": topics}
            wanted = stages(model, who, found, query(seed), profile, seed / 10)
            assert same(one.rank(query(seed), chosen(who, profile), user(seed / 10)), wanted, device)
            assert wanted.valid.any()


@pytest.mark.skipif(not IS_INTERPRETED, reason="Triton is not installed, or runs on a GPU")
@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_by_the_kernels_of_a_gpu_it_answers_the_same(monkeypatch, storage):
    model, who, found = world(), targeting(), index(storage)
    profiles = [{"country": country, "topics": ["a"]} for country in VALUES]
    wanted = [stages(model, who, found, query(seed), profile, 0.0) for seed, profile in enumerate(profiles)]
    monkeypatch.setattr(triton, "serves", lambda device: True)
    one, _ = whole(CpuDevice(), model, who, found)
    for seed, profile in enumerate(profiles):
        assert same(one.rank(query(seed), chosen(who, profile), user(0.0)), wanted[seed])


@given(countries=st.lists(st.sampled_from(VALUES), max_size=3), topics=st.lists(st.sampled_from(VALUES), max_size=3))
def test_whoever_asks_after_whomever_gets_an_answer_of_its_own(countries, topics):
    model, who, found = world(), targeting(), index()
    one, _ = whole(CpuDevice(), model, who, found)
    for profile in ({"country": countries, "topics": topics}, {"country": None, "topics": None}):
        wanted = stages(model, who, found, query(1), profile, 0.5)
        assert same(one.rank(query(1), chosen(who, profile), user(0.5)), wanted)


def test_where_few_are_eligible_fewer_win_and_where_nobody_is_nobody_does(device):
    model, who, found = world(), targeting(), index()
    one, updates = whole(device, model, who, found)
    profile = {"country": "a", "topics": []}
    eligible = who.rows(profile, {}, 0).tolist()
    changes = [ItemChange(10 * row, on=False) for row in range(NUM_ITEMS) if row not in eligible[:3]]
    for left in (changes, [ItemChange(10 * row, on=False) for row in eligible[:3]]):
        model.live.change([change.item_id // 10 for change in left], left)
        updates.put(torch.arange(NUM_ITEMS))
        found_now = one.rank(query(2), chosen(who, profile), user(0.0))
        assert same(found_now, stages(model, who, found, query(2), profile, 0.0), device)
    assert not found_now.valid.any()


def test_what_changes_of_items_is_known_to_the_next_request(device):
    model, who, found = world(), targeting(), index()
    one, updates = whole(device, model, who, found)
    profile = {"country": "b", "topics": []}
    before = one.rank(query(0), chosen(who, profile), user(0.0))
    best = int(before.rows[0, 0])
    model.live.change([best], [ItemChange(10 * best, on=False)])
    updates.put(torch.tensor([best]))
    after = one.rank(query(0), chosen(who, profile), user(0.0))
    assert best not in after.rows.tolist()[0]
    assert same(after, stages(model, who, found, query(0), profile, 0.0), device)


def test_a_request_waits_for_the_device_once():
    device = LateDevice(threading.RLock())
    one, _ = whole(device, world())
    device.waits = 0
    one.rank(query(0), chosen(targeting(), {}), user(0.0))
    assert device.waits == 1


def test_what_a_device_would_not_notice_is_refused():
    who = targeting()
    one, _ = whole(CpuDevice(), world(), who)
    asked = chosen(who, {"country": ["a", "b"]})
    few = whole(CpuDevice(), world(), who, sizes=Sizes(60, 20, most_chosen=1))[0]
    nowhere = Chosen(torch.full_like(asked.chosen, 99), asked.starts, asked.inverted)
    falling = Chosen(asked.chosen, asked.starts.flip(0), asked.inverted)
    for whose, vector, those, side, wrong in [
        (one, query(0), asked, {"v": torch.zeros(1)}, r"names, types or shapes of \['u', 'v'\]"),
        (one, query(0)[:, :4], asked, user(0.0), r"a vector \[1, 8\], got \[1, 4\]"),
        (few, query(0), asked, user(0.0), "2 bitmaps are chosen, expected 1 at most"),
        (one, query(0), nowhere, user(0.0), r"expected bitmaps 0 to \d+, got \[99, 99\]"),
        (one, query(0), falling, user(0.0), "expected starts that split 2 bitmaps"),
    ]:
        with pytest.raises(DeviceFailed, match=wrong):
            whose.rank(vector, those, side)
