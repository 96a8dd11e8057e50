from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pytest
import torch

from prerank.business import rules
from prerank.business.rule import Rule, item_numbers
from prerank.business.rules import build_rules, fit_rules
from prerank.config import Rules
from prerank.errors import DataError


@dataclass(frozen=True)
class WithShare(Rules):
    share: str = ""


class Share(Rule):
    """A rule that keeps one column of the items."""

    why = "of no share"

    def __init__(self, column, num_rows):
        super().__init__()
        self.column = column
        self.register_buffer("shares", torch.full((num_rows,), torch.nan))

    @classmethod
    def build(cls, tasks, rules, num_rows):
        return cls(rules.share, num_rows) if rules.share else None

    def put(self, rows, items):
        self.shares[rows] = item_numbers(items, self.column, "rules.share").float()


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setitem(rules.RULES, "share", Share)


def test_only_the_rules_that_the_funnel_file_asks_for_are_built():
    assert build_rules(["click"], WithShare(), 2) == {}
    assert list(build_rules(["click"], WithShare(reserve_micros=1.0), 2)) == ["reserve"]
    assert list(build_rules(["click"], WithShare(share="s", floor={"click": 0.5}), 2)) == ["reserve", "share"]


def test_a_rule_fitted_knows_each_items_value_and_one_that_is_built_has_places_for_them():
    asked = WithShare(share="s")
    fitted, built = fit_rules([], asked, pa.table({"s": [3, None, 5]}), 4), build_rules([], asked, 4)
    assert fitted["share"].shares.nan_to_num(-1).tolist() == [3.0, -1.0, 5.0, -1.0]
    built["share"].load_state_dict(fitted["share"].state_dict(), assign=True)
    assert built["share"].shares.nan_to_num(-1).tolist() == [3.0, -1.0, 5.0, -1.0]


def test_a_rule_on_nothing_of_its_own_lets_all_win_and_keeps_nothing():
    rule, utility = Share("s", 0), torch.tensor([[1.0, -2.0]])
    rows = torch.tensor([[0, 1]])
    assert rule.adjust(torch.ones(1, 2, 1), utility, rows).tolist() == utility.tolist()
    assert rule.may_win(torch.ones(1, 2, 1), utility, rows).tolist() == [[True, True]]
    Rule.put(rule, rows[0], pa.table({"s": [1, 2]}))
    assert rule.shares.shape == (0,)


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([1, None, 3], pa.int16()), [1.0, np.nan, 3.0]),
        (pa.array([1.5, None, 3.0], pa.float32()), [1.5, np.nan, 3.0]),
        (pa.array([2**53 + 1, 0, 0]), [2.0**53, 0.0, 0.0]),
        (pa.array([True, False, None]), [1.0, 0.0, np.nan]),
        (pa.array(["1.25", "2", None]).cast(pa.decimal128(6, 2)), [1.25, 2.0, np.nan]),
        (pa.array([7.0, 7.0, None]).dictionary_encode(), [7.0, 7.0, np.nan]),
        (pa.array([None, None, None], pa.int64()), [np.nan] * 3),
    ],
)
def test_numbers_of_every_type_are_read_and_null_is_nan(column, expected):
    found = item_numbers(pa.table({"x": pa.chunked_array([column[:2], column[2:]])}), "x", "rules.share")
    assert found.dtype == torch.float64
    np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize(
    ("column", "said"),
    [
        (["a"], "rules.share: expected numbers in the items' column 'x', found string"),
        ([[1]], "rules.share: expected numbers in the items' column 'x', found list<item: int64>"),
        ([1.0, np.inf], "found inf in row 1; write null where it is not known"),
        ([np.nan, 1.0], "found nan in row 0; write null where it is not known"),
    ],
)
def test_a_column_of_anything_else_is_refused_by_the_key_that_names_it(column, said):
    with pytest.raises(DataError) as caught:
        item_numbers(pa.table({"x": column}), "x", "rules.share")
    assert said in str(caught.value)


def test_a_column_that_the_items_lack_is_refused_by_the_key_that_names_it():
    with pytest.raises(DataError, match=r"rules.share: expected numbers in .* 's', found the columns \['t'\]"):
        fit_rules([], WithShare(share="s"), pa.table({"t": [1]}), 1)
