import math

import hypothesis.extra.numpy as npst
import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from prerank.kernels.top_k import NONE, order_keys, value_and_row

floats = st.floats(width=32, allow_nan=True, allow_infinity=True)
few = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, math.nan, math.inf])


@given(npst.arrays(np.float32, st.integers(1, 40), elements=st.one_of(floats, few)), st.integers(0, 10))
def test_keys_order_as_value_then_smaller_row(values, k):
    keys = order_keys(torch.from_numpy(values)[None], torch.arange(len(values)), None)[0]
    finite = [n for n in range(len(values)) if math.isfinite(values[n])]
    expected = sorted(finite, key=lambda n: (-values[n], n))[:k]
    kept = keys.topk(min(k, len(values)))
    assert [int(n) for n, key in zip(kept.indices, kept.values, strict=True) if key != NONE] == expected


@given(npst.arrays(np.float32, 7, elements=floats), npst.arrays(np.int64, 7, elements=st.integers(0, 2**32 - 1)))
def test_a_key_gives_back_its_value_and_row(values, rows):
    finite = np.isfinite(values)
    value, row = value_and_row(order_keys(torch.from_numpy(values)[None], torch.from_numpy(rows)[None], None))
    assert value[0, finite].tolist() == values[finite].tolist()
    assert row[0, finite].tolist() == rows[finite].tolist()
    assert set(row[0, ~finite].tolist()) <= {-1}
    assert set(value[0, ~finite].tolist()) <= {-math.inf}


def test_what_is_not_valid_has_no_key():
    keys = order_keys(torch.tensor([[3.0, 2.0]]), torch.arange(2), torch.tensor([[False, True]]))
    assert (keys == NONE).tolist() == [[True, False]]
