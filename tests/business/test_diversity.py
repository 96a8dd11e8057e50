import re

import pyarrow as pa
import pytest
import torch

from prerank.business.diversity import Diversity, groups_of
from prerank.config import DiversityRule
from prerank.errors import BundleError, DataError


def build(items, **at_most):
    return Diversity.build({name: DiversityRule(most) for name, most in at_most.items()}, items)


@pytest.mark.parametrize(
    "column",
    [
        pa.array([7, None, 2**62, 7, -1, None]),
        pa.array([7, None, 255, 7, 0, None], pa.uint8()),
        pa.array(["a", None, "b", "a", "", None]),
        pa.array(["a", None, "b", "a", "c", None], pa.large_string()),
        pa.array(["a", None, "b", "a", "c", None]).dictionary_encode(),
        # a dictionary may say one value twice, and null by a value
        pa.DictionaryArray.from_arrays([0, 3, 1, 2, 4, None], pa.array(["a", "b", "a", None, "c"])),
        pa.chunked_array([pa.array(["a", None]), pa.array([], pa.string()), pa.array(["b", "a", "c", None])]),
        pa.chunked_array(
            [pa.array(["x", None]).dictionary_encode(), pa.array(["y", "x", "z", None]).dictionary_encode()]
        ),
    ],
)
def test_groups_are_the_raw_values_exactly_and_null_is_none(column):
    diversity = build(pa.table({"brand": column}), brand=3)
    assert diversity.codes.dtype == torch.int32
    assert diversity.codes[:, 0].tolist() == [0, -1, 1, 0, 2, -1]
    assert diversity.at_most.tolist() == [3]


def test_a_boolean_names_two_groups():
    assert build(pa.table({"is_video": [True, False, None, True]}), is_video=1).codes.tolist() == [[0], [1], [-1], [0]]


def test_each_rule_has_groups_of_its_own():
    items = pa.table({"creative": [5, 5, 6], "title": ["x"] * 3, "brand": ["a", "b", "b"]})
    diversity = build(items, brand=2, creative=1)
    assert diversity.codes.tolist() == [[0, 0], [1, 0], [1, 1]]
    assert diversity.at_most.tolist() == [2, 1]
    assert diversity(torch.tensor([[2, 0], [1, 1]])).tolist() == [[[1, 0], [1, 0]], [[1, 1], [0, 0]]]


def test_the_state_is_the_behaviour():
    one, other = build(pa.table({"brand": [1, 1, 2]}), brand=2), build(pa.table({"brand": [1, 2, 3]}), brand=5)
    one.load_state_dict(other.state_dict())
    assert one.codes.tolist() == [[0], [1], [2]]
    assert one.at_most.tolist() == [5]


def test_without_diversity_there_is_no_rule():
    groups, at_most = groups_of(None, torch.zeros(2, 5, dtype=torch.int64))
    assert (groups.shape, groups.dtype) == ((2, 0, 5), torch.int32)
    assert (at_most.shape, at_most.dtype) == ((0,), torch.int64)


@pytest.mark.parametrize(
    ("column", "said"),
    [
        ("brands", "expected the items' column 'brands', found ['brand', 'price']"),
        ("price", "expected integers, strings or booleans in the items' column 'price', found double"),
    ],
)
def test_a_column_that_names_no_groups_is_refused(column, said):
    with pytest.raises(DataError, match=re.escape(said)):
        build(pa.table({"brand": [1], "price": [0.5]}), **{column: 1})


@pytest.mark.parametrize(
    ("codes", "at_most", "said"),
    [
        (torch.zeros(3, 1), torch.ones(1).long(), "found float32 [3, 1] and int64 [1]"),
        (torch.zeros(3, 1).int(), torch.ones(2).long(), "found int32 [3, 1] and int64 [2]"),
        (torch.zeros(3).int(), torch.ones(1).long(), "found int32 [3] and int64 [1]"),
        (torch.zeros(3, 1).int(), torch.ones(1).int(), "found int32 [3, 1] and int32 [1]"),
        (torch.zeros(3, 2).int(), torch.tensor([1, 0]), "expected at_most of 1 or more, found [1, 0]"),
    ],
)
def test_a_state_that_is_none_is_refused(codes, at_most, said):
    with pytest.raises(BundleError, match=re.escape(said)):
        Diversity(codes, at_most)
