"""Towers and the first ranker: padding says nothing, order says something, and each side is computed on its own."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from prerank.models.embedding import FeatureEncoder, HistoryPooling, counter_numbers, masked_mean
from prerank.models.layers import VECTORS
from prerank.models.rankers import RANKERS, build_ranker
from prerank.models.towers import build_towers, owner_sizes
from prerank.schema import Bag, Category, Counter, Embedding, Number, Value
from prerank.train.examples import UserExamples, item_tensors


def test_pooling_ignores_padding_and_gives_zeros_for_no_history():
    torch.manual_seed(0)
    table = torch.nn.Embedding(9, 4)
    short, long = HistoryPooling(2, 4, 0.0), HistoryPooling(5, 4, 0.0)
    with torch.no_grad():
        long.position[-2:] = short.position
        short.query[:] = long.query[:] = torch.randn(4)
    one = short(torch.tensor([[3, 7]]), table)
    torch.testing.assert_close(one, long(torch.tensor([[-1, -1, -1, 3, 7]]), table))
    assert torch.equal(short(torch.tensor([[-1, -1]]), table), torch.zeros(1, 4))


def test_pooling_equals_its_formula():
    torch.manual_seed(1)
    table, pooling = torch.nn.Embedding(9, 4), HistoryPooling(3, 4, 0.0)
    with torch.no_grad():
        pooling.query[:] = torch.randn(4)
    got = pooling(torch.tensor([[-1, 2, 5]]), table)[0].detach().numpy()
    vectors = table.weight.detach().numpy()[[2, 5]]
    logits = pooling.position.detach().numpy()[1:] + vectors @ pooling.query.detach().numpy()
    weights = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(got, weights @ vectors, rtol=1e-5)


def test_pooling_knows_the_order_of_a_history():
    table, pooling = torch.nn.Embedding(9, 4), HistoryPooling(2, 4, 0.0)
    assert not torch.allclose(pooling(torch.tensor([[3, 7]]), table), pooling(torch.tensor([[7, 3]]), table))


def test_a_counter_is_read_as_the_log_of_its_count_and_a_share_as_it_is():
    counters = {"clicks": Counter("is_click", last=3), "share": Counter("is_click", last=3, share=True)}
    user = {"clicks": torch.tensor([0, 3], dtype=torch.int32), "share": torch.tensor([-1.5, 0.25])}
    clicks, share = counter_numbers(counters, user)
    torch.testing.assert_close(clicks, torch.tensor([1.0, 4.0]).log())
    assert torch.equal(share, user["share"])


def test_masked_mean_is_the_mean_of_what_is_there():
    vectors = torch.tensor([[[1.0], [3.0], [9.0]], [[1.0], [3.0], [9.0]]])
    present = torch.tensor([[True, True, False], [False, False, False]])
    assert masked_mean(vectors, present).flatten().tolist() == [2.0, 0.0]


def test_an_encoder_reads_every_kind_but_values_and_keeps_leading_shapes():
    kinds = {
        "id": Category(dim=8),
        "small": Category(dim=3),
        "tags": Bag(dim=5, length=2),
        "price": Number(),
        "content": Embedding(width=4),
        "bid": Value(),
    }
    encoder = FeatureEncoder(kinds, {"id": 10, "small": 4, "tags": 6}, (16,), 8, 0.0).eval()
    features = {
        "id": torch.tensor([[1, 2, 3]]),
        "small": torch.tensor([[0, 1, 2]]),
        "tags": torch.tensor([[[0, -1], [1, 2], [-1, -1]]]),
        "price": torch.tensor([[0.1, 0.2, 0.3]]),
        "content": torch.randn(1, 3, 4),
    }
    out = encoder(features)
    assert out.shape == (1, 3, 8)
    for name in features:
        changed = {n: f.clone() for n, f in features.items()}
        changed[name][0, 1] = 3 if changed[name].dtype == torch.int64 else 5.0
        difference = (encoder(changed) - out).abs().sum(-1)[0]
        assert difference[1] > 0, name
        assert difference[0] == difference[2] == 0, name


def test_owner_sizes_are_the_plain_names_of_one_owner():
    assert owner_sizes({"item.a.b": 3, "user.a": 4, "item.c": 5}, "item") == {"a.b": 3, "c": 5}


def test_a_user_history_is_looked_up_in_the_item_towers_own_table(world, trained):
    config = world.config
    towers = build_towers(config, trained.prepared.transforms.sizes()).eval()
    log = trained.prepared.events
    event = np.flatnonzero(log["time_ms"] > np.median(log["time_ms"]))[:1]
    user = UserExamples(trained.prepared, config.features).at(event)
    seen = int(user["exposures"][user["exposures"] >= 0][0])
    before = towers.user_side(user)
    with torch.no_grad():
        towers.item_tower.tables["advertiser_id"].weight[seen] += 1.0
    assert not torch.equal(before, towers.user_side(user))


def test_dropout_and_hidden_events_are_for_training_alone(world, trained):
    towers = build_towers(world.config, trained.prepared.transforms.sizes())
    user = UserExamples(trained.prepared, world.config.features).at(np.arange(64))
    towers.train()
    assert not torch.equal(towers.user_side(user), towers.user_side(user))
    towers.eval()
    assert torch.equal(towers.user_side(user), towers.user_side(user))


@pytest.mark.parametrize("name", list(RANKERS))
def test_a_ranker_computes_each_side_alone_and_one_logit_a_task(world, trained, name):
    """The contract of every ranker: the item side of some rows is those rows of the whole, and B and N are free."""
    config, prepared = replace(world.config, ranker=replace(world.config.ranker, model=name)), trained.prepared
    ranker = build_ranker(config, prepared.transforms.sizes())
    assert isinstance(ranker, RANKERS[name])
    ranker.eval()
    items = item_tensors(prepared)
    user = ranker.user_side(UserExamples(prepared, config.features).at(np.arange(3)))
    every = ranker.item_side(items)
    some = torch.tensor([5, 2, 9, 2])
    taken = {n: side[some] for n, side in every.items()}
    torch.testing.assert_close(ranker.item_side({n: c[some] for n, c in items.items()}), taken)
    assert all(len(side) == 3 for side in user.values())
    logits = ranker(user, {n: side.expand(3, *side.shape) for n, side in taken.items()})
    assert logits.shape == (3, 4, len(config.tasks))
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits[:, 1], logits[:, 3])
    alone = ranker({n: side[1:2] for n, side in user.items()}, {n: side[None] for n, side in taken.items()})
    torch.testing.assert_close(alone[0], logits[1])


def test_the_two_tower_ranker_is_a_scaled_dot_product_and_two_biases(world, trained):
    prepared, options = trained.prepared, replace(world.config.ranker, model="two_tower")
    config = replace(world.config, ranker=options)
    ranker = build_ranker(config, prepared.transforms.sizes()).eval()
    dim = config.ranker.dim
    items = {n: c[:6] for n, c in item_tensors(prepared).items()}
    user = ranker.user_side(UserExamples(prepared, config.features).at(np.arange(2)))
    item = ranker.item_side(items)
    assert set(user) == set(item) == {VECTORS}
    u, v = user[VECTORS].detach().numpy(), item[VECTORS].detach().numpy()
    expected = u[:, :dim] @ v[:, :dim].T / np.sqrt(dim) + u[:, dim:] + v[:, dim:].T
    logits = ranker(user, {VECTORS: item[VECTORS].expand(2, -1, -1)})
    np.testing.assert_allclose(logits[..., 0].detach(), expected, rtol=1e-4, atol=1e-6)
