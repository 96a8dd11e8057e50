"""Categories and bags of every Arrow type: unknown is 0, a bag keeps the first members and pads with -1."""

import numpy as np
import pyarrow as pa
import pytest

from prerank.features.categories import CategoryFit, read_category
from prerank.features.reading import Unreadable, plain
from prerank.schema import Bag, Category


def fitted(kind, *columns, weights=None):
    fit = CategoryFit(kind)
    for column in columns:
        fit.add(plain(column), np.ones(len(column), dtype=np.int64) if weights is None else np.array(weights))
    return fit.fitted()


TEXT_TYPES = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
INTEGER_TYPES = [pa.int8(), pa.uint16(), pa.int64(), pa.uint64(), pa.dictionary(pa.int32(), pa.int64())]


@pytest.mark.parametrize("kind", TEXT_TYPES)
def test_text_of_every_arrow_type(kind):
    category = fitted(Category(), pa.array(["b", "a", None, "b"], pa.string()))
    found = category.column(plain(pa.array(["skipped", "a", "b", None, "new", ""]).cast(kind).slice(1)))
    assert found.dtype == np.int32
    assert found.tolist() == [1, 2, 0, 0, 0]


@pytest.mark.parametrize("kind", INTEGER_TYPES)
def test_integers_of_every_arrow_type(kind):
    column = pa.array([9, 7, None, 9, 3], kind if not pa.types.is_dictionary(kind) else pa.int64())
    if pa.types.is_dictionary(kind):
        column = column.dictionary_encode()
    category = fitted(Category(), column.slice(0, 4))
    assert category.column(plain(column.slice(1))).tolist() == [1, 0, 2, 0]


def test_booleans_are_categories():
    assert fitted(Category(), pa.array([True, None])).column(pa.array([True, False, None])).tolist() == [1, 0, 0]


def test_unsigned_integers_beyond_int64_are_known_by_their_bits():
    large = 2**64 - 3
    category = fitted(Category(), pa.array([large, 5], pa.uint64()))
    assert category.column(pa.array([5, large, large - 1], pa.uint64())).tolist() == [2, 1, 0]
    assert category.one(large).tolist() == [1]


def test_min_count_counts_occurrences_not_rows():
    column = pa.array(["seldom", "often", "twice", "twice"])
    kept = fitted(Category(min_count=2), column, weights=[1, 5, 1, 1])
    assert kept.column(pa.array(["often", "seldom", "twice"])).tolist() == [1, 0, 2]


def test_counts_add_up_over_batches():
    kept = fitted(Category(min_count=2), pa.array([1, 2]), pa.array([2, 3]))
    assert kept.column(pa.array([1, 2, 3])).tolist() == [0, 1, 0]


def test_a_column_of_nulls_is_unknown_and_teaches_nothing():
    category = fitted(Category(), pa.nulls(2), pa.array(["a"]))
    assert category.column(pa.nulls(2)).tolist() == [0, 0]
    with pytest.raises(Unreadable, match="found a column without a type or any value"):
        fitted(Category(), pa.nulls(2))


def test_hash_buckets_need_no_vocabulary_and_only_null_is_unknown():
    category = fitted(Category(hash=5), pa.array(["a"]))
    found = category.column(pa.array(["a", "b", None, "c"]))
    assert found[2] == 0
    assert set(np.delete(found, 2)) <= {1, 2, 3, 4, 5}
    assert category.codes.size == 6


LIST_TYPES = [pa.list_(pa.string()), pa.large_list(pa.string()), pa.list_view(pa.string())]


@pytest.mark.parametrize("kind", LIST_TYPES)
def test_a_bag_keeps_the_first_members_and_pads(kind):
    column = pa.array([["gone"], ["b", "a", "new", "a"], None, [], ["a", None]], kind)
    bag = fitted(Bag(length=3), pa.array([["a", "b"]]))
    found = bag.column(column.slice(1))
    assert found.dtype == np.int32
    assert found.tolist() == [[2, 1, 0], [-1] * 3, [-1] * 3, [1, 0, -1]]


def test_a_bag_of_fixed_size_lists_of_integers():
    column = pa.array([[4, 5], None, [5, 6]], pa.list_(pa.int64(), 2))
    bag = fitted(Bag(length=3), column.slice(0, 2))
    assert bag.column(column).tolist() == [[1, 2, -1], [-1, -1, -1], [2, 0, -1]]
    assert bag.column(pa.nulls(1)).tolist() == [[-1, -1, -1]]


def test_a_bag_counts_members_by_occurrence():
    bag = fitted(Bag(length=2, min_count=3), pa.array([["a", "b"], ["b"]]), weights=[2, 1])
    assert bag.column(pa.array([["a", "b"]])).tolist() == [[0, 1]]


def test_text_is_split_stripped_and_empty_parts_do_not_count():
    bag = fitted(Bag(length=2, separator=","), pa.array(["a, b", "b"]))
    found = bag.column(pa.array([" b ,,a,b", "", " , ", None, "new"]))
    assert found.tolist() == [[2, 1], [-1, -1], [-1, -1], [-1, -1], [0, -1]]


def test_split_members_are_text_even_where_they_look_like_numbers():
    assert fitted(Bag(separator=","), pa.array(["1,2"])).codes.values == ("1", "2")


def test_a_column_of_another_family_than_in_training_is_refused():
    with pytest.raises(Unreadable, match="expected text values, as in training, found a column of int64"):
        fitted(Category(), pa.array(["1"])).column(pa.array([1]))
    with pytest.raises(Unreadable, match="expected integer values, as in the batches before, found a column of string"):
        fitted(Category(), pa.array([1]), pa.array(["1"]))


@pytest.mark.parametrize("column", [pa.array([1.5]), pa.array([[1]]), pa.array([b"x"])])
def test_what_is_not_a_name_is_no_category(column):
    with pytest.raises(Unreadable, match="expected integers, text or booleans, found a column of"):
        fitted(Category(), column)


@pytest.mark.parametrize(
    ("separator", "column", "message"),
    [
        ("", pa.array(["a"]), r"expected a list column \(or text, and a separator in funnel.toml\), found .* string"),
        (",", pa.array([["a"]]), r"expected text to split at ',' \(a list column needs no separator\), found .* list"),
    ],
)
def test_a_bag_of_the_wrong_form_is_refused_when_fitted_and_when_encoded(separator, column, message):
    with pytest.raises(Unreadable, match=message):
        fitted(Bag(separator=separator), column)
    saved = {"family": "text", "values": ["a"]}
    with pytest.raises(Unreadable, match=message):
        read_category(Bag(separator=separator), saved).column(column)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"family": "text"}, r"expected the keys \['family', 'values'\], found \['family'\]"),
        ({"family": "float", "values": []}, "expected a family of .*, found 'float'"),
        ({"family": "text", "values": ["a", 1]}, "expected values: a list of str"),
        ({"family": "integer", "values": [True]}, "expected values: a list of int"),
        ({"family": "integer", "values": [2, 1]}, "expected values: each once, in ascending order"),
        ({"family": "text", "values": ["a", "a"]}, "expected values: each once, in ascending order"),
        ({"family": "integer", "values": [2**63]}, "expected values: integers of 64 bits"),
    ],
)
def test_a_vocabulary_that_cannot_be_is_not_read(saved, message):
    with pytest.raises(Unreadable, match=message):
        read_category(Category(), saved)
