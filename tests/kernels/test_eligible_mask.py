from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prerank.kernels.eligible import reference as rows_of
from prerank.kernels.eligible_mask import by_triton, eligible_mask, reference
from tests.kernels.test_eligible import GROUPS, SIZES, groups_of, made
from tests.kernels.ways import ways

EVERY = ways(eligible_mask, reference, by_triton)


def longer(groups, more):
    """What is asked, and after it so much of what is not."""
    chosen, starts, inverted = groups_of(groups)
    return torch.cat([chosen, torch.zeros(more, dtype=torch.int32)]), starts, inverted


@pytest.mark.parametrize("mask_of", EVERY)
@given(num_items=st.integers(0, 300), groups=GROUPS, seed=st.integers(0, 99), more=st.integers(0, 3))
def test_the_mask_has_the_eligible_rows_and_what_is_past_the_last_group_counts_for_nothing(
    mask_of, num_items, groups, seed, more
):
    bitmaps = made(num_items, 5, seed)[1]
    found = mask_of(bitmaps, *longer(groups, more), num_items)
    assert (found.dtype, found.shape) == (torch.bool, (num_items,))
    assert torch.equal(found.nonzero().flatten(), rows_of(bitmaps, *groups_of(groups), num_items))


@pytest.mark.parametrize("mask_of", EVERY)
@pytest.mark.parametrize("num_items", SIZES)
def test_blocks_and_words_end_where_the_items_do(mask_of, num_items):
    bitmaps = made(num_items, 5, seed=num_items)[1]
    asked = partial(longer, [([0, 1], False), ([2, 0], False), ([3], True)])
    wanted = rows_of(bitmaps, *asked(0), num_items)
    assert torch.equal(mask_of(bitmaps, *asked(2), num_items).nonzero().flatten(), wanted)


def test_what_does_not_fit_together_is_refused():
    bitmaps = made(70, 2, seed=1)[1]
    chosen, starts, inverted = groups_of([([0], False)])
    eligible_mask(bitmaps, chosen, starts, inverted, 70)
    for wrong in [
        (bitmaps[:, :1], chosen, starts, inverted),
        (bitmaps, chosen.long(), starts, inverted),
        (bitmaps, chosen, starts[:1], inverted),
        (bitmaps, chosen, starts, inverted.long()),
        (bitmaps.int(), chosen, starts, inverted),
    ]:
        with pytest.raises(AssertionError):
            eligible_mask(*wrong, 70)
