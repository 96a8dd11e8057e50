import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from prerank.bundle.executor import DeviceRanker
from prerank.bundle.item_table import ItemTable, Room
from prerank.bundle.scorer import Scorer
from prerank.business.utility import Utility
from prerank.kernels import triton
from prerank.models.rankers import RANKERS
from prerank.models.segmented import SegmentedRanker
from prerank.serve.device import DeviceEngine
from prerank.serve.device_buckets import Buckets
from prerank.serve.device_cuda import cuda_device
from prerank.serve.device_options import Options
from prerank.serve.device_replica import Asked, Replica
from prerank.serve.device_streams import CpuDevice
from prerank.types import CandidateSet
from tests.bundle.test_executor import asked, built, scorer_of
from tests.bundle.test_scorer import ByNumber, halved, scorer
from tests.kernels.ways import IS_INTERPRETED
from tests.serve.late_device import LateDevice, Lost
from tests.serve.test_device import same


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return {"cpu": CpuDevice, "cuda": cuda_device}[request.param]()


def one(features, n):
    return {name: tensor[n : n + 1] for name, tensor in features.items()}


def by_row(top, num_rows):
    """The probabilities of winners in the order of their rows, [N, T]."""
    return torch.zeros(num_rows, top.probs.shape[-1]).index_copy(0, top.rows[0], top.probs[0])


@pytest.mark.parametrize("model", RANKERS)
@pytest.mark.parametrize(("dtype", "most"), [(None, 1e-5), (torch.bfloat16, 0.03)])
def test_every_ranker_gives_on_a_device_what_it_gives_on_the_host(world, trained, device, model, dtype, most):
    torch.manual_seed(6)
    host = scorer_of(trained, built(world, trained, model))
    num = host.items.num_items
    with torch.inference_mode(), DeviceEngine(device, 1, wait_ms=50) as engine:
        user, candidates = asked(trained, world.config, host, 3)
        sides = host.ranker.user_side(user)
        version = engine.load(host, one(sides, 0), Options(num, Buckets((num // 3, num + 5), 5 * num, 4), dtype))
        rows = CandidateSet(candidates.rows[:1], candidates.similarity[:1], candidates.valid[:1])
        futures = [version.submit(one(sides, n), rows, num) for n in range(3)]
        for n, future in enumerate(futures):
            found, wanted = future.result(60), host.rank(one(sides, n), rows, num)
            assert (by_row(found, num) - by_row(wanted, num)).abs().max() < most
            assert found.utility.dtype == found.probs.dtype == torch.float32
            worth = host.utility(found.probs, {})
            torch.testing.assert_close(found.utility, worth, rtol=1e-6, atol=0)
        assert engine.snapshot().batches == 1


def test_what_other_shapes_left_in_memory_changes_no_answer(device):
    num = 60
    resident = np.arange(num) % 3 > 0
    columns = {"a": np.arange(num, dtype=np.float32), "b": np.zeros(num, np.float32), "bid": np.ones(num, np.int64)}
    items = ItemTable.build(np.arange(num), columns, Room(cached=20, resident=resident, known=frozenset({"bid"})))
    host = Scorer(items, ByNumber(), Utility(("click", "like"), {"click": "bid"})).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.inference_mode(), DeviceEngine(device, 2, wait_ms=1) as engine:
        version = engine.load(host, {"u": torch.zeros(1)}, Options(9, Buckets((4, 10, 20), 64, 8)))
        requests = []
        for n in range(120):
            rows = torch.randint(num, (1, 1 + n % 45), generator=generator)
            values = {} if n % 2 else {"bid": torch.full(rows.shape, 1e30)}
            slots = torch.randint(-1, items.num_slots, rows.shape, generator=generator) if n % 3 else None
            requests.append(CandidateSet(rows, rows.float(), rows % 7 > 0, slots, values=values))
        side = {"u": torch.full((1,), 0.25)}
        alone = [version.submit(side, one, 9).result(60) for one in (requests[18], requests[7], *requests)]
        futures = [version.submit(side, one, 9) for one in requests]
        found = [*alone[2:], *(future.result(60) for future in futures)]
        for top, one in zip(found, [*requests, *requests], strict=True):
            assert same(top, host.rank(side, one, 9), device)
        assert engine.snapshot().fallbacks == 0


def test_requests_of_one_segment_share_a_batch_and_each_is_ranked_by_its_own(world, trained):
    torch.manual_seed(7)
    rankers = [built(world, trained, "cross_feature") for _ in range(3)]
    by = next(iter(world.config.features.context))
    host = scorer_of(trained, SegmentedRanker(by, [1, 2], rankers).eval())
    with torch.inference_mode(), DeviceEngine(CpuDevice(), 1, wait_ms=50) as engine:
        user, candidates = asked(trained, world.config, host, 4)
        user = user | {by: torch.tensor([1, 2, 0, 1])}
        sides, num = host.ranker.user_side(user), host.items.num_items
        version = engine.load(host, one(sides, 0), Options(num, Buckets((num,), 4 * num, 4)))
        rows = CandidateSet(candidates.rows[:1], candidates.similarity[:1], candidates.valid[:1])
        futures = [version.submit(one(sides, n), rows, num) for n in range(4)]
        for n, future in enumerate(futures):
            wanted = host.probs(one(user, n), rows.rows)[0]
            assert (by_row(future.result(60), num) - wanted).abs().max() < 1e-5
        assert engine.snapshot().batches == 3


def test_what_is_not_resident_is_where_the_request_says_and_else_absent(device):
    num = 6
    resident = np.array([True, False, True, True, False, True])
    columns = {"a": np.arange(num, dtype=np.float32), "b": np.zeros(num, np.float32), "bid": np.ones(num, np.int64)}
    items = ItemTable.build(np.arange(num), columns, Room(cached=3, resident=resident, known=frozenset({"bid"})))
    host = Scorer(items, ByNumber(), Utility(("click", "like"), {"click": "bid"})).eval()
    host.put_side(torch.tensor([5]), {"a": torch.tensor([9.0]), "b": torch.zeros(1, 1)})
    rows = torch.arange(num).unsqueeze(0)
    candidates = CandidateSet(rows, rows.float(), rows >= 0)
    located = replace(candidates, slots=torch.where(rows == 1, 5, items.slots_of(rows)))
    side = {"u": torch.zeros(1)}
    with torch.inference_mode(), DeviceEngine(device, 1, wait_ms=50) as engine:
        version = engine.load(host, side, Options(6, Buckets((6,), together=24)))
        futures = [version.submit(side, asks, 6) for asks in (candidates, located, candidates)]
        for future, asks in zip(futures, (candidates, located, candidates), strict=True):
            found, wanted = future.result(60), host.rank(side, asks, 6)
            for name in ("rows", "item_ids", "valid", "num_absent"):
                assert torch.equal(getattr(found, name), getattr(wanted, name))
        assert futures[1].result().rows[0, 0] == 1
        assert futures[0].result().num_absent.tolist() == [2]
        assert engine.snapshot().batches == 1


def test_a_replica_shares_no_memory_with_the_scorer_and_a_rule_reads_the_tables_that_are_updated():
    host = scorer([0.0] * 3, bid=[8, 6, 4], rules={"halved": halved(True, False, False)})
    replica = Replica(host, CpuDevice())
    rows = torch.tensor([[0, 1, 2]])
    ask = Asked({"u": torch.zeros(1)}, rows, rows >= 0)

    def utility():
        return replica.winners(replica.judge(ask), 3).utility.tolist()

    assert utility() == [[3.0, 2.0, 2.0]]
    with torch.inference_mode():
        host.item_side.a.fill_(5.0)
        host.live.pacing.fill_(0.0)
        host.items.item_ids.fill_(0)
        host.rules["halved"].worn.fill_(True)
    assert utility() == [[3.0, 2.0, 2.0]]
    staged = replica.staged(torch.tensor([1]), None)
    staged.send()
    staged.write()
    assert utility() == [[2.0, 2.0, 0.0]]


def test_an_item_in_a_row_of_slack_keeps_its_place_among_equals():
    host = scorer([0.0] * 3)
    replica = Replica(host, CpuDevice())
    host.items.item_ids[0] = 25
    staged = replica.staged(torch.tensor([0]), None)
    staged.send()
    staged.write()
    rows = torch.tensor([[0, 1, 2]])
    top = replica.winners(replica.judge(Asked({"u": torch.zeros(1)}, rows, rows >= 0)), 3)
    assert top.item_ids.tolist() == [[10, 20, 25]]


def judged(replica, side, num):
    rows = torch.arange(num).unsqueeze(0)
    there = {name: tensor.to(replica.dtype_of(tensor)) for name, tensor in side.items()}
    return replica.judge(Asked(there, rows, rows >= 0)).probs


@pytest.fixture
def interpreted(monkeypatch, tmp_path):
    """As on a GPU: what has a kernel is given to Triton."""
    if not IS_INTERPRETED:
        pytest.skip("Triton is not installed, or runs on a GPU")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton, "serves", lambda device: True)


@pytest.mark.parametrize("model", RANKERS)
@pytest.mark.usefixtures("interpreted")
@torch.inference_mode()
def test_in_half_precision_a_ranker_is_its_program_in_one_kernel_and_reads_what_is_written_anew(
    world, trained, monkeypatch, model
):
    torch.manual_seed(6)
    host = scorer_of(trained, built(world, trained, model))
    num, user = 20, asked(trained, world.config, host, 1)[0]
    side, replica = host.ranker.user_side(user), Replica(host, CpuDevice(), torch.float16)
    monkeypatch.setattr(replica.ranker._whole, "forward", lambda *sides: pytest.fail("torch ranks module by module"))
    assert (judged(replica, side, num) - host.probs(user, torch.arange(num).unsqueeze(0))).abs().max() < 0.01
    slots = torch.tensor([3])
    host.put_side(slots, {name: tensor[[4]] for name, tensor in host.item_side.tensors().items()})
    staged = replica.staged(None, slots)
    staged.send()
    staged.write()
    found = judged(replica, side, num)
    assert torch.equal(found[:, 3], found[:, 4])


@pytest.mark.usefixtures("interpreted")
@torch.inference_mode()
def test_where_a_program_has_no_kernel_torch_ranks_and_says_so_but_not_on_a_device_that_is_lost(
    world, trained, monkeypatch, caplog
):
    host = scorer_of(trained, built(world, trained, "cross_feature"))
    user = asked(trained, world.config, host, 1)[0]
    side, device = host.ranker.user_side(user), LateDevice(threading.RLock())
    error = {"raised": Lost("gone")}

    def fails(self, user_side, rows):
        raise error["raised"]

    monkeypatch.setattr(DeviceRanker, "__call__", fails)
    replica = Replica(host, device, torch.float16)
    for raised in (Lost("gone"), torch.OutOfMemoryError("full")):
        error["raised"] = raised
        with pytest.raises(type(raised)):
            judged(replica, side, 9)
    error["raised"] = RuntimeError("registers ran out")
    assert (judged(replica, side, 9) - host.probs(user, torch.arange(9).unsqueeze(0))).abs().max() < 0.01
    assert caplog.text.count("no kernel here, torch ranks module by module: registers ran out") == 1
    error["raised"] = AssertionError("is asked again")
    judged(replica, side, 9)


@pytest.mark.usefixtures("interpreted")
def test_in_float32_torch_ranks_and_in_half_precision_a_kernel_a_segment(world, trained):
    one_ranker = scorer_of(trained, built(world, trained, "cross_feature"))
    by = next(iter(world.config.features.context))
    several = SegmentedRanker(by, [1], [built(world, trained, "cross_feature") for _ in range(2)]).eval()
    assert Replica(one_ranker, CpuDevice(), torch.float16).ranker.num_fused == 1
    assert Replica(one_ranker, CpuDevice()).ranker.num_fused == 0
    assert Replica(scorer_of(trained, several), CpuDevice(), torch.float16).ranker.num_fused == 2


@pytest.mark.usefixtures("interpreted")
@torch.inference_mode()
def test_each_segments_kernel_gives_what_its_ranker_does(world, trained, monkeypatch):
    torch.manual_seed(9)
    by = next(iter(world.config.features.context))
    rankers = [built(world, trained, "cross_feature") for _ in range(2)]
    host = scorer_of(trained, SegmentedRanker(by, [1], rankers).eval())
    user, rows = asked(trained, world.config, host, 1)[0], torch.arange(20).unsqueeze(0)
    replica = Replica(host, CpuDevice(), torch.float16)
    found = []
    for segment in (0, 1):
        own = user | {by: torch.tensor([segment])}
        side = {name: one.to(replica.dtype_of(one)) for name, one in host.ranker.user_side(own).items()}
        wanted = host.probs(own, rows)
        with monkeypatch.context() as torchless:
            for one in (replica.ranker._whole, *replica.ranker._whole.each()):
                torchless.setattr(one, "forward", lambda *sides: pytest.fail("torch ranks module by module"))
            found.append(replica.judge(Asked(side, rows, rows >= 0), segment).probs)
        assert (found[-1] - wanted).abs().max() < 0.01
    assert (found[0] - found[1]).abs().max() > 0.01
