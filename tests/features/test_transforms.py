"""Fitted once, the same everywhere: a table, a row and a reloaded copy encode to the same bits."""

import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prerank.errors import BundleError, DataError, RequestError
from prerank.features.transforms import Transforms
from prerank.schema import Bag, Category, Embedding, FeatureSchema, History, Number, Value

KINDS = {
    "count": Category(),
    "name": Category(min_count=2),
    "flag": Category(),
    "count_hash": Category(column="count", hash=7),
    "name_hash": Category(column="name", hash=7),
    "amount": Number(),
    "amount_log": Number(column="amount", log=True),
    "members": Bag(length=3),
    "names": Bag(length=2, hash=5),
    "split": Bag(length=3, separator=","),
    "vector": Embedding(width=3),
    "bid": Value(missing=-1.0),
    "weight": Value(missing=0.25),
}
TYPES = {
    "count": pa.int64(),
    "name": pa.string(),
    "flag": pa.bool_(),
    "amount": pa.float64(),
    "members": pa.list_(pa.int64()),
    "names": pa.list_(pa.string()),
    "split": pa.string(),
    "vector": pa.list_(pa.float64()),
    "bid": pa.int64(),
    "weight": pa.float64(),
}
INT64 = st.integers(-(2**63), 2**63 - 1)
SMALL = st.integers(0, 9)
TEXT = st.sampled_from(["a", "b", "a\0", "ü", ""]) | st.text()
FLOAT = st.floats() | st.sampled_from([0.1, 1e39, 2.0**53])
ROW = st.fixed_dictionaries(
    {
        "count": st.none() | SMALL | INT64,
        "name": st.none() | TEXT,
        "flag": st.none() | st.booleans(),
        "amount": st.none() | FLOAT,
        "members": st.none() | st.lists(st.none() | SMALL | INT64, max_size=5),
        "names": st.none() | st.lists(st.none() | TEXT, max_size=4),
        "split": st.none() | TEXT | st.lists(TEXT, max_size=5).map(" ,".join),
        "vector": st.none() | st.lists(st.none() | FLOAT, min_size=3, max_size=3),
        "bid": st.none() | INT64,
        "weight": st.none() | st.floats(width=32),
    }
)


def table(rows: list[dict[str, object]]) -> pa.Table:
    return pa.table({name: pa.array([row[name] for row in rows], kind) for name, kind in TYPES.items()})


def fit(schema: FeatureSchema, user=None, item=None, context=()) -> Transforms:
    nothing = pa.table({})

    def once(columns):
        columns = nothing if columns is None else columns
        return columns, np.ones(columns.num_rows, dtype=np.int64)

    return Transforms.fit(schema, users=once(user), items=once(item), context=context)


TRAINING = [
    {"count": n % 5, "name": "ab"[n % 2], "flag": n % 3 == 0, "amount": n * 0.3, "members": [n % 4, 9], "names": ["a"],
     "split": f"a, {n % 3}", "vector": [n, 0.5, -1.0], "bid": n, "weight": n / 8}
    for n in range(20)
]  # fmt: skip
FITTED = fit(FeatureSchema(user=KINDS), table(TRAINING))


def assert_same(here: dict[str, np.ndarray], there: dict[str, np.ndarray]) -> None:
    assert list(here) == list(there)
    for name, column in here.items():
        assert column.dtype == there[name].dtype, name
        assert column.shape == there[name].shape, name
        assert column.tobytes() == there[name].tobytes(), (name, column, there[name])


@given(st.lists(ROW, min_size=1, max_size=5))
def test_a_row_encodes_as_the_table_it_is_in(rows):
    whole = FITTED.encode("user", table(rows))
    for place, row in enumerate(rows):
        assert_same(FITTED.encode_row("user", row), {name: column[[place]] for name, column in whole.items()})


@given(st.lists(ROW, min_size=1, max_size=5), st.lists(ROW, min_size=1, max_size=5))
def test_what_is_saved_encodes_to_the_same_bits_and_says_the_same(trained, asked):
    fitted = fit(FeatureSchema(user=KINDS), table(trained))
    saved = fitted.to_json()
    again = Transforms.from_json(saved)
    assert again.to_json() == saved
    assert again.sizes() == fitted.sizes()
    assert fitted.first_difference(again) is None
    assert_same(again.encode("user", table(asked)), fitted.encode("user", table(asked)))


@given(st.lists(ROW, min_size=4, max_size=9), st.integers(1, 3))
def test_chunks_dictionaries_and_batches_change_nothing(rows, cut):
    whole = table(rows)
    parts = pa.concat_tables([whole.slice(0, cut), whole.slice(cut)])
    coded = whole.set_column(1, "name", whole["name"].dictionary_encode())
    expected = FITTED.encode("user", whole)
    for other in (parts, coded, whole.combine_chunks().to_batches()[0]):
        assert_same(FITTED.encode("user", other), expected)


def test_no_rows_encode_to_no_rows_of_the_same_types():
    expected = {name: column[:0] for name, column in FITTED.encode("user", table(TRAINING)).items()}
    assert_same(FITTED.encode("user", table([])), expected)


def test_a_column_of_nulls_without_a_type_is_missing():
    nulls = pa.table({name: pa.nulls(1) for name in TYPES})
    assert_same(FITTED.encode("user", nulls), FITTED.encode_row("user", {}))


def test_rows_that_did_not_occur_in_training_teach_nothing():
    schema = FeatureSchema(item={"id": Category(), "price": Number()})
    items = pa.table({"id": [10, 20, 30], "price": [1.0, 3.0, 1000.0]})
    fitted = Transforms.fit(
        schema,
        users=(pa.table({}), np.array([], dtype=np.int64)),
        items=(items, np.array([3, 1, 0])),
        context=[],
    )
    encoded = fitted.encode("item", items)
    assert encoded["id"].tolist() == [1, 2, 0]
    mean, std = 1.5, np.sqrt(0.75)
    np.testing.assert_allclose(encoded["price"][:2], [(1 - mean) / std, (3 - mean) / std], rtol=1e-6)


def test_context_streams_and_the_same_rows_in_any_pieces_teach_the_same():
    schema = FeatureSchema(context={"hour": Category(), "depth": Number()})
    rows = pa.table({"hour": [3, 1, 3, 2], "depth": [1.0, 2.0, 3.0, 4.0]})
    whole, pieces = fit(schema, context=[rows]), fit(schema, context=iter(rows.to_batches(max_chunksize=1)))
    assert whole.first_difference(pieces) is None
    assert whole.encode("context", rows)["hour"].tolist() == [3, 1, 3, 2]


def test_histories_are_left_out():
    schema = FeatureSchema(user={"seen": History(of="id"), "age": Number()}, item={"id": Category()})
    fitted = fit(schema, pa.table({"age": [1, 2]}), pa.table({"id": [1]}))
    assert list(fitted.encode("user", pa.table({"age": [1]}))) == ["age"]
    assert fitted.sizes() == {"item.id": 2}


def test_sizes_count_the_unknown_row():
    assert FITTED.sizes() == {
        "user.count": 6,
        "user.name": 3,
        "user.flag": 3,
        "user.count_hash": 8,
        "user.name_hash": 8,
        "user.members": 6,
        "user.names": 6,
        "user.split": 5,
    }


def test_a_user_and_an_item_may_have_features_of_one_name():
    schema = FeatureSchema(user={"city": Category()}, item={"city": Category()})
    fitted = fit(schema, pa.table({"city": ["x"]}), pa.table({"city": ["y", "x"]}))
    assert fitted.encode_row("user", {"city": "x"})["city"].tolist() == [1]
    assert fitted.encode_row("item", {"city": "y"})["city"].tolist() == [2]
    assert fitted.sizes() == {"user.city": 2, "item.city": 3}


@pytest.mark.parametrize("kind", [pa.string(), pa.dictionary(pa.int32(), pa.string()), pa.int64(), pa.bool_()])
def test_a_table_without_rows_still_says_its_types(kind):
    empty = pa.table({"x": pa.array([], kind)})
    assert fit(FeatureSchema(user={"x": Category()}), empty).sizes() == {"user.x": 1}


# what is refused, and how it is said


def test_a_missing_column_is_named():
    schema = FeatureSchema(user={"age": Number(column="years")})
    message = (
        r"user feature 'age' \(column 'years'\): expected one column 'years' in the table, found 0 among height; "
        "mend the table, or the feature in funnel.toml"
    )
    with pytest.raises(DataError, match=message):
        fit(schema, pa.table({"years": [1], "height": [1]})).encode("user", pa.table({"height": [1]}))
    with pytest.raises(DataError, match="found 0 among none"):
        fit(schema, pa.table({"height": [1]}))


def test_a_column_that_comes_twice_is_named():
    twice = pa.table([[1], [2]], names=["age", "age"])
    schema = FeatureSchema(user={"age": Number()})
    with pytest.raises(DataError, match="expected one column 'age' in the table, found 2 among age, age"):
        fit(schema, pa.table({"age": [1]})).encode("user", twice)


def test_a_column_of_the_wrong_type_names_the_feature_and_both_types():
    message = r"user feature 'amount' \(column 'amount'\): expected numbers, found a column of string"
    wrong = table(TRAINING).set_column(3, "amount", pa.array(["1"] * 20))
    with pytest.raises(DataError, match=message):
        FITTED.encode("user", wrong)
    with pytest.raises(DataError, match=message):
        fit(FeatureSchema(user=KINDS), wrong)


def test_an_embedding_of_another_width_is_named():
    wide = pa.table({"vector": [[1.0, 2.0]]})
    with pytest.raises(
        DataError,
        match=r"item feature 'vector' \(column 'vector'\): expected a list of 3 numbers, found one of 2 in row 0",
    ):
        fit(FeatureSchema(item={"vector": Embedding(3)}), item=wide)


def test_a_column_without_any_type_is_refused_when_fitted():
    with pytest.raises(DataError, match=r"'x'.*: expected integers, text or booleans, found a column without a type"):
        fit(FeatureSchema(user={"x": Category()}), pa.table({"x": pa.nulls(3)}))


def test_context_features_without_a_log_are_refused():
    with pytest.raises(DataError, match=r"context features \['hour'\] have no rows to learn from; check the days"):
        fit(FeatureSchema(context={"hour": Category()}))


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("amount", "12", r"user.amount: expected a number, got '12' \(str\)"),
        ("amount", [1], r"user.amount: expected a number, got \[1\] \(list\)"),
        ("count", "3", r"user.count: expected an integer, got '3' \(str\)"),
        ("count", 3.0, r"user.count: expected an integer, got 3.0 \(float\)"),
        ("count", True, r"user.count: expected an integer, got True \(bool\)"),
        ("count", 2**64, r"user.count: expected an integer of 64 bits, got 18446744073709551616 \(int\)"),
        ("count", [1], r"user.count: expected an integer, got \[1\] \(list\)"),
        ("name", 3, r"user.name: expected text, got 3 \(int\)"),
        ("flag", 1, r"user.flag: expected true or false, got 1 \(int\)"),
        ("members", 1, r"user.members: expected a list, each member an integer, got 1 \(int\)"),
        ("members", ["a"], r"user.members: expected an integer, got 'a' \(str\)"),
        ("names", [1], r"user.names: expected text, got 1 \(int\)"),
        ("split", ["a"], r"user.split: expected text separated by ',', got \['a'\] \(list\)"),
        ("vector", 1.0, r"user.vector: expected a list of 3 numbers, got 1.0 \(float\)"),
        ("vector", [1.0], r"user.vector: expected a list of 3 numbers, got one of 1"),
        ("vector", [1.0, "a", 2.0], r"user.vector: expected a number, got 'a' \(str\)"),
        ("bid", 1.5, r"user.bid: expected an integer, got 1.5 \(float\)"),
        ("bid", 2**63, r"user.bid: expected an integer of 64 bits with its sign, got 9223372036854775808 \(int\)"),
        ("weight", 1e39, r"user.weight: expected a number a float32 can hold \(up to 3.403e\+38\), got 1e\+39"),
        ("name", [1] * 99, r"user.name: expected text, got \[1, 1, .*\.\.\. \(list\)"),
    ],
)
def test_a_wrong_value_in_a_row_names_the_field_what_it_must_be_and_what_came(column, value, message):
    with pytest.raises(RequestError, match=message):
        FITTED.encode_row("user", {column: value})


def test_a_context_field_must_be_there_if_only_as_null():
    schema = FeatureSchema(context={"hour": Category(column="local_hour")})
    fitted = fit(schema, context=[pa.table({"local_hour": [1]})])
    with pytest.raises(
        RequestError, match=r"context.local_hour: missing; expected an integer, or null where it is not known"
    ):
        fitted.encode_row("context", {"hour": 1})
    assert fitted.encode_row("context", {"local_hour": None})["hour"].tolist() == [0]


def test_a_lone_surrogate_is_an_unknown_name_and_no_crash():
    encoded = FITTED.encode_row("user", {"name": "\ud800", "names": ["\ud800"], "split": "\ud800,a"})
    assert encoded["name"].tolist() == [0]
    assert encoded["split"].tolist() == [[0, 4, -1]]
    assert encoded["names"][0, 0] > 0


def a_saved() -> dict:
    return json.loads(FITTED.to_json())


def changed(path: list, value: object) -> str:
    saved = a_saved()
    place = saved
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(saved)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "expected a JSON object, found list"),
        ("{}", r"expected the keys format, learnt and schema, found \[\]"),
        (changed(["extra"], 1), "expected the keys format, learnt and schema, found .*extra"),
        (changed(["format"], 2), "expected format 1, found 2; publish again"),
        (changed(["schema"], 3), r"schema: expected tables \[.*\], got 3"),
        (changed(["schema", "user", "count", "kind"], "word"), "schema.user.count.kind: expected one of .*got 'word'"),
        (changed(["schema", "user", "count", "dim"], "3"), "schema.user.count.dim: expected a whole number, got '3'"),
        (changed(["learnt"], []), "learnt, found "),
        (changed(["learnt", "user.more"], {}), r"expected what \[.*\] learnt, found \[.*'user.more'"),
        (changed(["learnt", "user.count"], 5), "user.count: expected an object, found 5"),
        (changed(["learnt", "user.count", "values"], [2, 1]), "user.count: expected values: each once, in ascending"),
        (changed(["learnt", "user.amount", "mean"], float("nan")), "not valid JSON: NaN is not a JSON number"),
        (changed(["learnt", "user.amount", "std"], -1.0), "user.amount: expected a finite mean and a std of 0 or more"),
        (FITTED.to_json().replace('"std": ', '"std": 1e999, "mean": '), "user.amount: expected a finite mean"),
        (changed(["learnt", "user.vector"], {"a": 1}), "user.vector: expected nothing learnt, found {'a': 1}"),
        (changed(["learnt", "user.bid"], {}), "user.bid: expected integer = true or false, found {}"),
        (changed(["learnt", "user.bid", "more"], 1), "user.bid: expected integer = true or false, found {.*more"),
    ],
)
def test_what_was_not_written_by_us_is_not_read(text, message):
    with pytest.raises(BundleError, match=f"transforms: .*{message}"):
        Transforms.from_json(text)


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        (["learnt", "user.amount", "mean"], 1.5, "user feature 'amount': mean: 2.85 here, 1.5 there"),
        (["learnt", "user.count", "values"], [1], "user feature 'count': values: 5 here, 1 there"),
        (["learnt", "user.name", "values"], ["a", "c"], "user feature 'name': values[1]: 'b' here, 'c' there"),
        (["learnt", "user.count_hash", "family"], "text", "user feature 'count_hash': family: 'integer' here, 'text'"),
        (["schema", "user", "count", "dim"], 3, "user feature 'count': kind=category, column=, dim=16"),
    ],
)
def test_the_first_difference_is_named(path, value, sentence):
    found = FITTED.first_difference(Transforms.from_json(changed(path, value)))
    assert found is not None
    assert found.startswith(sentence)
