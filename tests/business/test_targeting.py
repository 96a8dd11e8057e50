import json
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prerank.business.targeting import Targeting, hour_of_week
from prerank.config import MOST_TARGETED, TargetingRule
from prerank.errors import BundleError, DataError, RequestError

BERLIN = "Europe/Berlin"
RULES = {
    "country": TargetingRule(item="countries", user="country"),
    "blocked": TargetingRule(item="blocked", user="country", excludes=True),
    "placement": TargetingRule(item="placements", context="placement"),
    "hours": TargetingRule(item="hours", schedule=BERLIN),
}


def ms(*local: int, zone: str = BERLIN, fold: int = 0) -> int:
    return int(datetime(*local, tzinfo=ZoneInfo(zone), fold=fold).timestamp() * 1000)  # type: ignore[arg-type]


MONDAY = ms(2026, 1, 5, 0, 30)


def fitted(rule: TargetingRule, column: pa.Array) -> Targeting:
    return Targeting.fit({"rule": rule}, {rule.item: pa.chunked_array([column])}, len(column))


def countries(column: pa.Array, *, excludes: bool = False) -> Targeting:
    return fitted(TargetingRule(item="countries", user="country", excludes=excludes), column)


def seen(targeting: Targeting, country: object) -> list[int]:
    return targeting.rows({"country": country}, {}, 0).tolist()  # type: ignore[dict-item]


def is_eligible(item: dict, profile: dict, context: dict, time_ms: int) -> bool:
    """The rules in plain Python, one item."""

    def texts(value):
        return {str(one) for one in (value if isinstance(value, list) else [value]) if one is not None}

    moment = datetime.fromtimestamp(time_ms / 1000, ZoneInfo(BERLIN))
    asked = {
        "countries": texts(profile.get("country")),
        "placements": texts(context["placement"]),
        "hours": {str((moment.isoweekday() - 1) * 24 + moment.hour)},
    }
    allowed = all(not item[column] or asked[column] & texts(item[column]) for column in asked)
    return allowed and not texts(profile.get("country")) & texts(item["blocked"])


COUNTRY = st.sampled_from(["de", "fr", "it", "xx"])
LISTS = st.none() | st.lists(COUNTRY, max_size=3)
ITEMS = st.lists(
    st.fixed_dictionaries(
        {
            "countries": LISTS,
            "blocked": LISTS,
            "placements": st.none() | st.lists(st.integers(1, 3), max_size=2),
            "hours": st.none() | st.lists(st.integers(0, 8), max_size=9),
        }
    ),
    max_size=150,
)
TYPES = {"countries": pa.list_(pa.string()), "blocked": pa.list_(pa.string())}


@given(
    items=ITEMS,
    country=COUNTRY | LISTS | st.just("never seen"),
    placement=st.none() | st.integers(0, 4) | st.sampled_from(["1", "2"]) | st.lists(st.integers(0, 4)),
    minutes=st.integers(0, 20 * 60),
)
def test_rows_are_those_of_the_items_that_plain_python_calls_eligible(items, country, placement, minutes):
    columns = {
        rule.item: pa.chunked_array([[item[rule.item] for item in items]], TYPES.get(rule.item, pa.list_(pa.int64())))
        for rule in RULES.values()
    }
    targeting = Targeting.fit(RULES, columns, len(items))
    asked = ({"country": country}, {"placement": placement}, MONDAY + minutes * 60_000)
    expected = [n for n, item in enumerate(items) if is_eligible(item, *asked)]
    assert targeting.rows(*asked).tolist() == expected
    again = Targeting.from_plain(RULES, json.loads(json.dumps(targeting.to_plain())), targeting.bitmaps, len(items))
    assert again.rows(*asked).tolist() == expected


def test_an_item_that_lists_nothing_is_for_everybody_and_for_the_unknown_there_are_no_others():
    targeting = countries(pa.array([["de"], [], None, ["fr", "de"]]))
    assert seen(targeting, "de") == [0, 1, 2, 3]
    assert seen(targeting, ["fr", "it"]) == [1, 2, 3]
    for unknown in (None, "never seen", [], [None], ""):
        assert seen(targeting, unknown) == [1, 2]
    assert targeting.rows({}, {}, 0).tolist() == [1, 2]


def test_a_rule_that_excludes_leaves_out_what_has_any_value_in_common():
    targeting = countries(pa.array([["de"], [], None, ["fr", "de"]]), excludes=True)
    assert seen(targeting, "de") == [1, 2]
    assert seen(targeting, ["fr", "it"]) == [0, 1, 2]
    for unknown in (None, "never seen", []):
        assert seen(targeting, unknown) == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", [pa.int8(), pa.uint64(), pa.string(), pa.large_string()])
def test_whole_numbers_and_their_text_are_the_same_value(kind):
    for column in (pa.array([["7"], ["8"]]).cast(pa.list_(kind)), pa.array(["7", "8"]).cast(kind)):
        assert seen(countries(column), 7) == seen(countries(column), "7") == [0]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["a", None, "b"]),
        pa.array(["a", None, "b"]).dictionary_encode(),
        pa.array(["a", None, "b"], pa.string_view()),
        pa.array([["a"], None, ["b"]], pa.large_list(pa.string())),
        pa.array([["a"], None, ["b"]], pa.list_(pa.string(), 1)),
        pa.array([["a"], None, ["b"]], pa.list_(pa.dictionary(pa.int32(), pa.string()))),
        pa.ListArray.from_arrays([0, 2, 2, 3], pa.array(["a", "a", "b"])),
    ],
    ids=lambda column: str(column.type),
)
def test_lists_and_single_values_come_in_every_type_that_arrow_has_for_them(column):
    targeting = countries(column)
    assert [seen(targeting, value) for value in ("a", "b", "c")] == [[0, 1], [1, 2], [1]]


def test_true_and_false_are_values():
    targeting = countries(pa.array([True, False, None]))
    assert [seen(targeting, value) for value in (True, "true", False, None)] == [[0, 2], [0, 2], [1, 2], [2]]


def test_a_column_may_be_in_pieces_or_all_null_and_there_may_be_no_items():
    rule = TargetingRule(item="c", user="country")
    pieces = pa.chunked_array([pa.array([["a"]]), pa.array([["b"], None])])
    assert seen(Targeting.fit({"r": rule}, {"c": pieces}, 3), "b") == [1, 2]
    assert seen(countries(pa.nulls(70)), "a") == list(range(70))
    assert seen(countries(pa.array([], pa.list_(pa.string()))), "a") == []


def test_the_hour_of_the_week_is_that_of_the_zones_clocks():
    assert hour_of_week(ms(2026, 1, 5, 0, 0), BERLIN) == 0
    assert hour_of_week(ms(2026, 1, 5, 0, 0) - 1, BERLIN) == 167
    assert hour_of_week(ms(2026, 1, 11, 23, 59), BERLIN) == 167
    assert hour_of_week(ms(2026, 1, 6, 13, 5), BERLIN) == 24 + 13
    assert hour_of_week(ms(2026, 1, 5, 0, 0), "America/New_York") == 6 * 24 + 18
    assert hour_of_week(0, "UTC") == 3 * 24


def test_where_clocks_are_put_forward_an_hour_never_comes_and_where_back_one_comes_twice():
    forward, back = ms(2026, 3, 29, 0, 0), ms(2026, 10, 25, 0, 0)
    hour = 3_600_000
    assert [hour_of_week(forward + n * hour, BERLIN) - 144 for n in range(4)] == [0, 1, 3, 4]
    assert [hour_of_week(back + n * hour, BERLIN) - 144 for n in range(5)] == [0, 1, 2, 2, 3]
    only_two = fitted(TargetingRule(item="hours", schedule=BERLIN), pa.array([[146], None]))
    assert [len(only_two.rows({}, {}, forward + n * hour)) for n in range(4)] == [1, 1, 1, 1]
    assert [len(only_two.rows({}, {}, back + n * hour)) for n in range(5)] == [1, 1, 2, 2, 1]


@given(days=st.integers(0, 3000), seconds=st.integers(0, 86_399))
def test_every_moment_is_in_one_hour_of_the_week(days, seconds):
    moment = datetime(2020, 1, 1, tzinfo=ZoneInfo("UTC")) + timedelta(days=days, seconds=seconds)
    local = moment.astimezone(ZoneInfo(BERLIN))
    assert hour_of_week(int(moment.timestamp() * 1000), BERLIN) == local.weekday() * 24 + local.hour


def test_a_time_after_the_calendars_end_is_the_callers_error():
    with pytest.raises(RequestError, match=f"time_ms: expected a time that {BERLIN} has a calendar for, got 2534"):
        hour_of_week(253_402_300_799_999, BERLIN)


def test_a_context_field_missing_or_mistyped_is_the_callers_error_and_a_profile_the_stores():
    placed = fitted(TargetingRule(item="p", context="placement"), pa.array(["a"]))
    for context, says in (({}, "missing; expected text"), ({"placement": 1.5}, r"expected text, .* got 1\.5")):
        with pytest.raises(RequestError, match=rf"context\.placement: {says}"):
            placed.rows({}, context, 0)
    assert placed.rows({}, {"placement": None}, 0).tolist() == []
    with pytest.raises(DataError, match=r"user store: country: expected text, .* got 1\.5"):
        seen(countries(pa.array(["a"])), [1.5])


@pytest.mark.parametrize(
    ("column", "says"),
    [
        (pa.array([1.5]), "expected text, whole numbers, booleans or lists of these, found double"),
        (pa.array([[[1]]]), "lists of these, found list"),
        (pa.array([["a", None]]), "expected no null in a list, found 1"),
        (pa.array([""]), "expected no empty text"),
        (pa.array(range(MOST_TARGETED + 1)), "expected at most 4,096 distinct values, found 4,097"),
    ],
)
def test_a_column_that_cannot_be_meant_is_refused_by_its_key(column, says):
    with pytest.raises(DataError, match=rf"targeting\.rule\.item = 'countries': .*{says}"):
        countries(column)


@pytest.mark.parametrize("hour", [-1, 168, "Mo"])
def test_an_hour_the_week_does_not_have_is_refused(hour):
    with pytest.raises(
        DataError, match=rf"targeting\.rule\.item = 'h': expected hours of the week, 0 to 167, found '{hour}'"
    ):
        fitted(TargetingRule(item="h", schedule=BERLIN), pa.array([[hour]]))


def test_a_column_that_is_not_there_or_of_another_length_is_refused():
    rules = {"rule": TargetingRule(item="c", user="u")}
    with pytest.raises(DataError, match=r"targeting\.rule\.item = 'c': the items have no such column"):
        Targeting.fit(rules, {}, 1)
    with pytest.raises(DataError, match=r"targeting\.rule\.item = 'c': 1 rows for 2 items"):
        Targeting.fit(rules, {"c": pa.chunked_array([["a"]])}, 2)


def test_what_does_not_fit_the_rules_is_refused():
    good = Targeting.fit(RULES, {rule.item: pa.chunked_array([pa.nulls(70)]) for rule in RULES.values()}, 70)
    plain, bitmaps = good.to_plain(), good.bitmaps
    for wrong, wrong_bitmaps, num_items, says in (
        (None, bitmaps, 70, r"expected the values of the rules \['country', .*, found NoneType"),
        ({"country": []}, bitmaps, 70, r"found \['country'\]"),
        (plain | {"hours": "5"}, bitmaps, 70, r"targeting\.hours: expected a list of texts"),
        (plain | {"hours": ["5", "5"]}, bitmaps, 70, r"targeting\.hours: .* ascending, each once"),
        (plain | {"hours": ["5"]}, bitmaps, 70, r"expected bitmaps int64 \[4, 2\] of 70 items, found int64 \[3, 2\]"),
        (plain, bitmaps, 129, r"expected bitmaps int64 \[3, 3\]"),
        (plain, bitmaps.int(), 70, r"found int32 \[3, 2\]"),
    ):
        with pytest.raises(BundleError, match=says):
            Targeting.from_plain(RULES, wrong, wrong_bitmaps, num_items)


def test_it_says_which_columns_it_reads_and_for_which_rule_first():
    columns = {rule.item: pa.chunked_array([["7"]]) for rule in RULES.values()}
    targeting = Targeting.fit(RULES, columns, 1)
    assert targeting.columns("user") == {"country": "targeting.country.user"}
    assert targeting.columns("context") == {"placement": "targeting.placement.context"}
    assert list(targeting.columns("item")) == ["countries", "blocked", "placements", "hours"]
    assert targeting.example() == {"placement": "7"}


@pytest.mark.parametrize("at_once", [1, 64 * 51, 1 << 24])
def test_its_bitmaps_are_its_state_and_large_ones_are_right_however_many_items_are_packed_at_once(
    at_once, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("prerank.business.lists._BYTES_AT_ONCE", at_once)
    rng = np.random.default_rng(5)
    lists = [rng.integers(0, 50, rng.integers(0, 4)).tolist() for _ in range(5_001)]
    targeting = countries(pa.array(lists, pa.list_(pa.int64())))
    assert list(targeting.state_dict()) == ["bitmaps"]
    assert targeting.bitmaps.shape == (51, 79)
    asked = [3, 17]
    expected = [n for n, row in enumerate(lists) if not row or {*asked} & {*row}]
    assert torch.equal(targeting.rows({"country": asked}, {}, 0), torch.tensor(expected))


def test_a_part_of_the_rows_is_targeted_as_they_are_in_the_whole():
    rng = np.random.default_rng(3)
    rules = {
        "country": TargetingRule(item="countries", user="country"),
        "not": TargetingRule(item="blocked", user="country", excludes=True),
    }
    lists = [[f"c{one}" for one in range(7) if rng.random() < 0.3] for _ in range(1000)]
    columns = {name: pa.chunked_array([pa.array(lists[::step])]) for name, step in (("countries", 1), ("blocked", -1))}
    whole = Targeting.fit(rules, columns, 1000, slack=37)
    rows = np.flatnonzero(rng.random(1000) < 0.4)
    part = whole.part(rows)
    assert part.num_items == len(rows)
    for country in ("c0", "c6", "none", None):
        expected = [row for row in whole.rows({"country": country}, {}, 0).tolist() if row in set(rows.tolist())]
        assert rows[part.rows({"country": country}, {}, 0).numpy()].tolist() == expected
