import pytest
import torch

from prerank.kernels import native
from prerank.kernels.engine import Engine, NativeProgram
from prerank.kernels.program import Builder, Gather, run
from prerank.kernels.quantized import MOST, CoarseWeight, quantized_linear
from tests.kernels.programs import made_items, made_program, made_user

LEVEL = "avx512_bf16"
SIZES = [(8, 4, 2, 3), (33, 7, 3, 16), (64, 40, 4, 32), (256, 40, 2, 5)]
ITEMS = 200
HERE = native.LEVELS[: native.LEVELS.index(native.level()) + 1]


@pytest.fixture(scope="module")
def engine():
    if LEVEL not in HERE:
        pytest.skip("no products of eight bits on this processor")
    made = Engine(2, LEVEL, int8=True)
    yield made
    made.close()


def product(engine: Engine, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + bias as the engine has it in eight bits."""
    builder = Builder()
    item = builder.add(Gather(builder.register(x.shape[1]), "x"))
    program = builder.program(builder.linear(item, weight, bias, is_coarse=True))
    return NativeProgram(program, {"x": x}, engine)({}, torch.arange(len(x)))


def made(rows: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).bfloat16().float()


@pytest.mark.parametrize("width", [1, 3, 31, 32, 33, 64, 100, 257])
@pytest.mark.parametrize("out", [1, 16, 17, 32, 50])
def test_a_native_product_of_eight_bits_is_the_references(engine, width, out):
    x, weight, bias = made(71, width, 0), made(out, width, 1), made(1, out, 2)[0]
    expected = quantized_linear(x, CoarseWeight.of(weight)) + bias
    torch.testing.assert_close(product(engine, x, weight, bias), expected, rtol=1e-5, atol=1e-5)


ADVERSARIAL = {
    "zeros": torch.zeros(5, 40),
    "all equal": torch.full((5, 40), 3.0),
    "one number": torch.eye(5, 40) * 7,
    "one is large": torch.cat([made(5, 39, 3), torch.full((5, 1), 2.0**14)], 1),
    "tiny": made(5, 40, 4) * 2.0**-90,
    "less than any": made(5, 40, 4) * 2.0**-120,
    "huge": made(5, 40, 5) * 2.0**100,
    "the largest": torch.full((5, 40), float(torch.finfo(torch.bfloat16).max)),
    "negative": -made(5, 40, 6).abs(),
}


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_no_range_of_numbers_is_cut_off(engine, name):
    x, weight = ADVERSARIAL[name], made(40, 40, 7) * 2.0**-9
    weight[3], weight[4], weight[5] = 0.0, 2.0**-7, -(2.0**-7)
    found, expected = product(engine, x, weight, None), quantized_linear(x, CoarseWeight.of(weight))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    exact = x.double() @ weight.double().t()
    most = (x.double().abs().amax(1, keepdim=True) / MOST) * weight.double().abs().sum(1)
    most = most + x.double().abs().sum(1, keepdim=True) * (weight.double().abs().amax(1) / MOST)
    assert ((found - exact).abs() <= most * 0.51 + 1e-30).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_is_nan_and_the_others_are_as_they_were(engine, bad):
    x, weight = made(40, 33, 8), made(20, 33, 9)
    well = product(engine, x, weight, None)
    x[17, 32] = bad
    found = product(engine, x, weight, None)
    assert found[17].isnan().all()
    assert quantized_linear(x, CoarseWeight.of(weight))[17].isnan().all()
    rest = torch.arange(40) != 17
    assert torch.equal(found[rest], well[rest])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num", [1, 33, 200])
def test_a_program_in_eight_bits_is_near_torchs_and_is_not_the_one_in_bfloat16(engine, size, num):
    width, _, _, dim = size
    program, items, user = made_program(*size, is_coarse=True), made_items(ITEMS, width, dim), made_user(width, dim)
    rows = torch.arange(num)
    expected = run(program, user, {name: table[rows] for name, table in items.items()})
    found = NativeProgram(program, items, engine)(user, rows)
    spread = run(program, user, items).std(0)
    assert ((found - expected).abs() < 0.1 * spread).all()
    assert ((found - expected).abs().mean(0) < 0.02 * spread).all()
    fine = NativeProgram(made_program(*size), items, engine)(user, rows)
    assert not torch.equal(found, fine)


def test_a_candidates_logits_in_eight_bits_depend_on_nothing_but_its_own_row(engine):
    program, items, user = made_program(33, 7, 3, 16, is_coarse=True), made_items(700, 33, 16), made_user(33, 16)
    ours = NativeProgram(program, items, engine)
    everything = ours(user, torch.arange(700))
    rows = torch.tensor([699, 5, 5, 0, 311])
    assert torch.equal(ours(user, rows), everything[rows])


@pytest.mark.parametrize("level", HERE)
def test_only_the_level_that_has_such_products_takes_them(level):
    program, items, user = made_program(33, 7, 3, 16, is_coarse=True), made_items(ITEMS, 33, 16), made_user(33, 16)
    found = []
    for int8 in (False, True):
        engine = Engine(1, level, int8=int8)
        assert engine.int8 == (int8 and level == LEVEL)
        found.append(NativeProgram(program, items, engine)(user, torch.arange(ITEMS)))
        engine.close()
    assert torch.equal(*found) == (level != LEVEL)
