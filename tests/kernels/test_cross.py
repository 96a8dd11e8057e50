import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prerank.kernels.cross import by_triton, cross_layer, reference
from prerank.kernels.shapes import FLOATS
from prerank.models.layers import LowRankCrossLayer
from tests.kernels.ways import ways

WAYS = ways(cross_layer, reference, by_triton, operation=torch.ops.prerank.cross_layer.default)


@pytest.fixture(params=WAYS)
def way(request):
    return request.param


def whole(seed: int, num: int, width: int, rank: int, dtype=torch.float32):
    """Small whole numbers, whose sums are exact in every order."""
    rng = np.random.default_rng(seed)
    sizes = ((num, width, 3), (num, width, 2), (rank, width, 2), (width, rank, 2), (width, 4))
    return [torch.from_numpy(rng.integers(1 - most, most, size)).to(dtype) for *size, most in sizes]


def truth(x0, x, narrow, widen, bias):
    """In float64; what lies between the products is rounded to the type, and so is the answer."""
    dtype = x.dtype
    x0, x, narrow, widen, bias = (t.double().numpy() for t in (x0, x, narrow, widen, bias))
    thin = torch.from_numpy(x @ narrow.T).to(dtype).double().numpy()
    return torch.from_numpy(x0 * (thin @ widen.T + bias) + x).to(dtype)


def skip_where_wrong(way, dtype):
    if way is by_triton and dtype is torch.bfloat16:
        pytest.skip("Triton's interpreter gets bfloat16 wrong")


@pytest.mark.parametrize("way", WAYS)
@given(seed=st.integers(0, 99), num=st.integers(0, 70), width=st.integers(0, 70), rank=st.integers(0, 40))
def test_it_is_the_first_input_times_two_products_and_a_bias_plus_the_input(way, seed, num, width, rank):
    asked = whole(seed, num, width, rank)
    assert torch.equal(way(*asked), truth(*asked))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [(1, 1, 1), (32, 64, 16), (33, 65, 17), (31, 63, 128), (65, 130, 129)])
def test_every_type_and_rank_is_multiplied_whatever_tiles_the_sizes_fill(way, dtype, size):
    skip_where_wrong(way, dtype)
    asked = whole(1, *size, dtype)
    found = way(*asked)
    assert found.dtype == dtype
    assert torch.equal(found, truth(*asked))


def test_it_is_the_rankers_own_layer_but_for_the_order_of_sums(way):
    torch.manual_seed(2)
    layer, x0, x = LowRankCrossLayer(96, 24), torch.randn(70, 96), torch.randn(70, 96)
    with torch.no_grad():
        found = way(x0, x, layer.narrow.weight, layer.widen.weight, layer.widen.bias)
        # a product in TensorFloat-32 would be wrong by a hundred times this
        assert (found - layer(x0, x)).abs().max() < 5e-6


@pytest.mark.parametrize("dtype", FLOATS)
def test_all_candidates_may_be_equal(way, dtype):
    skip_where_wrong(way, dtype)
    x0, x, *weights = whole(3, 1, 40, 8, dtype)
    found = way(x0.expand(50, 40), x.expand(50, 40), *weights)
    assert torch.equal(found, truth(x0, x, *weights).expand(50, 40))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, where Triton is interpreted
@pytest.mark.parametrize("rank", [2, 17])
def test_what_is_not_finite_stays_with_its_own_candidate_and_is_what_arithmetic_makes_of_it(way, rank):
    x0, x, narrow, widen, bias = whole(4, 40, 70, rank)
    narrow, widen = torch.ones_like(narrow), torch.ones_like(widen)
    x0, bias = x0.abs() + 1, bias.abs()
    before = way(x0, x, narrow, widen, bias)
    x[3, 5], x[4, 6], x0[7, 8] = torch.inf, torch.nan, -torch.inf
    found = way(x0, x, narrow, widen, bias)
    assert (found[3] == torch.inf).all()
    assert found[4].isnan().all()
    assert not found[7, 8].isfinite()
    before[3], before[4], before[7, 8] = found[3], found[4], found[7, 8]
    assert torch.equal(found.nan_to_num(1e6), before.nan_to_num(1e6))


def test_tensors_may_have_any_strides(way):
    asked = [t.t().contiguous().t() if t.dim() == 2 else t.repeat_interleave(2)[::2] for t in whole(5, 40, 20, 6)]
    assert not any(t.is_contiguous() for t in asked)
    assert torch.equal(way(*asked), truth(*asked))


@pytest.mark.parametrize(
    ("place", "wrong", "said"),
    [
        (0, torch.zeros(3, 4).int(), "expected x0 to be one of float32, float16, bfloat16, got int32"),
        (1, torch.zeros(2, 4), "expected x float32 [N=3, W=4] on cpu, got float32 [2, 4] on cpu"),
        (1, torch.zeros(3, 4).half(), "expected x float32 [N=3, W=4] on cpu, got float16 [3, 4] on cpu"),
        (2, torch.zeros(4, 2), "expected narrow float32 [R, W=4] on cpu, got float32 [4, 2] on cpu"),
        (3, torch.zeros(2, 4), "expected widen float32 [W=4, R=2] on cpu, got float32 [2, 4] on cpu"),
        (4, torch.zeros(4, 1), "expected bias float32 [W=4] on cpu, got float32 [4, 1] on cpu"),
    ],
)
@pytest.mark.parametrize("version", [cross_layer, by_triton])
def test_what_does_not_fit_is_refused_before_a_kernel_sees_it(version, place, wrong, said):
    asked = [torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(2, 4), torch.zeros(4, 2), torch.zeros(4)]
    asked[place] = wrong
    with pytest.raises(ValueError, match=re.escape(f"cross_layer: {said}")):
        version(*asked)
