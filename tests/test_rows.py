from __future__ import annotations

import json
from collections.abc import Mapping

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prerank._rows import rows_of

VALUES = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text() | st.lists(st.integers(0, 9))
NAMES = st.lists(st.text(min_size=1), min_size=1, max_size=5, unique=True)  # quotes, keywords, spaces: a column's name


@given(st.data())
def test_a_row_is_the_dict_of_its_names_and_values_and_is_sent_as_one(data: st.DataObject) -> None:
    names = data.draw(NAMES)
    plain = [
        dict(zip(names, values, strict=True))
        for values in data.draw(st.lists(st.tuples(*[VALUES] * len(names)), max_size=4))
    ]
    rows = rows_of(names, [[one[name] for one in plain] for name in names])
    assert rows == plain
    assert [dict(row) for row in rows] == plain
    assert [list(row.items()) for row in rows] == [list(one.items()) for one in plain]
    assert json.loads(msgspec.json.encode(rows)) == plain


def test_a_row_is_a_mapping_and_knows_only_its_names() -> None:
    (row,) = rows_of(["title", "class"], [["a"], [1]])
    assert isinstance(row, Mapping)
    assert (row["class"], row.get("class"), row.get("price"), len(row), list(row)) == (
        1,
        1,
        None,
        2,
        ["title", "class"],
    )
    assert "price" not in row
    assert row != {"title": "a"}
    assert row != "title"
    assert repr(row) == "{'title': 'a', 'class': 1}"
    with pytest.raises(KeyError, match="price"):
        row["price"]


def test_rows_of_the_same_names_are_of_one_type() -> None:
    assert type(rows_of(["a"], [[1]])[0]) is type(rows_of(["a"], [[2]])[0])


def test_columns_of_different_lengths_are_no_table() -> None:
    with pytest.raises(AssertionError, match="one length"):
        rows_of(["a", "b"], [[1], [1, 2]])
