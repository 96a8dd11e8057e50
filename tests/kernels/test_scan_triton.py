"""The scan's contract for its Triton version, interpreted or on a GPU, at sizes that an interpreter can do."""

import hypothesis.extra.numpy as npst
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prerank.kernels import scan
from tests.kernels.test_scan import DTYPES, allowed, few, is_as_expected, made, small_numbers
from tests.kernels.ways import IS_INTERPRETED

interpreted = pytest.mark.skipif(not IS_INTERPRETED, reason="Triton is not installed, or runs on a GPU")


def on_gpu(*asked):
    moved = (arg.cuda() if isinstance(arg, torch.Tensor) else arg for arg in asked)
    return tuple(tensor.cpu() for tensor in scan.scan_by_triton(*moved))


WAYS = [
    pytest.param(lambda *asked: scan.scan_by_triton(*asked), id="interpreted", marks=interpreted),
    pytest.param(on_gpu, id="on a GPU", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["all", "many", "few", "one", "none"])
def test_the_k_most_similar_eligible_rows_are_found_ties_by_the_smaller_row(way, dtype, kind):
    num, dim = 900, 17
    vectors, scales = made(num, dim, dtype)
    for num_queries, k in ((1, 3), (2, 40), (1, 1000)):  # of 15 blocks some, all, and more than there are rows
        query = torch.from_numpy(small_numbers(num_queries, dim, seed=2))
        is_as_expected(way, vectors, scales, query, k, allowed(kind, num))


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=25)
@given(data=st.data())
def test_no_value_makes_a_scan_find_what_argsort_would_not(way, data):
    num, dim = data.draw(st.integers(0, 140)), data.draw(st.sampled_from([1, 2, 5, 16, 17]))
    vectors = data.draw(npst.arrays(np.float32, (num, dim), elements=few, fill=st.just(1.0)))
    query = data.draw(npst.arrays(np.float32, (data.draw(st.integers(0, 3)), dim), elements=few, fill=st.just(1.0)))
    mask = data.draw(st.none() | npst.arrays(np.bool_, num))
    k = data.draw(st.integers(0, 80))
    with np.errstate(all="ignore"):
        is_as_expected(way, torch.from_numpy(vectors), None, torch.from_numpy(query), k, mask)


@pytest.mark.parametrize("way", WAYS)
def test_queries_that_do_not_fit_at_once_come_one_after_another(way, monkeypatch):
    pytest.importorskip("triton")
    from prerank.kernels.triton import scan as kernel

    monkeypatch.setattr(kernel, "_KEYS_AT_ONCE", 500)
    vectors, scales = made(200, 8, torch.int8)
    is_as_expected(way, vectors, scales, torch.from_numpy(small_numbers(5, 8, seed=2)), 7, allowed("many", 200))


def test_on_a_gpu_it_is_what_serves(monkeypatch):
    monkeypatch.setattr(scan.triton, "serves", lambda device: True)
    monkeypatch.setattr(scan, "scan_by_triton", lambda *asked: asked)
    asked = (torch.zeros(3, 2), None, torch.zeros(1, 2), 2, None)
    assert scan.scan_top_k(*asked) == asked
