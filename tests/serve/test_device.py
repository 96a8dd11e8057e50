import logging
import os
import threading
import time
from dataclasses import fields, replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from prerank.bundle.judge import Ranked
from prerank.bundle.scorer import Scorer
from prerank.business.diversity import Diversity
from prerank.business.reserve import Reserve
from prerank.config import DiversityRule, Rules
from prerank.errors import Cancelled, DeadlineExceeded, DeviceBusy, DeviceFailed, DeviceFull
from prerank.kernels import stop
from prerank.serve.device import DeviceEngine
from prerank.serve.device_buckets import Buckets
from prerank.serve.device_cuda import cuda_device
from prerank.serve.device_options import Options
from prerank.serve.device_streams import CpuDevice
from prerank.serve.graph import Deadline
from prerank.types import CandidateSet, ItemChange
from tests.bundle.test_scorer import scorer
from tests.serve.late_device import LateDevice, Lost

NUM_ITEMS = 400
LIKE = {"u": torch.zeros(1)}
BUCKETS = Buckets((32, 64, 128), together=256, most_requests=4)


def late():
    return LateDevice(threading.RLock())


@pytest.fixture(params=["cpu", "late", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return {"cpu": CpuDevice, "late": late, "cuda": cuda_device}[request.param]()


def world(seed=0, shift=0.0) -> Scorer:
    """Few values and groups, so that much ties, and some that are not finite."""
    rng = np.random.default_rng(seed)
    logits = rng.choice([np.nan, 0.0, 0.5, 1.0, -1.0], (2, NUM_ITEMS), p=[0.02, 0.38, 0.2, 0.2, 0.2]) + shift
    groups = pa.table({"brand": rng.integers(0, 40, NUM_ITEMS), "maker": rng.integers(0, 60, NUM_ITEMS)})
    return scorer(
        *logits.astype(np.float32),
        bid=rng.integers(0, 4, NUM_ITEMS),
        diversity=Diversity.build({"brand": DiversityRule(2), "maker": DiversityRule(1)}, groups),
        rules={"reserve": Reserve(("click", "like"), Rules(0.3, {"like": 0.3}))},
    )


def asked(num, seed=0, own=False):
    rng = np.random.default_rng(seed)
    rows = torch.from_numpy(rng.integers(0, NUM_ITEMS, (1, num)))
    values = {"bid": torch.from_numpy(rng.integers(0, 5, (1, num))).float()} if own else {}
    valid = torch.from_numpy(rng.random((1, num)) < 0.9)
    return CandidateSet(torch.where(valid, rows, -7), torch.zeros(1, num), valid, values=values)


def user(number):
    return {"u": torch.tensor([number])}


def same(found: Ranked, wanted: Ranked, device=None) -> bool:
    """To the bit, but for what is past the last winner, and for how a GPU rounds."""
    for one in fields(Ranked):
        a, b = getattr(found, one.name), getattr(wanted, one.name)
        if one.name in ("utility", "probs"):
            a, b = a[wanted.valid], b[wanted.valid]
            if device is not None and device.where.type == "cuda" and torch.allclose(a, b, rtol=1e-5):
                continue
        if not torch.equal(a, b):
            return False
    return True


def load(engine, model, **changes):
    return engine.load(model, LIKE, replace(Options(20, BUCKETS), **changes))


@pytest.mark.parametrize("workers", [1, 3])
def test_every_request_is_answered_as_the_scorer_would_whatever_its_size_and_whoever_shares_its_batch(device, workers):
    model = world()
    with DeviceEngine(device, workers, wait_ms=5) as engine:
        version = load(engine, model)
        nums = [1, 31, 32, 33, 64, 100, 128, 129, 300, 0, 5, 7, 9, 256]
        requests = [(asked(num, n, n % 3 == 0), n % 21, user(n / 10)) for n, num in enumerate(nums)]
        futures = [version.submit(side, those, k) for those, k, side in requests]
        for future, (those, k, side) in zip(futures, requests, strict=True):
            assert same(future.result(30), model.rank(side, those, k), device)
        counts = engine.snapshot()
    assert (counts.requests, counts.cut, counts.fallbacks, counts.eager) == (14, 3, 0, 0)
    assert counts.batches < counts.requests
    assert counts.candidates == sum(those.rows.shape[1] for those, _, _ in requests)
    assert counts.padding > 0
    assert counts.table_bytes > 0
    assert counts.buffer_bytes > 0
    assert sum(counts.sizes.values()) == 14


def test_a_request_waits_for_the_device_once_and_a_change_of_items_never():
    device = late()
    with DeviceEngine(device, 1, wait_ms=0) as engine:
        version = load(engine, world())
        for num in (40, 300):  # at once, and in pieces
            device.waits = 0
            version.submit(user(0.0), asked(num), 5).result(30)
            assert device.waits == 1
        version.put(torch.arange(9), torch.arange(9))
        assert device.waits == 1


def test_a_batch_waits_for_company_and_leaves_when_it_is_full():
    with DeviceEngine(CpuDevice(), 1, wait_ms=60_000) as engine:
        version = load(engine, world())
        futures = [version.submit(user(0.0), asked(3, seed), 2) for seed in range(4)]
        assert all(future.result(30).valid.any() for future in futures)
        large = version.submit(user(0.0), asked(200), 2)  # is alone, and waits for nobody
        assert large.result(30).valid.any()
        assert (engine.snapshot().batches, engine.snapshot().requests) == (2, 5)


def test_requests_of_two_versions_never_share_a_batch_and_each_is_answered_by_its_own(device):
    first, second = world(0), world(1, shift=0.25)
    with DeviceEngine(device, 2, wait_ms=5) as engine:
        versions = [(load(engine, model), model) for model in (first, second)]
        futures = [(versions[n % 2][0].submit(user(0.0), asked(20, n), 5), n) for n in range(12)]
        for future, n in futures:
            assert same(future.result(30), versions[n % 2][1].rank(user(0.0), asked(20, n), 5), device)


def test_what_a_version_cannot_answer_is_refused_before_a_device_sees_it():
    with DeviceEngine(CpuDevice()) as engine:
        version = load(engine, world())
        those = asked(5)
        for side, candidates, k, wrong in [
            (user(0.0), replace(those, rows=torch.full((1, 5), NUM_ITEMS)), 3, "rows: expected 0 to 399, got 0 to 400"),
            (user(0.0), replace(those, slots=those.rows), 3, "all items are resident"),
            (user(0.0), replace(those, values={"price": torch.ones(1, 5)}), 3, r"values \['price'\]"),
            (user(0.0), those, 21, "0 to 20 winners, got 21"),
            ({"u": torch.zeros(2)}, those, 3, r"names, types or shapes of \['u'\]"),
            ({"v": torch.zeros(1)}, those, 3, r"shapes of \['u', 'v'\]"),
            ({"u": torch.zeros(1).double()}, those, 3, r"shapes of \['u'\]"),
        ]:
            with pytest.raises(DeviceFailed, match=wrong):
                version.submit(side, candidates, k)
        assert engine.snapshot().requests == 0


def test_a_graph_that_cannot_be_captured_or_replayed_is_done_by_torch_and_counted(caplog):
    model, device = world(), late()
    device.capture_error = RuntimeError("operation not permitted when stream is capturing")
    with DeviceEngine(device, 1) as engine, caplog.at_level(logging.WARNING):
        version = load(engine, model)
        assert same(version.submit(user(0.0), asked(40), 5).result(30), model.rank(user(0.0), asked(40), 5))
        assert engine.snapshot().eager_captures == len(BUCKETS.shapes()) + 1  # and the judgement of a piece
        assert engine.snapshot().eager == 1
        assert "1 x 64 cannot be captured, torch does its work: operation not permitted" in caplog.text
        device.capture_error, device.replay_error = None, None
        other = load(engine, model)
        device.replay_error = RuntimeError("an upload failed")
        for _ in range(2):
            for num in (40, 300):
                assert same(other.submit(user(0.0), asked(num), 5).result(30), model.rank(user(0.0), asked(num), 5))
        counts = engine.snapshot()
        assert (counts.eager_replays, counts.eager) == (2, 1 + 2 * (1 + 3))
        assert counts.fallbacks == 0
        assert "cannot be replayed, torch does its work from here on: an upload failed" in caplog.text


def test_a_device_that_is_lost_is_begun_again_and_its_requests_are_answered_by_the_fallback(caplog):
    model, device = world(), late()
    with DeviceEngine(device, 2, wait_ms=0) as engine:
        version = load(engine, model, fallback=model.rank, retry_s=0.0)
        model.live.change([3], [ItemChange(30, on=False)])
        device.replay_error = device.capture_error = Lost("unspecified launch failure")
        for _ in range(3):
            assert same(version.submit(user(0.0), asked(40), 5).result(30), model.rank(user(0.0), asked(40), 5))
        version.put(torch.tensor([3]))
        deadline = time.monotonic() + 30
        while "still lost, next try" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.001)  # a worker tries by itself
            version.submit(user(0.0), asked(40), 5).result(30)
        device.replay_error = device.capture_error = None
        while engine.snapshot().requests == 0 and time.monotonic() < deadline:
            assert same(version.submit(user(0.0), asked(90), 5).result(30), model.rank(user(0.0), asked(90), 5))
        counts = engine.snapshot()
    assert counts.requests > 0
    assert (counts.restarts, counts.fallbacks >= 4) == (1, True)
    assert "which is lost: unspecified launch failure" in caplog.text
    assert "still lost, next try" in caplog.text


def test_without_a_fallback_the_error_says_that_the_device_failed():
    device = late()
    with DeviceEngine(device, 1) as engine:
        version = load(engine, world())
        device.replay_error = device.capture_error = Lost("gone")
        with pytest.raises(DeviceFailed, match="the device failed: gone"):
            version.submit(user(0.0), asked(40), 5).result(30)
        with pytest.raises(DeviceFailed, match="was lost, and is not back yet"):
            version.submit(user(0.0), asked(40), 5).result(30)
        device.replay_error = device.capture_error = None


def test_what_cannot_be_in_time_is_refused_at_once_by_the_times_that_were_measured():
    with DeviceEngine(CpuDevice(), 1, wait_ms=60_000) as engine:
        version = load(engine, world())
        now = time.perf_counter()
        with pytest.raises(DeviceBusy, match=r"0.001 ms would pass first.* 40 candidates about .*allow more"):
            version.submit(user(0.0), asked(40), 5, Deadline(now, 0.001))
        soon = version.submit(user(0.0), asked(40), 5, Deadline(now, 1000.0))
        assert engine.snapshot().refused == 1
        assert engine.snapshot().waiting == 1
        rest = [version.submit(user(0.0), asked(40, n), 5) for n in range(3)]
        assert all(future.result(30) is not None for future in [soon, *rest])


def test_an_end_answers_what_waits_and_takes_nothing_new():
    model = world()
    engine = DeviceEngine(CpuDevice(), 1, wait_ms=60_000)
    version = load(engine, model)
    future = version.submit(user(0.0), asked(40), 5)
    engine.close()
    assert same(future.result(0), model.rank(user(0.0), asked(40), 5))
    with pytest.raises(DeviceFailed, match="left the device"):
        version.submit(user(0.0), asked(40), 5)


def test_a_request_that_nobody_waits_for_is_not_computed():
    with DeviceEngine(CpuDevice(), 1, wait_ms=800) as engine:
        version = load(engine, world())
        late_one = version.submit(user(0.0), asked(40), 5, Deadline(time.perf_counter(), 400.0))
        left = version.submit(user(0.0), asked(40), 5)
        assert left.cancel()
        with pytest.raises(DeadlineExceeded, match="passed while it waited for the device"):
            late_one.result(30)
        version.close()  # which waits for all of its requests, and these have ended
        assert engine.snapshot().requests == 0


def test_several_requests_are_ranked_as_one_batch_and_who_is_left_waits_no_more():
    model, rows = world(), torch.cat([asked(40, n).rows for n in range(3)])
    candidates = CandidateSet(rows, rows.float(), rows >= 0)
    sides = {"u": torch.tensor([0.0, 1.0, 2.0])}
    with DeviceEngine(CpuDevice(), 1, wait_ms=300) as engine:
        version = load(engine, model)
        assert same(version.rank(sides, candidates, 5), model.rank(sides, candidates, 5))
        assert engine.snapshot().batches == 1
        nobody = stop.Stop()
        nobody.set()
        with pytest.raises(Cancelled), nobody.here():
            version.rank(sides, candidates, 5)
        version.close()
        assert engine.snapshot().requests == 3


def test_what_does_not_fit_says_what_needs_how_much_and_what_to_do():
    full = LateDevice(threading.RLock(), free=3 << 10)
    with DeviceEngine(full, 1) as engine:
        with pytest.raises(DeviceFull, match=r"GiB free, and needed are .*: what is live of 400 rows .*bfloat16"):
            load(engine, world())
        full.free = 1 << 40
        full.capture_error = torch.OutOfMemoryError("out of memory")
        with pytest.raises(DeviceFull, match=r"the largest of which is 4 x 64: out of memory; ask for smaller"):
            load(engine, world())
        full.capture_error = None
        load(engine, world()).close()


def test_workers_are_pinned_to_their_cores():
    core = min(os.sched_getaffinity(0))
    here = os.sched_getaffinity(0)
    with DeviceEngine(CpuDevice(), 2, wait_ms=0, cores=[core]) as engine:
        version = load(engine, world(), fallback=None)
        version.submit(user(0.0), asked(40), 5).result(30)
        found = [os.sched_getaffinity(thread.native_id) for thread in threading.enumerate() if "device-" in thread.name]
    assert found == [{core}] * 2
    assert os.sched_getaffinity(0) == here
