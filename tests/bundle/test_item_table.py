import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prerank.bundle.item_table import ItemTable
from prerank.errors import BundleError, DataError
from prerank.schema import Bag, Category, Embedding, FeatureSchema, Number, Value

IDS = np.array([30, -5, 2**60, 7])
COLUMNS = {
    "small": np.array([3, 0, 1, 127], dtype=np.int64),
    "middle": np.array([3, 0, 1, 128], dtype=np.int32),
    "large": np.array([3, 0, 1, 40_000], dtype=np.int64),
    "bag": np.array([[1, -1], [2, 3], [-1, -1], [9, -1]], dtype=np.int32),
    "exact": np.array([2**53 + 1, -(2**62), 0, 5]),
    "number": np.array([0.1, -0.0, 1e-45, 3e38], dtype=np.float32),
    "vector": np.arange(12, dtype=np.float32).reshape(4, 3),
}
ASCENDING = [1, 3, 0, 2]


def test_rows_are_in_order_of_item_id_whatever_order_they_came_in():
    items = ItemTable.build(IDS, COLUMNS)
    assert items.item_ids.tolist() == sorted(IDS.tolist())
    assert items.num_items == 4


def test_every_column_comes_back_as_it_went_in():
    items = ItemTable.build(IDS, COLUMNS)
    for name, column in COLUMNS.items():
        assert np.array_equal(items.codes(name, np.arange(4)), column[ASCENDING]), name
        assert np.array_equal(items.features()[name].numpy(), column[ASCENDING]), name


def test_whole_numbers_are_held_in_the_smallest_type_that_keeps_them():
    held = {name: column.dtype for name, column in ItemTable.build(IDS, COLUMNS).features().items()}
    assert held == {
        "small": torch.int8,
        "middle": torch.int16,
        "large": torch.int32,
        "bag": torch.int8,
        "exact": torch.int64,
        "number": torch.float32,
        "vector": torch.float32,
    }


def test_building_leaves_the_given_arrays_alone_and_takes_read_only_ones():
    ids, column = np.arange(3), np.ones(3, dtype=np.float32)
    for array in (ids, column):
        array.flags.writeable = False
    items = ItemTable.build(ids, {"x": column})
    items.features()["x"].zero_()
    assert column.tolist() == [1, 1, 1]


def test_rows_of_item_ids_and_minus_one_for_a_stranger():
    items = ItemTable.build(IDS, {})
    assert items.rows_of(torch.tensor([[7, 8], [2**60, -(2**63)], [2**63 - 1, -5]])).tolist() == [
        [1, -1],
        [3, -1],
        [-1, 0],
    ]
    assert items.rows_of(torch.tensor([], dtype=torch.int64)).tolist() == []


names = st.integers(-3, 40)  # of which 10 to 19 are published
calls = st.lists(st.dictionaries(names, st.one_of(st.just(-1), st.integers(0, 99)), max_size=6), max_size=12)


@given(calls)
def test_items_are_where_they_were_last_said_to_be(said):
    items = ItemTable.build(np.arange(10, 20), {"n": np.arange(10)})
    where = {item_id: row for row, item_id in enumerate(range(10, 20))}
    for call in said:
        items.move(torch.tensor(list(call), dtype=torch.int64), torch.tensor(list(call.values()), dtype=torch.int64))
        where |= call
        asked = torch.arange(-5, 45)
        assert items.rows_of(asked).tolist() == [where.get(one, -1) for one in asked.tolist()]
        assert items.num_items == sum(row >= 0 for row in where.values())
    assert items.is_in_order == (not any(said))


def test_codes_keep_the_shape_of_the_rows_and_refuse_a_stranger():
    items = ItemTable.build(IDS, COLUMNS)
    assert items.codes("vector", np.zeros((2, 5), np.int64)).shape == (2, 5, 3)
    assert items.codes("bag", np.zeros(0, np.int64)).shape == (0, 2)
    for row in (-1, 4):
        with pytest.raises(IndexError):
            items.codes("small", np.array([row]))


def test_a_feature_may_have_any_attributes_name():
    items = ItemTable.build(np.arange(2), {"item_ids": np.array([5, 6]), "forward": np.array([7, 8])})
    assert [items.codes(name, np.array([1])).tolist() for name in ("item_ids", "forward")] == [[6], [8]]


def test_a_state_dict_makes_the_same_table_without_a_copy():
    items = ItemTable.build(IDS, COLUMNS)
    again = ItemTable.from_state(items.state_dict())
    assert list(again.names) == list(items.names)
    assert again.features()["vector"].data_ptr() == items.features()["vector"].data_ptr()


@pytest.mark.parametrize(
    ("ids", "columns", "said"),
    [
        ([], {}, "expected at least one item, got none"),
        ([4, 9, 4], {}, "expected each item_id once, got 4 twice"),
        ([1, 2], {"x": np.zeros(3, dtype=np.float32)}, "'x' has 3 rows for 2 item_ids"),
        ([1, 2], {"x": np.zeros(2)}, "'x' is float64; expected whole numbers of 64 bits, or float32"),
        ([1, 2], {"x": np.array([0, 2**63], dtype=np.uint64)}, "'x' is uint64; expected whole numbers of 64 bits"),
    ],
)
def test_what_cannot_be_kept_as_it_is_is_refused(ids, columns, said):
    with pytest.raises(DataError, match=said):
        ItemTable.build(np.array(ids, dtype=np.int64), columns)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"item_ids": torch.tensor([2, 1])}, "strictly ascending; the table is damaged"),
        ({"item_ids": torch.tensor([1, 2]), "feature_x": torch.zeros(3)}, r"'x' is \[3\] for 2 items"),
        ({"item_ids": torch.tensor([1]), "feature_x": torch.zeros(1, dtype=torch.float16)}, "'x' is float16; expected"),
        ({"item_ids": None, "feature_x": torch.zeros(1)}, r"found \['published'\]"),
        ({"item_ids": torch.tensor([1]), "y": torch.zeros(1)}, r"found \['item_ids', 'published', 'y'\]"),
        ({"item_ids": torch.tensor([1]), "published": torch.tensor(2)}, "2 of 1 rows published; the table is damaged"),
        ({"item_ids": torch.tensor([1]), "published": torch.tensor(1.0)}, r"published int64 \[\], found float32 \[\]"),
        ({"item_ids": torch.tensor([1]), "slots": torch.tensor([0])}, r"slots int32 \[1\], found int64 \[1\]"),
        (
            {"item_ids": torch.tensor([1]), "slots": torch.tensor([1], dtype=torch.int32), "feature_x": torch.zeros(1)},
            "slots from -1 to 0; the table is damaged",
        ),
        ({"item_ids": torch.tensor([1]), "popularity": torch.zeros(2, 1)}, r"popularity is \[2, 1\] for 1 rows"),
    ],
)
def test_a_damaged_state_is_refused(state, said):
    ids = state["item_ids"]
    whole = {"item_ids": ids, "published": torch.tensor(1 if ids is None else len(ids)), **state}
    with pytest.raises(BundleError, match=said):
        ItemTable.from_state({name: tensor for name, tensor in whole.items() if tensor is not None})


SCHEMA = FeatureSchema(
    item={"c": Category(), "b": Bag(length=2), "n": Number(), "e": Embedding(width=3), "v": Value()},
)
FITTING = {
    "c": np.array([0, 4]),
    "b": np.array([[-1, -1], [3, 0]]),
    "n": np.zeros(2, dtype=np.float32),
    "e": np.zeros((2, 3), dtype=np.float32),
    "v": np.array([7, 8]),
}


@pytest.mark.parametrize(
    ("column", "said"),
    [
        ({}, None),
        ({"c": np.array([0, 5])}, "'c': expected whole numbers from 0 to 4"),
        ({"c": np.array([-1, 4])}, "'c': expected whole numbers from 0 to 4"),
        ({"c": np.zeros(2, dtype=np.float32)}, "'c': expected whole numbers from 0 to 4"),
        ({"b": np.array([[-2, -1], [3, 0]])}, "'b': expected whole numbers from -1 to 3"),
        ({"b": np.array([[1], [3]])}, "'b': expected [2, 2], found [2, 1]"),
        ({"e": np.zeros(2, dtype=np.float32)}, "'e': expected [2, 3], found [2]"),
        ({"x": np.zeros(2, dtype=np.float32)}, "item features: missing [], not in the schema ['x']"),
    ],
)
def test_the_first_column_a_model_cannot_read_is_named(column, said):
    fault = ItemTable.build(np.arange(2), {**FITTING, **column}).first_fault(SCHEMA, {"item.c": 5, "item.b": 4})
    assert (fault is None) == (said is None)
    assert said is None or said in fault
