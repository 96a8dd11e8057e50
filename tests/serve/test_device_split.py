"""An item table split by rows over several devices of a process: the answers of one scorer of all rows."""

import threading
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prerank.errors import BundleError, ConfigError, DeviceFailed, DeviceFull, NotOnDevice
from prerank.serve.device import DeviceEngine
from prerank.serve.device_bundle import OnDevice
from prerank.serve.device_options import Options
from prerank.serve.device_replica import Replica
from prerank.serve.device_split import DeviceSplit
from prerank.serve.device_streams import CpuDevice
from prerank.serve.funnel import Funnel
from prerank.types import CandidateSet, ItemChange
from tests.serve.late_device import LateDevice, Lost
from tests.serve.test_device import BUCKETS, LIKE, NUM_ITEMS, asked, same, user, world
from tests.serve.test_device_row_shards import stacked
from tests.serve.test_device_segments import SEGMENTS, segmented
from tests.serve.test_device_segments import user as user_of
from tests.serve.test_inventory import REQUEST, new
from tests.serve.whole import published


def late(name):
    return LateDevice(threading.RLock(), name=name)


@pytest.fixture(scope="module")
def split():
    """A table split over these devices, which ends with the tests."""
    with ExitStack() as ends:

        def opened(*devices, workers=1):
            engines = [ends.enter_context(DeviceEngine(one, workers, wait_ms=0)) for one in devices]
            return ends.enter_context(DeviceSplit(engines))

        yield opened


def load(engine, model, like=LIKE, **changes):
    return engine.load(model, like, replace(Options(20, BUCKETS), **changes))


@pytest.mark.parametrize("make", [CpuDevice, late])
@pytest.mark.parametrize("num", [1, 2, 3])
def test_every_request_is_answered_as_the_scorer_would_whatever_its_size(split, make, num):
    model = world()
    engine = split(*(make(f"{make.__name__} {num}.{at}") for at in range(num)), workers=2)
    version = load(engine, model)
    every, last = torch.arange(NUM_ITEMS)[None], torch.arange(NUM_ITEMS - 9, NUM_ITEMS)[None]  # one shard's alone
    requests = [(user(n / 10), asked(n, n, n % 2 == 0), k) for n in (0, 1, 31, 32, 129, 301) for k in (0, 1, 20)]
    requests += [({"u": torch.arange(4.0)}, stacked([40, 0, 7, 300], own), 20) for own in (False, True)]
    requests += [(user(0.5), CandidateSet(rows, rows.float(), rows >= 0), 400) for rows in (every, last)]
    for request in requests:
        assert same(version.rank(*request), model.rank(*request))
    counts = engine.snapshot()
    assert (counts.fallbacks, counts.eager, counts.cut) == (0, 0, 0)
    assert counts.candidates == sum(int(candidates.valid.sum()) for _, candidates, _ in requests)
    assert set(engine.snapshots()) == {f"{make.__name__} {num}.{at}" for at in range(num)}


def test_each_device_has_its_rows_and_no_others(split):
    model = world()
    alone = split(CpuDevice("alone"))
    whole, one = load(alone, model), split(CpuDevice("a"), CpuDevice("b"), CpuDevice("c"))
    three = load(one, model)
    assert three.name == "a+b+c"
    parts = [each.table_bytes for each in one.snapshots().values()]
    assert max(parts) < 0.4 * alone.snapshot().table_bytes
    whole.close()
    three.close()
    assert one.snapshot().table_bytes == 0


CHANGES = st.lists(
    st.builds(
        ItemChange,
        st.integers(0, NUM_ITEMS - 1).map(lambda row: 10 * row),
        on=st.booleans(),
        pacing=st.sampled_from([0.5, 1.0]),
        values=st.sampled_from([{}, {"bid": 3.0}]),
    ),
    min_size=1,
    max_size=5,
)


@given(data=st.data())
def test_what_changes_is_known_wherever_the_row_is(split, data):
    model = world()
    version = load(split(late("first"), late("second"), late("third")), model)
    model.tell(version.put)
    for seed in range(2):
        changes = data.draw(CHANGES)
        model.live.change([one.item_id // 10 for one in changes], changes)
        slots = torch.tensor(data.draw(st.lists(st.integers(0, NUM_ITEMS - 1), min_size=1, max_size=3, unique=True)))
        sides = {"a": torch.full((len(slots),), 2.0), "b": torch.ones(len(slots), 1)}
        model.put_side(slots, sides)
        rows = torch.cat([slots, torch.tensor([one.item_id // 10 for one in changes]), asked(90, seed).rows[0]])[None]
        candidates = CandidateSet(rows, rows.float(), rows >= 0)
        assert same(version.rank(user(0.5), candidates, 20), model.rank(user(0.5), candidates, 20))
    version.close()


def test_a_ranker_by_segments_is_split_too(split):
    model = segmented()
    version = load(split(CpuDevice("left"), CpuDevice("right")), model, like=user_of(model, 0.0, 0))
    sides = model.ranker.user_side({"u": torch.tensor([0.0, 1.0, 2.0, 0.5]), "tab": torch.tensor([8, 1, 5, 8])})
    candidates = stacked([40, 7, 0, 130])
    assert same(version.rank(sides, candidates, 20), model.rank(sides, candidates, 20))
    for segment in range(SEGMENTS):
        side = user_of(model, 0.1, segment)
        assert same(version.rank(side, asked(70), 9), model.rank(side, asked(70), 9))


def test_where_one_device_is_lost_the_host_ranks_until_it_is_back(split):
    model, devices = world(), [late("there"), late("lost")]
    engine = split(*devices)
    version = load(engine, model, fallback=model.rank, retry_s=0.0)
    alone = load(split(late("other"), lost := late("gone")), model)
    for one in (devices[1], lost):
        one.replay_error = one.capture_error = Lost("gone")
    for number in (1, 2):
        assert same(version.rank(user(0.0), asked(90), 5), model.rank(user(0.0), asked(90), 5))
        assert engine.snapshot().fallbacks == number
    with pytest.raises(DeviceFailed, match="the device failed: gone"):
        alone.rank(user(0.0), asked(90), 5)
    model.live.change([NUM_ITEMS - 1], [ItemChange(10 * NUM_ITEMS - 10, on=False)])
    version.put(torch.tensor([NUM_ITEMS - 1]))
    devices[1].replay_error = devices[1].capture_error = None
    for shard in version._shards:
        shard._revive()
    rows = torch.arange(NUM_ITEMS)[None]
    candidates = CandidateSet(rows, rows.float(), rows >= 0)
    assert same(version.rank(user(0.0), candidates, 20), model.rank(user(0.0), candidates, 20))
    assert engine.snapshot().fallbacks == 2


def test_what_the_devices_have_no_rows_of_the_host_answers(split):
    model = world()
    version = load(split(CpuDevice("x"), CpuDevice("y")), model)
    those = asked(5)
    for candidates in (replace(those, slots=those.rows), replace(those, rows=torch.full((1, 5), NUM_ITEMS))):
        with pytest.raises(DeviceFailed, match="say where features are, or a row is none"):
            version.rank(user(0.0), candidates, 3)


def test_what_cannot_be_split_is_refused(split, tmp_path):
    engine = split(CpuDevice("1"), CpuDevice("2"))
    with pytest.raises(NotOnDevice, match="--device-shards: each device has a part of the items; leave it out"):
        Funnel.open(published(tmp_path / "tiny"), workers=0, device=OnDevice(engine, None, BUCKETS, whole=True))
    many = split(*(CpuDevice(f"of many {n}") for n in range(NUM_ITEMS + 1)))
    with pytest.raises(ConfigError, match="400 rows cannot be split over 401 devices"):
        load(many, world())
    small = split(late("small"), LateDevice(threading.RLock(), free=10, name="full"))
    with pytest.raises(DeviceFull, match="keep fewer items resident"):
        load(small, world())
    assert small.snapshot().table_bytes == 0


def test_a_funnel_ranks_on_devices_that_have_a_part_each_and_items_come_and_move(split, tmp_path):
    stores = [published(tmp_path / name, inventory={"slack": 4}) for name in "ab"]  # which are the rows of the third
    place = OnDevice(split(CpuDevice("p"), CpuDevice("q"), CpuDevice("r")), None, BUCKETS)
    with (
        Funnel.open(stores[0], workers=0) as host,
        Funnel.open(stores[1], workers=0, device=place) as funnel,
    ):
        assert funnel.ranks_by == "p+q+r"
        best = None
        for changes in ([], [new(500)], [new(101), ItemChange(500, pacing=0.5)], [ItemChange(500, removed=True)]):
            for one in (host, funnel) if changes else ():
                one.change(changes)
            wanted = [(one.item_id, one.utility_micros) for one in host.recommend(REQUEST).winners]
            answer = funnel.recommend(REQUEST)
            assert [(one.item_id, pytest.approx(one.utility_micros, rel=1e-5)) for one in answer.winners] == wanted
            assert not answer.degraded
            assert wanted != best
            best = wanted
        counts = place.engine.snapshot()
        assert (counts.fallbacks, counts.eager) == (0, 0)
        assert all(one.requests for one in place.engine.snapshots().values())


def test_a_version_whose_parts_are_far_off_is_not_served(split, tmp_path, monkeypatch):
    right = Replica.judge

    def wrong(self, asked, segment=None):
        judged = right(self, asked, segment)
        return replace(judged, probs=1 - judged.probs)

    monkeypatch.setattr(Replica, "judge", wrong)
    engine = split(CpuDevice("m"), CpuDevice("n"))
    with pytest.raises(BundleError, match=r"the kernels of m\+n are far off: golden request 0"):
        Funnel.open(published(tmp_path / "tiny"), workers=0, device=OnDevice(engine, None, BUCKETS))
    assert engine.snapshot().table_bytes == 0
