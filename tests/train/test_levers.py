"""Every ranker trains under every guard and lever, and is near what it is without those that only save time."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from prerank.errors import TrainingError
from prerank.models.rankers import RANKERS, build_ranker
from prerank.train.loop import run
from prerank.train.optimisers import lookup_tables, optimisers
from prerank.train.plan import Plan
from prerank.train.ranking import Impressions


def last_loss(world, trained, folder, model, **levers):
    config = replace(world.config, ranker=replace(world.config.ranker, model=model, domain="surface", epochs=2))
    torch.manual_seed(config.seed)
    ranker = build_ranker(config, trained.prepared.transforms.sizes())
    impressions = Impressions(trained.prepared, config, np.flatnonzero(trained.prepared.of_days(["2026-01-06"])))
    plan = replace(Plan.of(config.ranker, "id", len(impressions.events), config.seed), batch=64, **levers)
    records = run(
        ranker,
        plan,
        lambda examples, draw: impressions.batch(examples),
        lambda batch: binary_cross_entropy_with_logits(batch.logits(ranker), batch.labels),
        folder,
        lookup_tables=lookup_tables(ranker, config.features),
    )
    assert np.isfinite(impressions.predict(ranker)).all()
    return records[-1]["loss"]


@pytest.mark.parametrize("model", RANKERS)
def test_every_ranker_learns_as_well_in_bf16_and_with_sparse_tables(world, trained, tmp_path, model):
    plain = last_loss(world, trained, tmp_path / "plain", model)
    assert last_loss(world, trained, tmp_path / "bf16", model, bf16=True) == pytest.approx(plain, rel=0.05)
    assert last_loss(world, trained, tmp_path / "sparse", model, sparse=True, average=0.9) < 1.2 * plain


def test_tables_of_histories_are_no_lookup_tables(world, trained):
    ranker = build_ranker(world.config, trained.prepared.transforms.sizes())
    looked_up = {id(table) for table in lookup_tables(ranker, world.config.features)}
    tables = {name: module for name, module in ranker.named_modules() if isinstance(module, torch.nn.Embedding)}
    shared = {name for name, table in tables.items() if id(table) not in looked_up}
    assert {name.rpartition(".")[2] for name in shared} == {"advertiser_id"}
    assert len(tables) > len(shared) + 5


def test_sparse_without_a_table_that_is_only_looked_up_is_refused():
    plan = Plan("id", 1, 1, 1, learning_rate=0.1, weight_decay=0.0, seed=0, sparse=True)
    with pytest.raises(TrainingError, match="sparse is for tables that are only looked up, and every one here is a"):
        optimisers(torch.nn.Linear(2, 2), plan, [])
