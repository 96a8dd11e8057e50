"""A scorer whose ranker runs natively: the same winners but for bfloat16's rounding, and never silently others."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from prerank.bundle.item_table import ItemTable
from prerank.bundle.scorer import Scorer
from prerank.business.utility import Utility
from prerank.kernels.engine import Engine
from prerank.kernels.native import library
from prerank.models.rankers import RANKERS, build_one_ranker
from prerank.models.segmented import SegmentedRanker
from prerank.train.examples import UserExamples, item_tensors
from prerank.types import CandidateSet

pytestmark = pytest.mark.skipif(library() is None, reason="no native kernels")
SMALL = {"width": 12, "low_rank": 3, "experts": 2, "hidden": (6,)}


@pytest.fixture(scope="module")
def engine():
    made = Engine(2)
    yield made
    made.close()


def built(world, trained, model):
    config = replace(world.config, ranker=replace(world.config.ranker, model=model, **SMALL))
    ranker = build_one_ranker(config, trained.prepared.transforms.sizes()).eval()
    for parameter in ranker.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return ranker


def scorer_of(trained, ranker):
    columns = {name: tensor.numpy() for name, tensor in item_tensors(trained.prepared).items()}
    items = ItemTable.build(np.arange(len(next(iter(columns.values())))), columns)
    return Scorer(items, ranker, Utility(ranker.tasks, dict.fromkeys(ranker.tasks, 100.0))).eval()


def asked(trained, config, scorer, requests):
    user = UserExamples(trained.prepared, config.features).at(np.arange(requests))
    rows = torch.arange(scorer.items.num_items).repeat(requests, 1)
    return user, CandidateSet(rows, torch.zeros(rows.shape), torch.ones(rows.shape, dtype=torch.bool))


@pytest.mark.parametrize("model", RANKERS)
@torch.inference_mode()
def test_every_ranker_gives_natively_what_it_gives_in_torch(world, trained, engine, model):
    torch.manual_seed(6)
    scorer = scorer_of(trained, built(world, trained, model))
    user, candidates = asked(trained, world.config, scorer, 3)
    expected = scorer(user, candidates, scorer.items.num_items)
    scorer.accelerate(engine)
    found = scorer(user, candidates, scorer.items.num_items)
    by_row = [top.probs.gather(1, top.rows.argsort(1).unsqueeze(-1).expand_as(top.probs)) for top in (expected, found)]
    assert (by_row[0] - by_row[1]).abs().max() < 0.02
    scorer.accelerate(None)
    assert torch.equal(scorer(user, candidates, 5).rows, expected.rows[:, :5])


@torch.inference_mode()
def test_of_rankers_by_segment_each_request_goes_through_its_own(world, trained, engine):
    torch.manual_seed(7)
    rankers = [built(world, trained, "cross_feature") for _ in range(3)]
    by = next(iter(world.config.features.context))
    scorer = scorer_of(trained, SegmentedRanker(by, [1, 2], rankers).eval())
    user, candidates = asked(trained, world.config, scorer, 4)
    user = user | {by: torch.tensor([1, 2, 0, 1])}
    expected = scorer.probs(user, candidates.rows)
    scorer.accelerate(engine)
    assert (scorer.probs(user, candidates.rows) - expected).abs().max() < 0.02


def test_what_was_accelerated_before_a_refresh_is_torch_again(world, trained, engine):
    scorer = scorer_of(trained, built(world, trained, "cross_feature"))
    scorer.accelerate(engine)
    with torch.inference_mode():
        for parameter in scorer.ranker.parameters():
            parameter.data.zero_()
        scorer.refresh()
        user, candidates = asked(trained, world.config, scorer, 1)
        assert (scorer.probs(user, candidates.rows) == 0.5).all()
