"""Who changes which weights: AdamW all of them, or SparseAdam the tables that are only looked up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from prerank.errors import TrainingError
from prerank.schema import FeatureSchema
from prerank.train.plan import Plan


def optimisers(model: nn.Module, plan: Plan, lookup_tables: Sequence[nn.Embedding]) -> dict[str, torch.optim.Optimizer]:
    """By the name a checkpoint has them under. Raises TrainingError where `plan.sparse` finds no table.

    SparseAdam decays no weight, and the moments of a row stand still while no batch has it.
    """
    for table in lookup_tables:
        table.sparse = plan.sparse
    rows = [table.weight for table in lookup_tables] if plan.sparse else []
    if plan.sparse and not rows:
        raise TrainingError("sparse is for tables that are only looked up, and every one here is a history's too")
    of_rows = {id(weight) for weight in rows}
    others = [weight for weight in model.parameters() if id(weight) not in of_rows]
    rate = plan.learning_rate
    found: dict[str, torch.optim.Optimizer] = {
        "optimiser": torch.optim.AdamW(others, lr=rate, weight_decay=plan.weight_decay, fused=plan.fused)
    }
    return found | ({"rows": torch.optim.SparseAdam(rows, lr=rate)} if rows else {})


def lookup_tables(model: nn.Module, schema: FeatureSchema) -> list[nn.Embedding]:
    """The tables of `model` but those histories are of, whose pooling reads every row at every step."""
    shared = {history.of for history in schema.histories().values()}
    named = ((name.rpartition(".")[2], module) for name, module in model.named_modules())
    return [module for name, module in named if isinstance(module, nn.Embedding) and name not in shared]
