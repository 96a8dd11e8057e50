"""The example's tests, of a prerank that has its rule: `tests/end_to_end/test_new_rule.py` makes one and runs them."""

import pyarrow as pa
import pytest
import torch

from prerank._tensor_files import read_tensors, write_tensors
from prerank.bundle.load import load
from prerank.bundle.registry import Registry
from prerank.config import parse_config
from prerank.data.check import check
from prerank.data.logs import find_tables
from prerank.errors import BundleError, ConfigError, DataError
from prerank.serve.funnel import Funnel
from prerank.types import Request
from tests.bundle.world import sign_again
from tests.data import world as tables
from tests.serve import world
from tests.serve.conftest import publish_live

ASKED = Request(1, 5, world.UNTIL, {"hour": 1, "surface": "feed"})
LOW, HIGH, UNKNOWN = 0.1, 0.9, None
ITEMS = world.items()


def published(store, monkeypatch, qualities, **rules):
    """The version of the tiny world whose items have these `qualities` by item_id, all others HIGH, under `rules`."""
    column = pa.array([qualities.get(item_id, HIGH) for item_id in ITEMS["item_id"].to_pylist()], pa.float64())
    monkeypatch.setattr(world, "items", lambda: ITEMS.append_column("quality", column))
    publish_live(store, world.config(rules=rules))
    return Registry(store).live()


def answer(store, version):
    with Funnel.open(store, version) as funnel:
        return funnel.recommend(ASKED)


def asks(reserve_micros):
    return {"low_quality": {"column": "quality", "below": 0.5, "reserve_micros": reserve_micros}}


def test_an_item_of_low_quality_wins_only_with_the_reserve_and_each_version_has_its_own(tmp_path, monkeypatch):
    before = published(tmp_path, monkeypatch, {})
    plain = answer(tmp_path, before)
    best, *between, last = [winner.item_id for winner in plain.winners]
    worths = [winner.utility_micros for winner in plain.winners]
    assert worths[0] > worths[-1]

    # the best can pay the reserve, the last cannot; one of unknown quality need not
    qualities = {best: LOW, last: LOW, between[-1]: UNKNOWN}
    after = published(tmp_path, monkeypatch, qualities, **asks((worths[0] + worths[-1]) / 2))
    ruled = answer(tmp_path, after)
    won = [winner.item_id for winner in ruled.winners]
    assert won[:4] == [best, *between]
    assert last not in won
    assert "1 candidates were of low quality and worth too little and could not win" in ruled.notes

    # going back to a version goes back to its rules
    assert answer(tmp_path, before).winners == plain.winners
    dear = published(tmp_path, monkeypatch, qualities, **asks(2 * worths[0]))
    assert best not in [winner.item_id for winner in answer(tmp_path, dear).winners]
    assert answer(tmp_path, after).winners == ruled.winners


def test_a_version_with_other_qualities_than_it_was_published_with_does_not_load(tmp_path, monkeypatch):
    path = tmp_path / "versions" / published(tmp_path, monkeypatch, {}, **asks(1e12))
    tensors = read_tensors(path / "scorer.safetensors")[0]
    assert tensors["low_quality.quality"].tolist() == [torch.tensor(HIGH).item()] * world.NUM_ITEMS
    assert load(path).scorer.rules["low_quality"].reserve_micros == 1e12
    tensors["low_quality.quality"] = torch.zeros(world.NUM_ITEMS)
    write_tensors(path / "scorer.safetensors", tensors, {})
    with pytest.raises(BundleError, match="does not reproduce golden request"):
        load(sign_again(path))


def test_an_item_that_changes_while_a_version_serves_is_judged_by_its_new_quality(tmp_path, monkeypatch):
    rule = load(tmp_path / "versions" / published(tmp_path, monkeypatch, {}, **asks(1e12))).scorer.rules["low_quality"]
    judged = (torch.ones(1, 3, 1), torch.ones(1, 3), torch.tensor([[0, 1, 2]]))
    assert rule.may_win(*judged).tolist() == [[True, True, True]]
    with torch.inference_mode():
        rule.put(torch.tensor([2, 0]), pa.table({"quality": [LOW, UNKNOWN]}))
    assert rule.may_win(*judged).tolist() == [[True, True, False]]
    with pytest.raises(DataError, match=r"rules.low_quality.column: expected numbers in .* 'quality', found string"):
        rule.put(torch.tensor([0]), pa.table({"quality": ["low"]}))
    assert rule.may_win(*judged).tolist() == [[True, True, False]]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"column": "quality", "below": 0.5, "reserve_micros": float("nan")},
         "rules.low_quality.reserve_micros: expected a finite number, got nan"),
        ({"column": "quality", "below": float("inf"), "reserve_micros": 1},
         "rules.low_quality.below: expected a finite number, got inf"),
        ({"column": "quality", "below": "0.5", "reserve_micros": 1},
         "rules.low_quality.below: expected a number, got '0.5'"),
        ({"colum": "quality", "below": 0.5, "reserve_micros": 1},
         'rules.low_quality.colum: unknown key; did you mean "column"?'),
        (0.5, "rules.low_quality: expected a table, got 0.5"),
    ],
)  # fmt: skip
def test_a_wrong_value_of_the_key_is_refused_by_name(value, said):
    with pytest.raises(ConfigError) as caught:
        world.config(rules={"low_quality": value})
    assert said in str(caught.value)


def test_check_tells_of_a_column_that_the_items_lack(tmp_path):
    config = parse_config({**tables.plain(), "rules": asks(1.0)}, "tiny.toml")

    def said(items):
        return check(config, find_tables(config, tables.write(tmp_path, items=items), tmp_path / "work"))

    (problem,) = said(tables.items())
    assert (problem.where, problem.expected) == ("items.quality", "the column rules.low_quality.column reads")
    assert said(tables.put(tables.items(), "quality", [0.5] * tables.ITEMS)) == []
