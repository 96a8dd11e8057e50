import pyarrow as pa
import pytest

from prerank.config import MOST_TARGETED
from tests.data import world
from tests.data.test_check import problems

RULES = {
    "country": {"user": "country", "item": "countries"},
    "hours": {"schedule": "Europe/Berlin", "item": "hours"},
    "placement": {"context": "placement", "item": "placements"},
}
ITEMS = {
    "countries": pa.array([["de"], None, []] * 10, pa.list_(pa.string())),
    "hours": pa.array([[0, 167], None, []] * 10, pa.list_(pa.int16())),
    "placements": pa.array([1, None, 3] * 10),
}


def said(folder, *, users=("de",) * world.USERS, **items):
    """What check says where users have a country and items these lists, as (where, what, expected, found)."""
    table = world.items()
    for name, column in {**ITEMS, **items}.items():
        table = table if column is None else world.put(table, name, column)
    people = world.users() if users is None else world.put(world.users(), "country", pa.array(users))
    found = problems(folder, tables={"users": people, "items": table}, targeting=RULES)
    return [(p.where, p.what, p.expected, p.found) for p in found]


def test_columns_that_targeting_reads_and_that_are_sound_are_no_problem(tmp_path):
    assert said(tmp_path) == []


def test_a_missing_column_names_the_rule_that_reads_it(tmp_path):
    (country, countries) = said(tmp_path, users=None, countries=None)
    assert country[:3] == ("users.country", "missing column", "the column targeting.country.user reads")
    assert countries[:3] == ("items.countries", "missing column", "the column targeting.country.item reads")


def test_a_type_that_names_nothing_is_told(tmp_path):
    expected = "integers, strings or booleans, or lists of these, for targeting"
    found = said(tmp_path, users=[[1.5]] * world.USERS, placements=pa.array([1.5] * world.ITEMS))
    assert [(where, what, wanted) for where, what, wanted, _ in found] == [
        ("users.country", "wrong type", expected),
        ("items.placements", "wrong type", expected),
    ]


@pytest.mark.parametrize(
    ("column", "values", "what", "found"),
    [
        ("countries", [["de", None]] * 30, "nulls in a list", "30 of them; leave them out"),
        ("countries", [""] * 30, "empty text", "empty text"),
        ("hours", [[168, -1, 5]] * 30, "no hour of the week", "-1, 168"),
        ("placements", [list(range(MOST_TARGETED + 1))] * 30, "too many values", "4,097"),
    ],
)
def test_values_that_publishing_would_refuse_are_told_before_training(tmp_path, column, values, what, found):
    (problem,) = said(tmp_path, **{column: pa.array(values)})
    assert (problem[0], problem[1], problem[3]) == (f"items.{column}", what, found)


@pytest.mark.parametrize("kind", [pa.list_(pa.string()), pa.large_list(pa.string()), pa.list_(pa.string(), 1)])
def test_lists_of_every_kind_and_dictionaries_are_read(tmp_path, kind):
    lists = pa.array([["de"], None, ["fr"]] * 10).cast(kind) if kind != pa.list_(pa.string(), 1) else None
    lists = pa.array([["de"], None, ["fr"]] * 10, kind) if lists is None else lists
    encoded = pa.array(["de", None, "fr"] * 10).dictionary_encode()
    assert said(tmp_path, countries=lists, placements=encoded) == []
