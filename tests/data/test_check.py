import re
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prerank.config import ItemNumber, Rules, parse_config
from prerank.data import check_leaks, sources
from prerank.data.check import check
from prerank.data.check_duplicates import RowHashes
from prerank.data.check_leaks import LeakSample, auc
from prerank.data.logs import Tables, find_tables
from prerank.schema import Category
from tests.data import world


def problems(folder, features=None, metadata=None, tables=None, targeting=None, **data):
    """What check says of the world in `folder`, its funnel file changed."""
    plain = world.plain(**data)
    for owner, added in (features or {}).items():
        plain["features"][owner] |= added
    if metadata:
        plain["metadata"] = {"columns": metadata}
    plain["targeting"] = targeting or {}
    config = parse_config(plain, "tiny.toml")
    return check(config, find_tables(config, world.write(folder, **(tables or {})), folder / "work"))


def one(found, what):
    """The only problem of this kind."""
    (problem,) = [p for p in found if p.what == what]
    return problem


def test_sound_tables_have_no_problems(tmp_path):
    assert problems(tmp_path) == []


def test_every_problem_is_told_at_once_and_none_hides_another(tmp_path):
    log = world.put_at(world.impressions(), "item_id", 5, 777).drop("slot")
    users = world.put(world.users(), "age", ["old"] * world.USERS)
    found = problems(
        tmp_path,
        {"context": {"clicked": {"kind": "category", "column": "is_click"}}},
        tables={"impressions": log, "users": users},
        items="item.parquet",
        history="history.parquet",
        test=["2022-04-27", "2022-04-28"],
    )
    assert [(p.where, p.what, p.severity) for p in found] == [
        ("features.context.clicked", "leaky feature computed after the label", "error"),
        ("data.items", "table cannot be read", "error"),
        ("data.history", "table cannot be read", "error"),
        ("users.age", "wrong type", "error"),
        ("impressions.slot", "missing column", "error"),
        ("data.test", "day without rows", "error"),
    ]


# columns and their types


def test_a_missing_column_names_its_reader_and_the_nearest(tmp_path):
    problem = one(problems(tmp_path, {"item": {"bid_micro": {"kind": "value"}}}), "missing column")
    assert problem.where == "items.bid_micro"
    assert problem.expected == "the column features.item.bid_micro reads"
    assert problem.found == 'no such column; did you mean "bid_micros"?'


def test_a_diversity_rule_names_a_column_of_identities_of_the_items_table(tmp_path):
    config = parse_config(world.plain() | {"diversity": {"tags": {"at_most": 1}, "brand": {"at_most": 2}}}, "tiny.toml")
    items = world.put(world.items(), "tags", [0.5] * world.items().num_rows)
    found = check(config, find_tables(config, world.write(tmp_path, items=items), tmp_path / "work"))
    missing = one(found, "missing column")
    assert (missing.where, missing.expected) == ("items.brand", "the column diversity.brand reads")
    assert ("items.tags", "an integer, string or boolean", "double") in [(p.where, p.expected, p.found) for p in found]


@dataclass(frozen=True)
class Discount:
    column: ItemNumber
    by: float = 0.5


@dataclass(frozen=True)
class WithDiscount(Rules):
    discount: Discount | None = None


def test_a_column_that_a_rule_reads_is_one_of_the_items_table_of_finite_numbers(tmp_path):
    def said(column, values=None):
        settings = replace(world.config(), rules=WithDiscount(discount=Discount(column)))
        table = world.items() if values is None else world.put(world.items(), column, values)
        found = check(settings, find_tables(settings, world.write(tmp_path, items=table), tmp_path / "work"))
        return [(p.where, p.what, p.expected, p.found) for p in found]

    (missing,) = said("bid_micro")
    assert missing[:3] == ("items.bid_micro", "missing column", "the column rules.discount.column reads")
    assert missing[3].endswith('did you mean "bid_micros"?')
    assert said("bid_micros") == said("worn", [0.5, None] * (world.ITEMS // 2)) == []
    assert [p[1] for p in said("worn", ["yes"] * world.ITEMS)] == ["wrong type"]
    assert [p[1] for p in said("worn", [0.5, np.nan] * (world.ITEMS // 2))] == ["not a finite number"]


def test_metadata_columns_must_be_of_the_items_table(tmp_path):
    problem = one(problems(tmp_path, metadata=["tags", "title"]), "missing column")
    assert (problem.where, problem.expected) == ("items.title", "the column metadata.columns reads")


@pytest.mark.parametrize("name", ["users", "items", "impressions"])
def test_a_missing_key_is_told(tmp_path, name):
    key = "item_id" if name == "items" else "user_id"
    table = getattr(world, name)().drop(key)
    found = [p for p in problems(tmp_path, tables={name: table}) if p.what == "missing column"]
    assert [p.where for p in found] == [f"{name}.{key}"]


def test_a_column_missing_from_one_file_is_told_by_the_file(tmp_path):
    extra = world.impressions().slice(599).drop("surface")
    found = problems(tmp_path, tables={"impressions_2": extra})
    assert one(found, "missing column").found == "1 of 2 files lack it, first impressions_2.parquet"


WRONG = {
    "category": ({"kind": "category"}, [1.5, 2.5], "an integer, string or boolean for a category", "double"),
    "number": ({"kind": "number"}, ["a", "b"], "a number for a number", "string"),
    "value": ({"kind": "value"}, ["a", "b"], "a number for a value", "string"),
    "bag of text": ({"kind": "bag"}, ["a", "b"], "a list column (or set `separator` for text) for a bag", "string"),
    "bag to split": (
        {"kind": "bag", "separator": ","},
        [1, 2],
        "a list, or text split at ',', for a bag",
        "int64",
    ),
    "bag of floats": (
        {"kind": "bag"},
        [[1.5], [2.5]],
        "a list of integers or strings for a bag",
        "list<element: double>",
    ),
    "embedding": ({"kind": "embedding", "width": 2}, [1.0, 2.0], "a list of 2 numbers for a embedding", "double"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_type_says_what_the_kind_needs(tmp_path, case):
    kind, cells, expected, given = WRONG[case]
    items = world.put(world.items(), "x", cells * (world.ITEMS // 2))
    problem = one(problems(tmp_path, {"item": {"x": kind}}, tables={"items": items}), "wrong type")
    assert (problem.where, problem.expected, problem.found) == ("items.x", expected.replace("a emb", "an emb"), given)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ({"kind": "category"}, pa.array(["a", None] * 15).dictionary_encode()),
        ({"kind": "category"}, pa.array([True, None] * 15)),
        ({"kind": "number"}, pa.array([1, None] * 15)),
        ({"kind": "bag"}, pa.array([["a"], None] * 15)),
        ({"kind": "bag", "separator": ","}, pa.array(["a,b", None] * 15)),
        ({"kind": "embedding", "width": 2}, pa.array([[1.0, 2.0], None] * 15, pa.list_(pa.float32(), 2))),
        ({"kind": "embedding", "width": 2}, pa.array([[1.0, 2.0], None] * 15)),
    ],
)
def test_a_right_type_with_missing_values_is_no_problem(tmp_path, kind, values):
    items = world.put(world.items(), "x", values)
    assert problems(tmp_path, {"item": {"x": kind}}, tables={"items": items}) == []


def test_an_embedding_of_another_fixed_width_is_a_wrong_type(tmp_path):
    items = world.put(world.items(), "vector", pa.array([[1.0] * 3] * 30, pa.list_(pa.float32(), 3)))
    assert (
        one(problems(tmp_path, tables={"items": items}), "wrong type").expected
        == "a list of 2 numbers for an embedding"
    )


def test_embedding_rows_of_another_width_are_counted(tmp_path):
    items = world.put(world.items(), "vector", [[1.0, 2.0]] * 28 + [[1.0], []])
    problem = one(problems(tmp_path, tables={"items": items}), "wrong width")
    assert (problem.where, problem.found) == ("items.vector", "2 of 30 rows of another width")


def test_nan_and_infinity_are_counted_by_row(tmp_path):
    items = world.put(world.items(), "vector", [[1.0, 2.0]] * 27 + [[np.nan, np.inf], [np.inf, 0.0], None])
    users = world.put_at(world.users(), "age", 0, float("nan"))
    log = world.put_at(world.impressions(), "slot", 0, float("-inf"))
    found = problems(tmp_path, tables={"items": items, "users": users, "impressions": log})
    assert [(p.where, p.what) for p in found] == [
        (w, "not a finite number") for w in ("users.age", "items.vector", "impressions.slot")
    ]
    assert found[1].found == "NaN or infinity in 2 of 30 rows; write null where a value is missing"


def test_a_csv_type_is_said_to_be_inferred(tmp_path):
    world.write_csv(tmp_path, "people", world.put(world.users(), "age", ["old"] * world.USERS))
    assert one(problems(tmp_path, users="people.csv"), "wrong type").found == "string (inferred from CSV)"


def test_a_csv_value_against_its_type_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CSV_BLOCK", 64)
    (tmp_path / "people.csv").write_text("user_id,age\n" + "".join(f"{n},1\n" for n in range(20)) + "20,old\n")
    problem = one(problems(tmp_path, users="people.csv"), "table cannot be read")
    assert problem.where == "data.users"
    assert "'old'" in problem.found


# keys


@pytest.mark.parametrize("name", ["users", "items", "impressions"])
def test_keys_must_be_integers(tmp_path, name):
    key = "item_id" if name == "items" else "user_id"
    table = getattr(world, name)()
    found = problems(tmp_path, tables={name: world.put(table, key, table[key].cast(pa.string()))})
    problem = one(found, "wrong type")
    assert (problem.where, problem.expected, problem.found) == (f"{name}.{key}", "an integer id", "string")


def test_nulls_in_a_key_are_counted(tmp_path):
    log = world.put_at(world.put_at(world.impressions(), "user_id", 0, None), "item_id", 9, None)
    users = world.put_at(world.users(), "user_id", 19, None)
    log = world.put(log, "user_id", [u if u is None else u % 19 for u in log["user_id"].to_pylist()])
    found = [p for p in problems(tmp_path, tables={"impressions": log, "users": users}) if p.what == "nulls in a key"]
    assert [(p.where, p.found) for p in found] == [
        ("users.user_id", "1 of 20 rows"),
        ("impressions.user_id", "1 of 600 rows (0.17%)"),
        ("impressions.item_id", "1 of 600 rows (0.17%)"),
    ]


def test_duplicate_ids_are_counted_with_examples(tmp_path):
    users = pa.concat_tables([world.users(), world.users().slice(3, 2)])
    problem = one(problems(tmp_path, tables={"users": users}), "duplicate ids")
    assert (problem.where, problem.found) == ("users.user_id", "2 ids more than once, such as 3, 4")


def test_items_and_users_of_the_log_that_are_in_no_table_are_told(tmp_path):
    items, users = world.items().slice(0, 28), world.users().slice(1)
    found = problems(tmp_path, tables={"items": items, "users": users})
    item, user = one(found, "item in the log but not in the table"), one(found, "user in the log but not in the table")
    assert (item.where, item.severity) == ("impressions.item_id", "error")
    assert item.found == "40 of 600 rows (6.67%) with an item_id not there, such as 28, 29"
    assert (user.where, user.severity) == ("impressions.user_id", "error")
    assert user.found == "30 of 600 rows (5.00%) with a user_id not there, such as 0"


def test_history_ids_times_and_labels_are_checked_and_its_nulls_are_not(tmp_path):
    history = pa.table(
        {
            "user_id": [1, 2, 99],
            "item_id": [1, None, 3],
            "time_ms": [world.START_MS - 3, world.START_MS - 2, 7],
            "is_click": pa.array([None, 2, 1], pa.int8()),
        }
    )
    found = problems(tmp_path, tables={"history": history}, history="history.parquet")
    assert [(p.where, p.what) for p in found] == [
        ("history.item_id", "nulls in a key"),
        ("history.time_ms", "implausible time"),
        ("history.user_id", "user in the log but not in the table"),
        ("history.is_click", "not 0 or 1"),
    ]


@pytest.mark.parametrize("name", ["users", "items", "impressions"])
def test_an_empty_table_is_told(tmp_path, name):
    table = getattr(world, name)().slice(0, 0)
    assert name in [p.where for p in problems(tmp_path, tables={name: table}) if p.what == "no rows"]


# time


@pytest.mark.parametrize(("unit", "factor"), [("seconds", 1e-3), ("microseconds", 1e3), ("nanoseconds", 1e6)])
def test_a_time_in_another_unit_is_named(tmp_path, unit, factor):
    log = world.impressions()
    log = world.put(log, "time_ms", (log["time_ms"].to_numpy() * factor).astype(np.int64))
    (problem,) = problems(tmp_path, tables={"impressions": log})
    assert (problem.where, problem.what) == ("impressions.time_ms", "implausible time")
    assert problem.expected == "UTC milliseconds between 1990 and 2100"
    assert re.fullmatch(rf"600 of 600 rows \(100\.00%\) outside, such as \d+; they look like {unit}", problem.found)


def test_a_missing_labelled_column_is_told(tmp_path):
    log = world.put(world.impressions(), "known_ms", world.impressions()["time_ms"])
    problem = one(problems(tmp_path, tables={"impressions": log}, labelled="konwn_ms"), "missing column")
    assert (problem.where, problem.severity) == ("impressions.konwn_ms", "error")
    assert problem.expected == "the column data.labelled reads"
    assert problem.found == 'no such column; did you mean "known_ms"?'


def test_when_labels_were_known_is_integer_milliseconds(tmp_path):
    known = world.impressions()["time_ms"].cast(pa.timestamp("ms"))
    log = world.put(world.impressions(), "known_ms", known)
    problem = one(problems(tmp_path, tables={"impressions": log}, labelled="known_ms"), "wrong type")
    assert (problem.where, problem.expected) == ("impressions.known_ms", "integer milliseconds (UTC)")
    assert problem.found == "timestamp[ms]"


def test_when_labels_were_known_may_be_missing_of_some_and_of_a_history(tmp_path):
    known = world.put_at(
        world.put(world.impressions(), "known_ms", world.impressions()["time_ms"]), "known_ms", 7, None
    )
    history = world.impressions().slice(0, 2).select(["user_id", "item_id", "time_ms", "is_click"])
    history = world.put(history, "time_ms", [world.START_MS - 5, world.START_MS - 4])
    tables = {"impressions": known, "history": history}
    assert problems(tmp_path, tables=tables, labelled="known_ms", history="history.parquet") == []


def test_a_time_that_is_not_integer_is_a_wrong_type(tmp_path):
    log = world.impressions()
    log = world.put(log, "time_ms", log["time_ms"].cast(pa.timestamp("ms")))
    problem = one(problems(tmp_path, tables={"impressions": log}), "wrong type")
    assert (problem.where, problem.expected) == ("impressions.time_ms", "integer milliseconds (UTC)")


def test_nulls_in_the_time_are_counted(tmp_path):
    log = world.put_at(world.impressions(), "time_ms", 3, None)
    (problem,) = problems(tmp_path, tables={"impressions": log})
    assert (problem.where, problem.what) == ("impressions.time_ms", "nulls in the time")


def test_days_out_of_order_are_told_with_the_first_row(tmp_path):
    log = world.impressions()
    log = pa.concat_tables([log.slice(0, 300), log.slice(100, 2), log.slice(300)]).drop("slot")
    log = world.put(log, "slot", np.arange(602) * 7 % 11)
    (problem,) = problems(tmp_path, tables={"impressions": log})
    assert problem.what == "days out of order"
    first = "row 301 is of 2022-04-25 after rows of 2022-04-26"
    assert problem.found == f"2 of 602 rows (0.33%) of an earlier day than a row before; {first}"


def test_rows_out_of_order_within_a_day_are_no_problem(tmp_path):
    log = world.impressions()
    order = np.concatenate([np.arange(200)[::-1], np.arange(200, 600)])
    assert problems(tmp_path, tables={"impressions": log.take(pa.array(order))}) == []


def test_a_day_without_rows_is_told_with_what_the_log_has(tmp_path):
    found = problems(tmp_path, train=["2022-04-21", "2022-04-25"])
    problem = one(found, "day without rows")
    assert problem.where == "data.train"
    days = "2022-04-21, 2022-04-22, 2022-04-23 ..."
    assert problem.found == f"no rows on {days}; the log has 2022-04-25 to 2022-04-27"


def test_a_log_column_the_funnel_reads_as_day_is_told(tmp_path):
    log = world.put(world.impressions(), "day", ["mon"] * 600)
    found = problems(tmp_path, {"context": {"day": {"kind": "category"}}}, tables={"impressions": log})
    assert [(p.where, p.what) for p in found] == [("impressions.day", "reserved name")]


# labels


def test_a_label_has_no_other_values_than_0_and_1(tmp_path):
    log = world.put_at(world.impressions(), "is_click", 7, 5)
    (problem,) = problems(tmp_path, tables={"impressions": log})
    assert (problem.where, problem.what) == ("impressions.is_click", "not 0 or 1")
    assert problem.found == "1 of 600 rows (0.17%), such as 5"


def test_a_label_has_no_nulls(tmp_path):
    log = world.put_at(world.impressions(), "is_click", 7, None)
    (problem,) = problems(tmp_path, tables={"impressions": log})
    assert (problem.what, problem.found) == ("nulls in a label", "1 of 600 rows (0.17%)")


def test_a_label_may_be_boolean_or_a_float_of_0_and_1(tmp_path):
    log = world.impressions()
    for kind in (pa.bool_(), pa.float32()):
        assert problems(tmp_path, tables={"impressions": world.put(log, "is_click", log["is_click"].cast(kind))}) == []


def test_a_label_of_text_is_a_wrong_type(tmp_path):
    log = world.impressions()
    found = problems(tmp_path, tables={"impressions": world.put(log, "is_click", ["yes"] * 600)})
    assert [(p.where, p.what, p.expected) for p in found] == [
        ("impressions.is_click", "wrong type", "a label of 0 and 1")
    ]


def test_a_label_has_positives_on_the_training_days(tmp_path):
    log = world.impressions()
    clicks = log["is_click"].to_numpy() * (np.arange(600) >= 200)
    (problem,) = problems(tmp_path, tables={"impressions": world.put(log, "is_click", clicks)})
    assert (problem.where, problem.what) == ("impressions.is_click", "no positives")


# duplicates


def test_duplicate_rows_are_a_warning(tmp_path):
    log = world.impressions()
    log = pa.concat_tables([log.slice(0, 10), log.slice(0, 10), log.slice(5, 5), log.slice(10)])
    (problem,) = problems(tmp_path, tables={"impressions": log})
    assert (problem.where, problem.what, problem.severity) == ("impressions", "duplicate rows", "warning")
    assert problem.found == "15 of 615 rows (2.44%) repeat an earlier one in all the funnel reads"


def test_row_hashes_count_what_a_set_counts():
    rng = np.random.default_rng(1)
    hashes, seen = RowHashes(), []
    try:
        for _ in range(5):
            rows = {
                "a": rng.integers(0, 20, 200).tolist(),
                "b": [None if n == 0 else f"s{n}" for n in rng.integers(0, 5, 200)],
                "c": [None if n == 0 else n / 2 for n in rng.integers(0, 3, 200).tolist()],
                "d": rng.integers(0, 2, 200).astype(bool).tolist(),
            }
            batch = pa.RecordBatch.from_pydict(rows)
            seen += [tuple(r.values()) for r in batch.to_pylist()]
            hashes.add(batch)
        assert hashes.num_repeated() == len(seen) - len(set(seen))
    finally:
        hashes.close()


# leaks


def test_a_feature_that_is_a_label_is_leaky(tmp_path):
    found = problems(tmp_path, {"context": {"c": {"kind": "number", "column": "is_click"}}})
    assert [(p.where, p.what) for p in found] == [("features.context.c", "leaky feature computed after the label")]
    assert "the label 'is_click' itself" in found[0].found


def leaky(folder, kind, values):
    log = world.put(world.impressions(), "watched", values)
    return problems(folder, {"context": {"watched": {"kind": kind}}}, tables={"impressions": log})


CLICKS = world.impressions()["is_click"].to_numpy()


@pytest.mark.parametrize("sign", [1, -1])
def test_a_number_that_separates_a_label_is_leaky_in_either_direction(tmp_path, sign):
    (problem,) = leaky(tmp_path, "number", sign * (CLICKS * 100.0 + np.arange(600) % 50))
    assert (problem.where, problem.severity) == ("features.context.watched", "error")
    assert problem.what == "leaky feature computed after the label?"
    assert problem.found == "AUC 1.0000 for is_click alone, on 200 training rows; remove it"


def test_a_number_known_only_with_the_label_is_leaky(tmp_path):
    (problem,) = leaky(tmp_path, "number", [5.0 if c else None for c in CLICKS])
    assert problem.what == "leaky feature computed after the label?"


@pytest.mark.parametrize("kind", ["category", "bag"])
def test_a_category_that_separates_a_label_is_leaky(tmp_path, kind):
    names = [f"{'won' if c else 'lost'}{n % 3}" for n, c in enumerate(CLICKS)]
    found = leaky(tmp_path, kind, names if kind == "category" else [[n] for n in names])
    assert ("features.context.watched", "error") in [(p.where, p.severity) for p in found]


def test_a_value_that_comes_only_with_the_label_is_a_warning(tmp_path):
    chance = np.random.default_rng(0).random(600) < 0.9
    (problem,) = leaky(
        tmp_path, "category", ["played" if c and k else "shown" for c, k in zip(CLICKS, chance, strict=True)]
    )
    assert problem.severity == "warning"
    assert re.fullmatch(r"'played' has is_click in (\d+) of \1 training rows", problem.found)


def test_a_category_of_its_own_in_each_row_is_no_leak(tmp_path):
    assert leaky(tmp_path, "category", np.arange(600)) == []


def test_a_feature_that_helps_is_no_leak(tmp_path):
    noise = np.random.default_rng(0).normal(size=600)
    assert leaky(tmp_path, "number", CLICKS * 2.0 + noise) == []


def test_too_few_positives_are_no_proof_of_a_leak(tmp_path):
    clicks = (np.arange(600) % 5 == 0).astype(np.int8)
    log = world.put(world.put(world.impressions(), "is_click", clicks), "watched", clicks * 1.0)
    features = {"context": {"watched": {"kind": "number"}}}
    assert clicks[:200].sum() < check_leaks.ENOUGH
    assert problems(tmp_path, features, tables={"impressions": log}) == []


def test_the_leak_sample_holds_every_nth_row_and_no_more_than_its_bound(monkeypatch):
    monkeypatch.setattr(check_leaks, "SAMPLE_ROWS", 100)
    sample = LeakSample({"x": ("x", Category())}, ["y"])
    for start in range(0, 5000, 37):
        x = np.arange(start, min(start + 37, 5000))
        sample.add(pa.RecordBatch.from_pydict({"x": x, "y": x % 2}))
        assert sample._held <= 100
    held = np.concatenate([p.column("x").to_numpy() for p in sample._parts])
    assert len(held) > 50
    assert set(np.diff(held)) == {64}


def test_auc_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(2)
    amounts, happened = rng.integers(0, 8, 200).astype(float), rng.random(200) < 0.3
    pos, neg = amounts[happened][:, None], amounts[~happened][None, :]
    assert auc(amounts, happened) == pytest.approx(((pos > neg) + 0.5 * (pos == neg)).mean())


# features with the time they were computed


def dated(folder, time_ms, **tables):
    users = world.put(world.users(), "made_ms", np.full(world.USERS, world.START_MS - 1))
    items = world.put(world.items(), "made_ms", np.full(world.ITEMS, world.START_MS - 1))
    users = world.put_at(users, "made_ms", 4, time_ms)
    return problems(folder, tables={"users": users, "items": items, **tables}, computed="made_ms")


def test_features_computed_before_the_training_days_are_no_problem(tmp_path):
    assert dated(tmp_path, world.START_MS - 1) == []


def test_features_computed_after_the_training_days_are_leaky(tmp_path):
    latest = world.START_MS + world.DAY_MS
    (problem,) = dated(tmp_path, latest)
    assert (problem.where, problem.severity) == ("users.made_ms", "error")
    assert problem.what == "leaky feature computed after the label"
    assert problem.found == f"1 of 20 rows, the latest {latest} ms; their 1 features (age) may know those labels"


def test_features_computed_during_the_training_days_are_a_warning(tmp_path):
    (problem,) = dated(tmp_path, world.START_MS)
    assert (problem.what, problem.severity) == ("features computed during the training days", "warning")


def test_a_computed_time_that_is_missing_or_not_a_time_is_told(tmp_path):
    items = world.put(world.items(), "made_ms", ["x"] * world.ITEMS)
    found = dated(tmp_path, None, items=items)
    assert [(p.where, p.what, p.severity) for p in found] == [
        ("users.made_ms", "nulls in the computed time", "warning"),
        ("items.made_ms", "wrong type", "error"),
    ]
    gone = problems(tmp_path, computed="made")
    assert [(p.where, p.what) for p in gone] == [("users.made", "missing column"), ("items.made", "missing column")]


# memory


def test_the_log_is_read_once_in_batches_and_only_what_the_funnel_reads(tmp_path, monkeypatch):
    asked, sizes = [], []
    original = Tables.impressions

    def watched(self, columns, *args, **kwargs):
        asked.append(list(columns))
        for batch in original(self, columns, *args, **kwargs):
            sizes.append(batch.num_rows)
            yield batch

    monkeypatch.setattr(Tables, "impressions", watched)
    log = world.put(world.impressions(), "unread", ["x" * 100] * 600)
    assert problems(tmp_path, tables={"impressions": log}) == []
    assert asked == [["user_id", "item_id", "time_ms", "is_click", "surface", "slot"]]
    assert sum(sizes) == 600


def test_a_check_of_a_long_log_holds_a_small_part_of_it(tmp_path):
    world.write(tmp_path)
    num, part = 1_000_000, world.impressions().slice(0, 200)
    schema = part.schema.append(pa.field("serial", pa.int64()))
    with pq.ParquetWriter(tmp_path / "impressions.parquet", schema) as writer:
        for start in range(0, num, 100_000):
            rows = np.arange(start, start + 100_000)
            block = part.take(pa.array(rows % 200))
            writer.write_table(block.append_column("serial", pa.array(rows)).cast(schema), row_group_size=50_000)
    plain = world.plain(validate=["2022-04-26", "2022-04-26"])
    plain["features"]["context"]["serial"] = {"kind": "category"}
    config = parse_config(plain, "tiny.toml")
    tables = find_tables(config, tmp_path, tmp_path / "work")
    before, held = pa.total_allocated_bytes(), []
    for batch in tables.impressions(["user_id", "item_id", "time_ms", "serial"], batch_rows=10_000):
        held.append(pa.total_allocated_bytes() - before)
        assert batch.num_rows <= 10_000
    assert max(held) < num * 4 * 8 / 4
    assert [p.what for p in check(config, tables)] == ["day without rows", "day without rows"]


def test_labels_known_before_their_impression_are_told(tmp_path):
    """Seconds instead of milliseconds look the same: they are far in the past."""
    log = world.impressions()
    time_ms = log["time_ms"].to_numpy()
    known = pa.array(np.where(np.arange(len(time_ms)) == 1, time_ms - 1, time_ms + 5_000))
    tables = {"impressions": log.append_column("known_ms", known)}
    problem = one(problems(tmp_path, tables=tables, labelled="known_ms"), "labels known before their impression")
    assert problem.where == "impressions.known_ms"
    assert problem.found.startswith("1 of ")
    assert f"{time_ms[1] - 1} of an impression at {time_ms[1]}" in problem.found
