"""Every rule there is, and those that a funnel file asks for."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import torch

from prerank.business.reserve import Reserve
from prerank.business.rule import Rule
from prerank.config import Rules

RULES: dict[str, type[Rule]] = {
    "reserve": Reserve,
}
"""By name, which is where a rule's buffers are in the scorer's state_dict; in this order they adjust the utility."""


def fit_rules(tasks: Sequence[str], rules: Rules, items: pa.Table, num_rows: int) -> dict[str, Rule]:
    """The rules that [rules] asks for, by name, over `num_rows` rows, of which the first I are the raw `items` [I].

    Raises DataError where a column is missing or not as a rule must have it.
    """
    built = build_rules(tasks, rules, num_rows)
    for rule in built.values():
        rule.put(torch.arange(items.num_rows), items)
    return built


def build_rules(tasks: Sequence[str], rules: Rules, num_rows: int) -> dict[str, Rule]:
    """The rules that [rules] asks for, by name; of the items of their rows they know nothing yet."""
    built = {name: rule.build(tasks, rules, num_rows) for name, rule in RULES.items()}
    return {name: rule for name, rule in built.items() if rule is not None}
