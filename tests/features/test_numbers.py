"""Moments that do not depend on how the rows were cut, and missing numbers that stay out of them."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prerank.features.numbers import EmbeddingFit, Moments, NumberFit, ValueFit, read_embedding, read_number, read_value
from prerank.features.reading import FLOAT32_MAX, Unreadable, plain
from prerank.schema import Embedding, Number, Value

NUMBERS = st.lists(st.tuples(st.floats(-1e6, 1e6), st.integers(1, 9)), min_size=2, max_size=50)


def fitted_number(values, weights=None, log=False):
    fit = NumberFit(Number(log=log))
    fit.add(pa.array(values, pa.float64()), np.ones(len(values), dtype=np.int64) if weights is None else weights)
    return fit.fitted()


@given(NUMBERS, st.integers(1, 20))
def test_moments_are_those_of_the_repeated_rows_however_they_are_cut(rows, cut):
    numbers, weights = np.array([r[0] for r in rows]), np.array([r[1] for r in rows])
    moments = Moments()
    for start in range(0, len(rows), cut):
        moments.add(numbers[start : start + cut], weights[start : start + cut])
    repeated = np.repeat(numbers, weights)
    assert moments.mean == pytest.approx(repeated.mean(), rel=1e-9, abs=1e-9)
    assert moments.std == pytest.approx(repeated.std(), rel=1e-6, abs=1e-6)


def test_a_large_offset_costs_no_digits():
    moments = Moments()
    for _ in range(100):
        moments.add(1e15 + np.array([0.0, 1.0, 2.0]), np.ones(3, dtype=np.int64))
    assert moments.std == pytest.approx(np.sqrt(2 / 3), rel=1e-12)


def test_numbers_are_standardised():
    numbers = fitted_number([1.0, 2.0, 3.0])
    np.testing.assert_allclose(numbers.column(pa.array([2.0, 3.0])), [0, 1 / np.sqrt(2 / 3)], rtol=1e-6)
    assert numbers.column(pa.array([2.0])).dtype == np.float32


def test_log_keeps_the_sign():
    numbers = fitted_number([-1.0, 1.0], log=True)
    np.testing.assert_allclose(numbers.column(pa.array([-3.0, 3.0, 0.0])), [-2, 2, 0], rtol=1e-6)


@pytest.mark.parametrize("log", [False, True])
def test_missing_not_finite_and_too_large_are_the_mean_and_teach_nothing(log):
    odd = [None, np.nan, np.inf, -np.inf, 1e39, -1e300]
    numbers, clean = fitted_number([1.0, *odd, 4.0], log=log), fitted_number([1.0, 4.0], log=log)
    assert (numbers.mean, numbers.std) == (clean.mean, clean.std)
    assert numbers.column(pa.array(odd)).tolist() == [0] * len(odd)
    assert numbers.one(10**400).tolist() == [0]


def test_a_constant_column_is_zero_everywhere_and_never_nan():
    # the mean of many 0.1 is not 0.1: only the extremes tell that the column is constant
    numbers = fitted_number([0.1] * 1001)
    assert numbers.std == 0
    assert numbers.column(pa.array([0.1, 5.0, None])).tolist() == [0, 0, 0]
    assert fitted_number([]).column(pa.array([1.0])).tolist() == [0]
    assert fitted_number([None]).column(pa.nulls(2)).tolist() == [0, 0]


@given(st.lists(st.floats(), min_size=1), st.lists(st.floats(), min_size=1), st.booleans())
def test_whatever_comes_the_encoded_number_is_finite(trained, asked, log):
    assert np.isfinite(fitted_number(trained, log=log).column(pa.array(asked))).all()


@pytest.mark.parametrize("kind", [pa.int8(), pa.uint64(), pa.float16(), pa.float32(), pa.decimal128(5, 2), pa.bool_()])
def test_every_arrow_number_is_a_number(kind):
    ones = pa.array([True, None]) if kind == pa.bool_() else pa.array([1, None], pa.int8()).cast(kind)
    assert fitted_number([0.0, 2.0]).column(ones).tolist() == [0, 0]
    assert fitted_number([1.0, 2.0]).column(ones)[0] == -1


def test_an_embedding_is_kept_and_what_is_missing_is_zero():
    embedding = read_embedding(Embedding(2), {})
    rows = [[1.0, 2.0], None, [3.0, None], [np.nan, np.inf], [1e39, 4.0]]
    for kind in (pa.list_(pa.float64()), pa.list_(pa.float64(), 2), pa.large_list(pa.float64())):
        found = embedding.column(pa.array([[9.0, 9.0], *rows], kind).slice(1))
        assert found.tolist() == [[1, 2], [0, 0], [3, 0], [0, 0], [0, 4]]
        assert found.dtype == np.float32
    assert embedding.column(pa.nulls(2)).tolist() == [[0, 0], [0, 0]]
    assert embedding.column(pa.array([[1, 2]])).tolist() == [[1, 2]]


def test_an_embedding_extension_type_is_read_by_its_storage():
    tensor = pa.FixedShapeTensorArray.from_numpy_ndarray(np.array([[1.0, 2.0], [3.0, 4.0]]))
    assert read_embedding(Embedding(2), {}).column(plain(tensor)).tolist() == [[1, 2], [3, 4]]


def test_an_embedding_of_another_width_is_refused_with_its_row():
    fit = EmbeddingFit(Embedding(2))
    with pytest.raises(Unreadable, match="expected a list of 2 numbers, found one of 3 in row 1"):
        fit.add(pa.array([None, [1.0, 2.0, 3.0]], pa.list_(pa.float64())), np.ones(2))


@pytest.mark.parametrize("kind", [pa.int64(), pa.int32(), pa.uint64(), pa.bool_()])
def test_a_column_of_integers_stays_int64(kind):
    fit = ValueFit(Value(missing=-5.0))
    column = pa.array([True, None]) if kind == pa.bool_() else pa.array([1, None], kind)
    fit.add(column, np.ones(2))
    found = fit.fitted().column(column)
    assert found.dtype == np.int64
    assert found.tolist() == [1, -5]


def test_a_large_bid_loses_nothing():
    bid = 2**53 + 1
    assert read_value(Value(), {"integer": True}).column(pa.array([bid, None])).tolist() == [bid, 0]


def test_a_column_of_floats_is_float32_and_nan_is_missing_and_infinity_is_kept():
    fit = ValueFit(Value(missing=0.5))
    fit.add(pa.array([1.5]), np.ones(1))
    found = fit.fitted().column(pa.array([1.5, None, np.nan, np.inf]))
    assert found.dtype == np.float32
    assert found.tolist() == [1.5, 0.5, 0.5, np.inf]


def test_batches_of_integers_and_floats_are_floats():
    fit = ValueFit(Value())
    for column in ([1], [1.5], [2]):
        fit.add(pa.array(column), np.ones(1))
    assert fit.fitted().to_plain() == {"integer": False}


@pytest.mark.parametrize(
    ("integer", "column", "message"),
    [
        (True, pa.array([1.5]), "expected integers, as in training, found a column of double"),
        (True, pa.array([2**63], pa.uint64()), r"expected integers below 2\^63, found a larger one"),
        (False, pa.array([2 * FLOAT32_MAX]), r"expected a number a float32 can hold \(up to 3.403e\+38\), found 6.8"),
        (False, pa.array(["1"]), "expected numbers, found a column of string"),
    ],
)
def test_a_value_that_cannot_be_kept_is_refused(integer, column, message):
    with pytest.raises(Unreadable, match=message):
        read_value(Value(), {"integer": integer}).column(column)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (0.5, "expected a whole number as `missing`, since the column holds integers, found 0.5"),
        (1e300, "expected a `missing` that is finite and that a float32 can hold, found 1e"),
    ],
)
def test_a_missing_that_the_column_cannot_hold_is_refused(missing, message):
    with pytest.raises(Unreadable, match=message):
        read_value(Value(missing=missing), {"integer": True})
    with pytest.raises(Unreadable, match="finite"):
        read_value(Value(missing=np.nan), {"integer": False})


def test_a_column_without_numbers_has_no_value():
    fit = ValueFit(Value())
    with pytest.raises(Unreadable, match="expected numbers, found a column of string"):
        fit.add(pa.array(["a"]), np.ones(1))
    fit.add(pa.nulls(3), np.ones(3))
    with pytest.raises(Unreadable, match="found a column without a type or any value"):
        fit.fitted()


@pytest.mark.parametrize(
    "saved", [{}, {"mean": 1.0}, {"mean": 1.0, "std": -1.0}, {"mean": "1", "std": 1.0}, {"mean": np.inf, "std": 1.0}]
)
def test_moments_that_cannot_be_are_not_read(saved):
    with pytest.raises(Unreadable, match="expected a finite mean and a std of 0 or more"):
        read_number(Number(), saved)
