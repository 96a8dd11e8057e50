import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prerank.kernels.gather_add import by_triton, gather_add, reference
from prerank.kernels.shapes import FLOATS
from tests.kernels.ways import ways

WAYS = ways(gather_add, reference, by_triton, operation=torch.ops.prerank.gather_add.default)


@pytest.fixture(params=WAYS)
def way(request):
    return request.param


def whole(seed: int, num_items: int, num_requests: int, num: int, width: int, crossing: int, dtype=torch.float32):
    """Whole numbers, whose sums are exact in every order and type."""
    rng = np.random.default_rng(seed)
    sizes = ((num_items, width), (num_requests, width), (num_requests, num, crossing), (width, crossing))
    table, user, met, weight = (torch.from_numpy(rng.integers(-4, 5, size)).to(dtype) for size in sizes)
    return table, torch.from_numpy(rng.integers(0, max(num_items, 1), (num_requests, num))), user, met, weight


def truth(table, rows, user, crossing, weight):
    """In float64, not rounded to the type."""
    table, user, crossing, weight = (t.double().numpy() for t in (table, user, crossing, weight))
    return table[rows.numpy()] + user[:, None] + crossing @ weight.T


def skip_where_wrong(way, dtype):
    if way is by_triton and dtype is torch.bfloat16:
        pytest.skip("Triton's interpreter gets bfloat16 wrong")


@pytest.mark.parametrize("way", WAYS)
@given(
    seed=st.integers(0, 99),
    num_items=st.integers(1, 40),
    num_requests=st.integers(0, 3),
    num=st.integers(0, 70),
    width=st.integers(0, 70),
    crossing=st.integers(0, 40),
)
def test_rows_user_and_product_are_summed(way, seed, num_items, num_requests, num, width, crossing):
    asked = whole(seed, num_items, num_requests, num, width, crossing)
    np.testing.assert_array_equal(way(*asked).numpy(), truth(*asked))
    table, rows, user, *_ = asked
    np.testing.assert_array_equal(way(table, rows, user, None, None).numpy(), truth(table, rows, user, *nothing(asked)))


def nothing(asked):
    return torch.zeros_like(asked[3]), torch.zeros_like(asked[4])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [(9, 2, 130, 130, 65), (1, 1, 1, 1, 1), (5, 1, 64, 64, 32), (5, 3, 65, 63, 31)])
def test_every_type_is_summed_whatever_tiles_the_sizes_fill(way, dtype, size):
    skip_where_wrong(way, dtype)
    asked = whole(1, *size, dtype)
    found = way(*asked)
    assert found.dtype == dtype
    assert torch.equal(found, torch.from_numpy(truth(*asked)).to(dtype))


@pytest.mark.parametrize("dtype", FLOATS)
def test_sums_are_float32_and_rounded_once(way, dtype):
    skip_where_wrong(way, dtype)
    made = torch.Generator().manual_seed(3)
    sizes = ((50, 100), (2, 100), (2, 90, 200), (100, 200))
    table, user, crossing, weight = (torch.randn(size, generator=made).to(dtype) for size in sizes)
    rows = torch.randint(0, 50, (2, 90), generator=made)
    asked = (table, rows, user, crossing, weight)
    exact, magnitude = truth(*asked), truth(*(t.abs() for t in asked))
    # half a unit in the last place, and what float32 loses on the way
    allowed = torch.finfo(dtype).eps / 2 * np.abs(exact) + 2e-6 * magnitude
    assert (np.abs(way(*asked).double().numpy() - exact) <= allowed).all()


def test_all_candidates_may_be_the_same_and_all_rows_equal(way):
    table, rows, user, crossing, weight = whole(2, 6, 2, 80, 5, 3)
    rows[:] = 4
    crossing[:] = crossing[:1, :1]
    asked = (table, rows, user, crossing, weight)
    found = way(*asked)
    np.testing.assert_array_equal(found.numpy(), truth(*asked))
    assert (found == found[:, :1]).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, where Triton is interpreted
def test_what_is_not_finite_stays_with_its_own_candidate(way):
    table, rows, user, crossing, weight = whole(3, 70, 1, 70, 40, 20)
    rows[0] = torch.arange(70)
    before = way(table, rows, user, crossing, weight)
    table[3], table[5, 7], crossing[0, 9, 2] = torch.nan, torch.inf, torch.nan
    found = way(table, rows, user, crossing, weight)
    assert found[0, [3, 9]].isnan().all()
    assert found[0, 5, 7] == torch.inf
    before[0, [3, 9]], before[0, 5, 7] = torch.nan, torch.inf
    assert torch.equal(found.nan_to_num(1e6), before.nan_to_num(1e6))


def test_tensors_may_have_any_strides(way):
    table, rows, user, crossing, weight = whole(4, 30, 3, 66, 9, 7)
    asked = (
        table.t().contiguous().t(),
        rows.t().contiguous().t(),
        user.t().contiguous().t(),
        crossing.transpose(1, 2).contiguous().transpose(1, 2),
        weight.t().contiguous().t(),
    )
    assert not any(t.is_contiguous() for t in asked)
    np.testing.assert_array_equal(way(*asked).numpy(), truth(*asked))
    part = table[:, 1::2]
    found = way(part, rows, user[:, 1::2], crossing[..., :4], weight[1::2, :4])
    np.testing.assert_array_equal(found.numpy(), truth(part, rows, user[:, 1::2], crossing[..., :4], weight[1::2, :4]))


@pytest.mark.parametrize("row", [-1, 30])
def test_a_row_there_is_not_is_refused(way, row):
    table, rows, user, crossing, weight = whole(5, 30, 1, 8, 4, 2)
    rows[0, 3] = row
    with pytest.raises(IndexError, match=r"rows: expected 0 to 29, got -?\d+ to \d+"):
        way(table, rows, user, crossing, weight)


@pytest.mark.parametrize(
    ("place", "wrong", "said"),
    [
        (0, torch.zeros(5, 4).double(), "expected table to be one of float32, float16, bfloat16, got float64"),
        (1, torch.zeros(2, 3), "expected rows int64 [B, N] on cpu, got float32 [2, 3] on cpu"),
        (2, torch.zeros(3, 4), "expected user float32 [B=2, W=4] on cpu, got float32 [3, 4] on cpu"),
        (2, torch.zeros(2, 4).half(), "expected user float32 [B=2, W=4] on cpu, got float16 [2, 4] on cpu"),
        (3, torch.zeros(2, 4, 1), "expected crossing float32 [B=2, N=3, C] on cpu, got float32 [2, 4, 1] on cpu"),
        (4, torch.zeros(4, 2), "expected weight float32 [W=4, C=1] on cpu, got float32 [4, 2] on cpu"),
        (4, None, "expected crossing and weight together or neither"),
    ],
)
@pytest.mark.parametrize("version", [gather_add, by_triton])
def test_what_does_not_fit_is_refused_before_a_kernel_sees_it(version, place, wrong, said):
    asked = [torch.zeros(5, 4), torch.zeros(2, 3).long(), torch.zeros(2, 4), torch.zeros(2, 3, 1), torch.zeros(4, 1)]
    asked[place] = wrong
    with pytest.raises(ValueError, match=re.escape(f"gather_add: {said}")):
        version(*asked)
