"""A program in one kernel, interpreted where there is no GPU, and in torch: one contract."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prerank.kernels import triton
from prerank.kernels.device_program import DeviceProgram, by_triton, reference
from prerank.kernels.program import Builder, Gather, Linear, run
from tests.kernels.programs import made_items, made_program, made_user
from tests.kernels.ways import IS_INTERPRETED

SIZES = [(8, 4, 2, 3), (33, 7, 3, 16), (64, 40, 1, 32), (150, 65, 2, 5)]
REQUESTS = 2
ITEMS = 90


@pytest.fixture(autouse=True, scope="module")
def _sources(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("sources")))
        yield


@pytest.fixture(autouse=True)
def _interpreted_or_on_a_gpu(request):
    if not IS_INTERPRETED and "gpu" not in request.keywords:
        pytest.skip("Triton is not installed, or runs on a GPU")


@pytest.fixture
def interpreted(monkeypatch):
    """As on a GPU: what is asked for is given to Triton."""
    monkeypatch.setattr(triton, "serves", lambda device: True)


@pytest.fixture(params=["values", "scratch"])
def held(request, monkeypatch):
    """Where a tile holds its registers: as many as it takes, or none that may be elsewhere."""
    from prerank.kernels.triton import program

    monkeypatch.setattr(program, "_BUDGET", {"values": 1 << 20, "scratch": 0}[request.param])


def made(size):
    width, _, _, dim = size
    return made_program(*size), made_items(ITEMS, width, dim), [made_user(width, dim, seed) for seed in range(REQUESTS)]


def batch(users):
    return {name: torch.stack([user[name] for user in users]) for name in users[0]}


def expected_of(program, items, users, rows):
    return torch.stack(
        [
            run(program, user, {name: table[own] for name, table in items.items()})
            for user, own in zip(users, rows, strict=True)
        ]
    )


def assert_close(found, expected):
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max().clamp_min(1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num", [1, 65])
@pytest.mark.usefixtures("held")
def test_every_request_of_a_batch_gets_what_torch_gives(size, num):
    program, items, users = made(size)
    rows = torch.randint(0, ITEMS, (REQUESTS, num), generator=torch.Generator().manual_seed(num))
    found = by_triton(program, items, torch.float32)(batch(users), rows)
    assert_close(found, expected_of(program, items, users, rows))
    assert_close(reference(program, items, batch(users), rows), expected_of(program, items, users, rows))


@settings(max_examples=8)
@given(
    size=st.tuples(st.integers(2, 80), st.integers(1, 70), st.integers(1, 3), st.integers(1, 20)),
    num=st.integers(1, 20),
    budget=st.sampled_from([0, 200, 1 << 20]),
)
def test_registers_may_be_of_any_width(size, num, budget):
    from prerank.kernels.triton import program as kernel

    program, items, users = made(size)
    rows = torch.randint(0, ITEMS, (1, num))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "_BUDGET", budget)
        found = by_triton(program, items, torch.float32)(batch(users[:1]), rows)
    assert_close(found, expected_of(program, items, users[:1], rows))


@pytest.mark.usefixtures("interpreted")
def test_one_request_may_come_without_the_axis_of_requests():
    program, items, users = made(SIZES[1])
    device, rows = DeviceProgram(program, items, torch.float32), torch.tensor([3, 3, 0, 89, 3])
    found = device(users[1], rows)
    assert torch.equal(found, device(batch(users), rows.expand(REQUESTS, 5))[1])
    assert torch.equal(found[[0, 1]], found[[4, 4]])


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 7)])
def test_no_candidates_have_no_logits(shape):
    program, items, users = made(SIZES[0])
    user = users[0] if len(shape) == 1 else {name: t[: shape[0]] for name, t in batch(users).items()}
    rows = torch.zeros(shape, dtype=torch.int64)
    assert DeviceProgram(program, items)(user, rows).shape == (*shape, 2)
    assert partial(reference, program, items)(batch(users), torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0, 2)


@pytest.mark.parametrize("serves", [False, True])
def test_a_row_the_tables_do_not_have_gets_nan_and_harms_no_other(serves, monkeypatch):
    monkeypatch.setattr(triton, "serves", lambda device: serves)
    program, items, users = made(SIZES[1])
    device = DeviceProgram(program, items, torch.float32)
    found = device(users[0], torch.tensor([5, -1, 7, ITEMS]))
    assert found[[1, 3]].isnan().all()
    assert torch.equal(found[[0, 2]], device(users[0], torch.tensor([5, 0, 7, 0]))[[0, 2]])


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, where Triton is interpreted
@pytest.mark.usefixtures("held")
def test_what_is_not_finite_stays_with_its_own_candidate():
    program, items, users = made(SIZES[1])
    before = by_triton(program, items, torch.float32)(batch(users), torch.arange(ITEMS).expand(REQUESTS, ITEMS))
    poisoned = items["x"].clone()
    poisoned[11], poisoned[12, 3] = torch.nan, torch.inf
    found = by_triton(program, items | {"x": poisoned}, torch.float32)(
        batch(users), torch.arange(ITEMS).expand(REQUESTS, ITEMS)
    )
    well = torch.ones(ITEMS, dtype=torch.bool)
    well[[11, 12]] = False
    assert torch.equal(found[:, well], before[:, well])
    assert not found[:, [11, 12]].isfinite().any()


@pytest.mark.usefixtures("interpreted")
def test_histories_may_be_longer_in_another_request():
    program, items, users = made(SIZES[0])
    device, rows = DeviceProgram(program, items, torch.float32), torch.arange(ITEMS)
    more = users[0] | {"codes": torch.cat([users[0]["codes"]] * 4)}
    for user in (users[0], more, users[0]):
        assert_close(device(user, rows), run(program, user, items))


@pytest.mark.usefixtures("interpreted")
def test_a_changed_row_counts_once_it_is_read_again():
    program, items, users = made(SIZES[2])
    items, rows = {name: table.clone() for name, table in items.items()}, torch.arange(ITEMS)
    device = DeviceProgram(program, items, torch.float16)
    before = device(users[0], rows)
    items["q"][7], items["x"][8] = 3.0, 0.5
    found = device(users[0], rows)  # queries are copied as float16, x is read in full where it is
    assert torch.equal(found[7], before[7])
    assert not torch.equal(found[8], before[8])
    device.update(torch.tensor([7]))
    again = device(users[0], rows)
    assert not torch.equal(again[7], before[7])
    others = torch.ones(ITEMS, dtype=torch.bool)
    others[[7, 8]] = False
    assert torch.equal(again[others], before[others])


@pytest.mark.usefixtures("held")
def test_products_may_be_of_half_precision():
    program, items, users = made(SIZES[3])
    rows = torch.arange(ITEMS).expand(REQUESTS, ITEMS)
    found = by_triton(program, items, torch.float16)(batch(users), rows)
    expected = expected_of(program, items, users, rows)
    assert 0 < (found - expected).abs().mean() < 0.005 * expected.std()


@pytest.mark.usefixtures("interpreted")
def test_launches_one_after_another_use_the_same_scratch(monkeypatch):
    from prerank.kernels.triton import program as kernel

    monkeypatch.setattr(kernel, "_BUDGET", 0)
    program, items, users = made(SIZES[0])
    rows = torch.randint(0, ITEMS, (REQUESTS, 130))
    found = {}
    for at_once in (1, 2, 100):
        monkeypatch.setattr(kernel, "_programs", lambda device, at_once=at_once: at_once)
        found[at_once] = DeviceProgram(program, items, torch.float32)(batch(users), rows)
    assert torch.equal(found[1], found[100])
    assert torch.equal(found[2], found[100])


@pytest.mark.usefixtures("interpreted")
def test_a_register_may_be_gathered_in_part_and_computed_in_part():
    builder = Builder()
    x = builder.register(40)
    builder.add(Gather(x.columns(0, 10), "x"))
    builder.add(Linear(x.columns(10, 30), x.columns(0, 10), torch.randn(30, 10)))
    program = builder.program(builder.linear(x, torch.randn(3, 40), torch.randn(3)))
    items = {"x": torch.randn(ITEMS, 10)}
    found = DeviceProgram(program, items, torch.float32)({"u": torch.zeros(1)}, torch.arange(ITEMS))
    assert_close(found, run(program, {}, items))


def test_a_source_is_told_in_words_and_written_once():
    from prerank.kernels.triton.program import FusedProgram

    program, items, _ = made(SIZES[0])
    one, other = (FusedProgram(program, items, torch.float32) for _ in range(2))
    assert one.source.text == other.source.text
    said = [line for line in one.source.text.splitlines() if line.strip().startswith("# ")]
    assert len(said) == len(program.steps) + 1
    assert said[0] == "    # 0: r0[0:8] = gather 'x'"


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float32, 1e-5), (torch.float16, 0.02), (torch.bfloat16, 0.1)], ids=str
)
@pytest.mark.parametrize("size", [*SIZES, (256, 64, 4, 16)])
def test_on_a_gpu_it_is_what_torch_gives_but_for_the_types_rounding(size, dtype, most):
    program, items, users = made(size)
    rows = torch.randint(0, ITEMS, (REQUESTS, 3000), generator=torch.Generator().manual_seed(5))
    device = DeviceProgram(program, {name: table.cuda() for name, table in items.items()}, dtype)
    expected = expected_of(program, items, users, rows)
    for _ in range(3):  # the scratch of before is written again
        found = device({name: tensor.cuda() for name, tensor in batch(users).items()}, rows.cuda())
        assert ((found.cpu() - expected).abs() <= most * expected.std()).all()


@pytest.mark.gpu
def test_on_a_gpu_a_launch_can_be_captured_and_replayed():
    program, items, users = made(SIZES[3])
    device = DeviceProgram(program, {name: table.cuda() for name, table in items.items()})
    user = {name: tensor.cuda() for name, tensor in batch(users).items()}
    rows = torch.zeros(REQUESTS, 3000, dtype=torch.int64, device="cuda")
    device(user, rows)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = device(user, rows)
    rows.copy_(torch.randint(0, ITEMS, rows.shape))
    graph.replay()
    assert torch.equal(found, device(user, rows))


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (torch.zeros(ITEMS, 8, dtype=torch.float64), "expected table 'x' to be one of float32, float16, bfloat16"),
        (torch.zeros(8, ITEMS).t(), "expected table 'x' to be contiguous"),
        (torch.zeros(ITEMS, 8, device="meta"), "expected every table on one device, got them on"),
    ],
)
def test_tables_the_kernel_cannot_read_are_refused(table, said):
    program, items, _ = made(SIZES[0])
    with pytest.raises(ValueError, match=said):
        DeviceProgram(program, items | {"x": table})


@pytest.mark.usefixtures("held")
def test_there_may_be_more_tasks_than_a_piece_has_columns():
    builder = Builder()
    x = builder.add(Gather(builder.register(10), "x"))
    program = builder.program(builder.linear(x, torch.randn(150, 10), torch.randn(150)))
    items, rows = {"x": torch.randn(ITEMS, 10)}, torch.arange(ITEMS)
    found = by_triton(program, items, torch.float32)({"u": torch.zeros(1, 1)}, rows.unsqueeze(0))[0]
    assert_close(found, run(program, {}, items))
