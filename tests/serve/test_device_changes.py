"""What changes while requests run: items of a version, and the version itself."""

import threading

import pytest
import torch

from prerank.serve.device import DeviceEngine
from prerank.serve.device_streams import CpuDevice
from prerank.types import CandidateSet, ItemChange
from tests.serve.late_device import LateDevice
from tests.serve.test_device import NUM_ITEMS, asked, load, same, scorer, user, world


@pytest.fixture(params=["cpu", "late"])
def device(request):
    return CpuDevice() if request.param == "cpu" else LateDevice(threading.RLock())


def in_threads(num, work, until):
    """`work(n)` again and again on `num` threads while `until()` runs here; raises what failed."""
    over, failed = threading.Event(), []

    def again(number):
        try:
            while not over.is_set():
                work(number)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=again, args=(number,)) for number in range(num)]
    for thread in threads:
        thread.start()
    try:
        until()
    finally:
        over.set()
        for thread in threads:
            thread.join(60)
    if failed:
        raise failed[0]


@pytest.mark.parametrize("num", [8, 300], ids=["shared", "cut"])
def test_a_request_sees_all_of_a_change_or_nothing_of_it(device, num):
    """The first and the last candidate change places: one is on and has the winning side, the other neither."""
    model = scorer([5.0, *[-9.0] * (num - 2), -5.0])
    first, last = torch.tensor([0]), torch.tensor([num - 1])
    model.live.change([num - 1], [ItemChange(0, on=False)])
    rows = torch.arange(num).unsqueeze(0)
    candidates = CandidateSet(rows, torch.zeros(1, num), rows >= 0)
    with DeviceEngine(device, 2, wait_ms=0.1) as engine:
        version = load(engine, model)

        def ask(number):
            top = version.submit(user(0.0), candidates, 2).result(60)
            winner = top.rows[0, 0].item()
            assert winner in (0, num - 1)
            assert (top.utility[0, 0] > 0.99).item(), "the other one's side"
            assert top.rows[0, 1].item() not in (0, num - 1), "both were on"
            return winner

        def place(on, off):
            changes = [ItemChange(0, on=True), ItemChange(0, on=False)]
            model.live.change([int(on), int(off)], changes)
            model.put_side(on, {"a": torch.tensor([5.0]), "b": torch.zeros(1, 1)})
            model.put_side(off, {"a": torch.tensor([-5.0]), "b": torch.zeros(1, 1)})
            version.put(torch.cat([on, off]), torch.cat([on, off]))

        def change():
            for turn in range(60):
                place(*((last, first) if turn % 2 == 0 else (first, last)))

        in_threads(3, ask, change)
        assert ask(0) == 0
        place(last, first)
        assert ask(0) == num - 1


def test_what_was_changed_is_known_to_every_request_that_begins_after_it(device):
    model = world()
    with DeviceEngine(device, 3, wait_ms=0) as engine:
        version = load(engine, model)
        generator = torch.Generator().manual_seed(1)
        for turn in range(30):
            rows = torch.randint(NUM_ITEMS, (5,), generator=generator).unique()
            model.live.change(rows.tolist(), [ItemChange(0, on=turn % 2 == 0, values={"bid": turn}) for _ in rows])
            version.put(rows)
            future = version.submit(user(0.0), asked(200, turn), 20)
            assert same(future.result(60), model.rank(user(0.0), asked(200, turn), 20))


def test_a_version_takes_the_place_of_another_between_two_requests_and_none_fails(device):
    models = [world(seed, shift=seed / 8) for seed in range(3)]
    with DeviceEngine(device, 2, wait_ms=0.1) as engine:
        live, switching = [(load(engine, models[0]), models[0])], threading.Lock()
        answered = {id(model): 0 for model in models}

        def ask(number):
            with switching:
                version, model = live[0]
                future = version.submit(user(0.0), asked(30 + number), 10)
            assert same(future.result(60), model.rank(user(0.0), asked(30 + number), 10))
            answered[id(model)] += 1

        def swap():
            for model in models[1:]:
                following = load(engine, model)  # beside the other, which goes on
                with switching:
                    (left, _), live[0] = live[0], (following, model)
                left.close()
                for _ in range(3):
                    ask(0)

        in_threads(3, ask, swap)
        assert all(answered.values())
        counts = engine.snapshot()
        assert (counts.fallbacks, counts.restarts, counts.eager) == (0, 0, 0)
        assert (counts.graph_bytes, counts.table_bytes, counts.buffer_bytes) == live[0][0].sizes()


def test_while_a_version_is_captured_the_other_answers():
    device = LateDevice(threading.RLock())
    model = world()
    with DeviceEngine(device, 1, wait_ms=0) as engine:
        version = load(engine, model)
        device.may_capture.clear()
        loaded = []
        loading = threading.Thread(target=lambda: loaded.append(load(engine, world(1))))
        loading.start()
        assert device.is_capturing.wait(30)
        assert same(version.submit(user(0.0), asked(40), 5).result(30), model.rank(user(0.0), asked(40), 5))
        assert not loaded
        device.may_capture.set()
        loading.join(60)
        assert loaded
        before = engine.snapshot()
        version.close()
        after = engine.snapshot()
        assert (after.graph_bytes, after.table_bytes) == (before.graph_bytes / 2, before.table_bytes / 2)
