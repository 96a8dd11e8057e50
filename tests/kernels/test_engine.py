import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from prerank.errors import Cancelled
from prerank.kernels import native
from prerank.kernels.engine import Engine, NativeProgram
from prerank.kernels.layout import lay_out, padded, reads, writes
from prerank.kernels.program import run
from prerank.kernels.stop import Stop
from tests.kernels.programs import made_items, made_program, made_user

HERE = native.LEVELS[: native.LEVELS.index(native.level()) + 1]
SIZES = [(8, 4, 2, 3), (33, 7, 3, 16), (64, 40, 4, 32), (100, 17, 1, 5)]
ITEMS = 700


@pytest.fixture(scope="module", params=HERE)
def engine(request):
    made = Engine(2, request.param)
    yield made
    made.close()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num", [1, 31, 32, 33, 600])
def test_every_level_gives_what_torch_gives_but_for_bfloat16(engine, size, num):
    width, _, _, dim = size
    program, items, user = made_program(*size), made_items(ITEMS, width, dim), made_user(width, dim)
    rows = torch.randint(0, ITEMS, (num,), generator=torch.Generator().manual_seed(3))
    expected = run(program, user, {name: table[rows] for name, table in items.items()})
    found = NativeProgram(program, items, engine)(user, rows)
    spread = run(program, user, items).std(0)
    assert ((found - expected).abs() < 0.1 * spread).all()
    assert ((found - expected).abs().mean(0) < 0.02 * spread).all()


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_any_number_of_threads_gives_every_candidate_the_same_logits(threads):
    program, items, user = made_program(33, 7, 3, 16), made_items(ITEMS, 33, 16), made_user(33, 16)
    everything, many = {}, Engine(threads)
    for engine in (Engine(1), many):
        ours = NativeProgram(program, items, engine)
        for num in (1, 32, 127, 128, 129, 255, 256, 257, 383, 384, 385, 511, 513, 1_000, 2_303, 2_305, 9_999):
            rows = (torch.arange(num) * 37) % ITEMS
            found = ours(user, rows)
            assert torch.equal(everything.setdefault(num, found), found), num
    assert torch.equal(everything[2_305], everything[9_999][:2_305])
    many.close()


def test_no_level_rounds_otherwise_than_another_by_more_than_the_order_of_its_sums():
    program, items, user = made_program(64, 40, 4, 32), made_items(ITEMS, 64, 32), made_user(64, 32)
    found = []
    for level in HERE:
        engine = Engine(1, level)
        found.append(NativeProgram(program, items, engine)(user, torch.arange(ITEMS)))
        engine.close()
    for one in found[1:]:
        assert (one - found[0]).abs().mean() < 2e-3


def test_a_candidates_logits_depend_on_nothing_but_its_own_row(engine):
    program, items, user = made_program(33, 7, 3, 16), made_items(ITEMS, 33, 16), made_user(33, 16)
    native_program = NativeProgram(program, items, engine)
    everything = native_program(user, torch.arange(ITEMS))
    rows = torch.tensor([699, 5, 5, 0, 311])
    assert torch.equal(native_program(user, rows), everything[rows])
    poisoned = items["x"].clone()
    poisoned[311] = torch.nan
    poisoned[312] = torch.inf
    found = NativeProgram(program, items | {"x": poisoned}, engine)(user, torch.arange(ITEMS))
    well = torch.ones(ITEMS, dtype=torch.bool)
    well[[311, 312]] = False
    assert torch.equal(found[well], everything[well])
    assert found[311].isnan().all()
    assert not found[312].isfinite().any()


@pytest.mark.parametrize("name", ["x", "q"])
def test_a_table_may_be_bfloat16(engine, name):
    program, items, user = made_program(33, 7, 3, 16), made_items(ITEMS, 33, 16), made_user(33, 16)
    narrow = items | {name: items[name].bfloat16()}
    wide = items | {name: items[name].bfloat16().float()}
    found, expected = (NativeProgram(program, tables, engine)(user, torch.arange(ITEMS)) for tables in (narrow, wide))
    assert torch.equal(found, expected)


def test_requests_that_come_at_once_each_get_their_own_answer(engine):
    program, items = made_program(33, 7, 3, 16), made_items(ITEMS, 33, 16)
    native_program = NativeProgram(program, items, engine)
    users = [made_user(33, 16, seed) for seed in range(12)]
    asked = [torch.arange(seed, ITEMS, 1 + seed % 3) for seed in range(12)]
    alone = list(map(native_program, users, asked))
    with ThreadPoolExecutor(6) as pool:
        for _ in range(5):
            for found, expected in zip(pool.map(native_program, users, asked), alone, strict=True):
                assert torch.equal(found, expected)


def test_a_request_that_nobody_waits_for_ends_and_others_do_not(engine):
    size = SIZES[2]
    program, items, user = made_program(*size), made_items(ITEMS, size[0], size[3]), made_user(size[0], size[3])
    native_program = NativeProgram(program, items, engine)
    start = time.perf_counter()
    native_program(user, torch.arange(20_000) % ITEMS)
    many = int(20_000 * 0.5 / (time.perf_counter() - start))  # half a second's work at any level
    rows = torch.arange(many) % ITEMS

    def asked(stop: Stop) -> float:
        start = time.perf_counter()
        with stop.here():
            native_program(user, rows)
        return time.perf_counter() - start

    whole_s = asked(Stop())
    left = Stop()
    threading.Timer(whole_s / 10, left.set).start()
    start = time.perf_counter()
    with pytest.raises(Cancelled):
        asked(left)
    assert time.perf_counter() - start < 0.6 * whole_s
    with pytest.raises(Cancelled):
        asked(left)
    start = time.perf_counter()
    with pytest.raises(Cancelled), Stop().here(whole_s / 10):
        native_program(user, rows)
    assert whole_s / 10 <= time.perf_counter() - start < 0.6 * whole_s
    assert torch.equal(native_program(user, rows[:700]), native_program(user, torch.arange(700)))


def test_histories_may_be_longer_in_another_request(engine):
    program, items, user = made_program(8, 4, 2, 3), made_items(ITEMS, 8, 3), made_user(8, 3)
    native_program = NativeProgram(program, items, engine)
    more = user | {"codes": torch.cat([user["codes"], user["codes"]])}
    for one in (user, more, user):
        found, expected = native_program(one, torch.arange(ITEMS)), run(program, one, items)
        assert ((found - expected).abs().mean(0) < 0.02 * expected.std(0)).all()


def test_no_candidates_have_no_logits(engine):
    program, items, user = made_program(8, 4, 2, 3), made_items(ITEMS, 8, 3), made_user(8, 3)
    assert NativeProgram(program, items, engine)(user, torch.zeros(0, dtype=torch.int64)).shape == (0, 2)


@pytest.mark.parametrize("row", [-1, ITEMS])
def test_a_row_the_tables_do_not_have_is_refused_before_native_code_sees_it(engine, row):
    program, items, user = made_program(8, 4, 2, 3), made_items(ITEMS, 8, 3), made_user(8, 3)
    with pytest.raises(IndexError, match=f"expected 0 to {ITEMS - 1}, got"):
        NativeProgram(program, items, engine)(user, torch.tensor([3, row]))


def test_a_level_this_processor_lacks_and_no_threads_are_refused():
    for threads, level in ((0, None), (1, "none such")):
        with pytest.raises(ValueError, match="expected at least one thread and a level up to"):
            Engine(threads, level)


@pytest.mark.parametrize("size", SIZES)
def test_no_two_registers_that_are_kept_at_once_share_memory(size):
    program = made_program(*size)
    layout = lay_out(program)
    last = {part.register: n for n, step in enumerate(program.steps) for part, _ in reads(step)}
    last[program.logits.register] = len(program.steps)
    first: dict[int, int] = {}
    for n, step in enumerate(program.steps):
        for part in writes(step):
            first.setdefault(part.register, n)
    pieces = []
    for register, place in enumerate(layout.places):
        for at, size_each in ((place.f32, 4), (place.bf16, 2)):
            if at >= 0:
                pieces.append((first[register], last[register], at, at + place.ld * size_each))
    for n, (born, dead, low, high) in enumerate(pieces):
        assert high <= layout.row_bytes
        for other_born, other_dead, other_low, other_high in pieces[:n]:
            is_together = born <= other_dead and other_born <= dead
            assert not is_together or high <= other_low or other_high <= low
    assert all(
        place.ld == padded(place.ld) >= width for place, width in zip(layout.places, program.widths, strict=True)
    )
