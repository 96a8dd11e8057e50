"""How often the candidate's own code is among the user's, against three lines of numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from prerank.models import matching
from prerank.models.matching import Matching, count_matches
from prerank.schema import Bag, Category, Counter, FeatureSchema, History

CODES = st.integers(-1, 4)  # few names, so that most cases match something; 0 is unknown, -1 pads
SIZES = st.tuples(st.integers(0, 3), st.integers(0, 6), st.integers(0, 5), st.integers(1, 3))

SCHEMA = FeatureSchema(
    user={
        "seen": History(of="author"),
        "liked": History(of="author", events="is_like"),
        "follows": Bag(of="author", hash=99),
        "hobbies": Bag(hash=99),
    },
    context={"beside": Bag(of="author", hash=99)},
    item={"author": Category(hash=99), "topics": Bag()},
    interaction={
        "topics_1h": Counter(by="topics", window="1h"),
        "any_1h": Counter(window="1h"),
        "author_5": Counter("is_like", by="author", last=5),
    },
)


def by_hand(codes, wanted):
    """Of each wanted code [B, N] or bag [B, N, M], how often it is in the row of `codes` [B, L]."""
    theirs = codes[(slice(None), *[None] * (wanted.ndim - 1))]
    counted = ((theirs == wanted[..., None]) & (theirs > 0)).sum(-1)
    return counted.sum(-1) if wanted.ndim == 3 else counted


@given(st.data(), SIZES, st.sampled_from([np.int8, np.int32, np.int64]))
def test_matches_are_counted_as_numpy_counts_them(data, sizes, theirs):
    num, length, candidates, members = sizes
    codes = data.draw(hnp.arrays(np.int32, (num, length), elements=CODES))
    for shape in ((num, candidates), (num, candidates, members)):
        wanted = data.draw(hnp.arrays(theirs, shape, elements=CODES))
        found = count_matches(torch.from_numpy(codes), torch.from_numpy(wanted))
        assert found.dtype == torch.float32
        np.testing.assert_array_equal(found.numpy(), by_hand(codes, wanted))


def test_the_unknown_and_padding_match_nothing_and_not_each_other():
    codes = torch.tensor([[-1, -1, 0, 0, 3]])
    assert count_matches(codes, torch.tensor([[0, -1, -2, 3]])).tolist() == [[0, 0, 0, 1]]
    assert count_matches(codes, torch.tensor([[[0, -1], [-1, 3]]])).tolist() == [[0, 1]]


def test_the_members_of_a_bag_add_up():
    codes = torch.tensor([[1, 2, 2, 5]])
    assert count_matches(codes, torch.tensor([[[1, 2, -1], [2, 2, 5], [9, -1, -1]]])).tolist() == [[3, 5, 0]]


def test_each_user_is_matched_with_his_own_candidates():
    codes, wanted = torch.tensor([[1, 1], [2, 2]]), torch.tensor([[1, 2], [1, 2]])
    assert count_matches(codes, wanted).tolist() == [[2, 0], [0, 2]]


@pytest.mark.parametrize("cells", [1, 7, 24, 1000])
@pytest.mark.parametrize("shape", [(3, 11), (3, 11, 2)])
def test_pieces_are_the_whole(monkeypatch, cells, shape):
    draw = torch.Generator().manual_seed(0)
    codes, wanted = (torch.randint(-1, 5, of, generator=draw) for of in ((3, 4), shape))
    whole = count_matches(codes, wanted)
    monkeypatch.setattr(matching, "_CELLS_AT_ONCE", cells)
    assert torch.equal(count_matches(codes, wanted), whole)


def test_a_large_code_is_not_cut_to_a_small_one():
    """An item column is held in the smallest type that keeps it; the user's codes are int32."""
    codes = torch.tensor([[1, 300]], dtype=torch.int32)
    assert count_matches(codes, torch.tensor([[1, 44]], dtype=torch.int8)).tolist() == [[1, 0]]


def test_every_history_counter_by_something_and_bag_of_something_is_a_feature_and_no_other():
    made = Matching(SCHEMA)
    assert made.names == ["seen", "liked", "topics_1h", "author_5", "follows", "beside"]
    assert made.of == ["author", "topics"]
    assert made.width == 6


def test_a_feature_is_the_logarithm_of_one_and_its_matches():
    made = Matching(SCHEMA)
    user = {
        "seen": torch.tensor([[-1, 1, 2, 1]]),
        "liked": torch.tensor([[-1, 2]]),
        "topics_1h": torch.tensor([[7, 7, 8]]),
        "any_1h": torch.tensor([9]),
        "author_5": torch.tensor([[3, 3]]),
        "follows": torch.tensor([[2, 9, 3]]),
        "hobbies": torch.tensor([[1, 1, 1]]),
        "beside": torch.tensor([[-1, -1]]),
    }
    items = {"author": torch.tensor([1, 2, 3]), "topics": torch.tensor([[7, 8], [9, -1], [-1, -1]])}
    item_side = {name: side[None] for name, side in made.item_side(items).items()}
    found = made(made.user_side(user), item_side)
    counted = [[2, 1, 0], [0, 1, 0], [3, 0, 0], [0, 0, 2], [0, 1, 1], [0, 0, 0]]
    assert len(found) == made.width
    torch.testing.assert_close(torch.cat(found), torch.tensor(counted).float().add(1).log())
