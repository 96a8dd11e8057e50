"""The market with rules on columns that neither a feature nor an answer reads, from its tables to winners."""

from collections import Counter
from dataclasses import dataclass, replace

import torch

from prerank._tensor_files import read_tensors
from prerank.bundle.golden import Golden
from prerank.bundle.load import load
from prerank.business import rules
from prerank.business.rule import Rule, item_numbers
from prerank.config import DiversityRule, ItemNumber, Rules
from prerank.lifecycle.build import publish_trained
from prerank.types import CandidateSet

RULES = {"start_ms": DiversityRule(3), "campaign_id": DiversityRule(2)}


def test_the_groups_published_are_the_items_tables_own_values(world, trained, tmp_path):
    assert "start_ms" not in (*world.config.metadata.columns, *world.config.features.columns("item"))
    config = replace(world.config, diversity=RULES)
    bundle = load(
        tmp_path / "versions" / publish_trained(replace(trained, config=config), world.tables(), tmp_path, {})
    )
    items, scorer = world.tables().items().sort_by("item_id"), bundle.scorer
    assert scorer.items.item_ids.tolist() == items.column("item_id").to_pylist()
    for rule, name in enumerate(RULES):
        codes, values = scorer.diversity.codes[:, rule].tolist(), items.column(name).to_pylist()
        assert len(set(zip(codes, values, strict=True))) == len(set(codes)) == len(set(values))

    golden = Golden.from_tensors(read_tensors(bundle.path / "golden.safetensors")[0])
    user = {name: column[:1] for name, column in golden.user.items()}
    rows = torch.arange(scorer.items.num_items)[None]
    with torch.inference_mode():
        top = scorer(user, CandidateSet(rows, torch.zeros(rows.shape), rows >= 0), 200)
    won = top.rows[top.valid].tolist()
    for name, rule in RULES.items():
        values = items.column(name).to_pylist()
        shown = Counter(values[row] for row in won)
        assert max(shown.values()) <= rule.at_most
    assert len(won) > 50


@dataclass(frozen=True)
class Begun:
    column: ItemNumber


@dataclass(frozen=True)
class WithBegun(Rules):
    begun: Begun | None = None


class BegunRule(Rule):
    """Keeps one column of the items."""

    why = "not begun"

    def __init__(self, num_rows):
        super().__init__()
        self.register_buffer("at", torch.zeros(num_rows, dtype=torch.float64))

    @classmethod
    def build(cls, tasks, rules, num_rows):
        return None if rules.begun is None else cls(num_rows)

    def put(self, rows, items):
        self.at[rows] = item_numbers(items, "start_ms", "rules.begun.column")


def test_what_a_rule_keeps_of_the_items_is_published_in_the_order_of_the_rows(world, trained, tmp_path, monkeypatch):
    monkeypatch.setitem(rules.RULES, "begun", BegunRule)
    config = replace(world.config, rules=WithBegun(begun=Begun("start_ms")))
    path = tmp_path / "versions" / publish_trained(replace(trained, config=config), world.tables(), tmp_path, {})
    tensors = read_tensors(path / "scorer.safetensors")[0]
    items = world.tables().items().sort_by("item_id")
    assert tensors["items.item_ids"].tolist() == items["item_id"].to_pylist()
    assert tensors["begun.at"].tolist() == items["start_ms"].to_pylist()
