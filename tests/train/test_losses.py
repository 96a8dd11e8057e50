"""The sampled softmax learns what the full softmax learns, and only with the right sign of log Q."""

import numpy as np
import pytest
import torch

from prerank.train.losses import Positives, sampled_softmax_loss, softmax_loss

NOBODY = torch.full((1, 1), -1)


def none_excluded(num_examples: int) -> torch.Tensor:
    return NOBODY.expand(num_examples, 1)


def one_each(items: torch.Tensor, weight: torch.Tensor | None = None) -> Positives:
    return Positives(torch.arange(len(items)), items, torch.ones(len(items)) if weight is None else weight)


def a_world(num_users: int = 6, num_items: int = 30) -> np.ndarray:
    """p(item | user) [users, items] with popularity spread over two decades."""
    rng = np.random.default_rng(0)
    popularity = np.geomspace(1.0, 0.01, num_items)
    taste = np.exp(rng.normal(0, 0.7, (num_users, num_items)))
    joint = popularity * taste
    return joint / joint.sum(1, keepdims=True)


def learn_logits(world: np.ndarray, sign: float) -> np.ndarray:
    """Free logits [users, items] fitted with in-batch negatives and `logit - sign * log q`."""
    num_users, num_items = world.shape
    draw = torch.Generator().manual_seed(1)
    table = torch.zeros(num_users, num_items, requires_grad=True)
    optimiser = torch.optim.Adam([table], lr=0.05)
    probs = torch.tensor(world)
    batch = 64
    in_batch = 1 - (1 - probs.mean(0)) ** batch
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 2500)
    for _ in range(2500):
        users = torch.randint(num_users, (batch,), generator=draw)
        items = torch.multinomial(probs[users], 1, generator=draw).squeeze(1)
        columns = items.unique()
        log_q = sign * in_batch[columns].log()
        loss = sampled_softmax_loss(table[users][:, columns], columns, log_q, one_each(items), none_excluded(batch))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    learnt = table.detach().numpy()
    return learnt - learnt.mean(1, keepdims=True)


def slope_on_popularity(learnt: np.ndarray, world: np.ndarray) -> float:
    """How much of log popularity is left in (learnt - log p(item|user)); 0 where the logits are the true ones."""
    truth = np.log(world)
    left = learnt - (truth - truth.mean(1, keepdims=True))
    log_popularity = np.log(world.mean(0))
    return float(np.polyfit(np.tile(log_popularity, len(world)), left.ravel(), 1)[0])


def test_log_q_makes_popularity_bias_vanish_and_the_wrong_sign_doubles_it():
    world = a_world()
    corrected = slope_on_popularity(learn_logits(world, sign=1.0), world)
    uncorrected = slope_on_popularity(learn_logits(world, sign=0.0), world)
    wrong_sign = slope_on_popularity(learn_logits(world, sign=-1.0), world)
    assert abs(corrected) < 0.15
    assert uncorrected < -0.5
    assert wrong_sign < uncorrected - 0.3


def test_corrected_logits_order_items_as_the_truth_does():
    world = a_world()
    learnt = learn_logits(world, sign=1.0)
    for user in range(len(world)):
        assert np.corrcoef(learnt[user], np.log(world[user]))[0, 1] > 0.97


def test_sampled_softmax_equals_numpy_with_shared_columns_and_own_items_out():
    rng = np.random.default_rng(2)
    columns, items = np.array([3, 5, 7]), np.array([7, 3, 7, 5])
    logits, log_q = rng.normal(size=(4, 3)), np.log(rng.uniform(0.01, 0.5, 3))
    weight = np.array([1.0, 0.3, 1.0, 0.3])
    corrected = logits - log_q
    corrected[1, 1] = -np.inf  # user 1 already had item 5
    losses = np.log(np.exp(corrected).sum(1)) - corrected[np.arange(4), [2, 0, 2, 1]]
    excluded = torch.tensor([[-1, -1], [5, 4], [-1, 6], [-1, -1]])
    positives = one_each(torch.tensor(items), torch.tensor(weight))
    ours = sampled_softmax_loss(*map(torch.tensor, (logits, columns, log_q)), positives, excluded)
    assert ours.item() == pytest.approx((losses * weight).sum() / weight.sum())


def test_an_accidental_hit_is_no_negative():
    twice = sampled_softmax_loss(
        torch.tensor([[2.0], [1.0]]),
        torch.tensor([4]),
        torch.zeros(1),
        one_each(torch.tensor([4, 4])),
        none_excluded(2),
    )
    assert twice.item() == 0.0


def test_full_softmax_leaves_out_the_users_own_items():
    logits = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    loss = softmax_loss(logits, one_each(torch.tensor([0])), torch.tensor([[2, -1]]))
    assert loss.item() == pytest.approx(np.log(np.exp(1) + np.exp(2)) - 1)


def test_several_positives_of_one_example_share_its_softmax_by_weight():
    logits = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    positives = Positives(torch.tensor([0, 0, 1]), torch.tensor([0, 2, 1]), torch.tensor([1.0, 0.5, 2.0]))
    log_probs = torch.log_softmax(logits, 1)
    expected = -(log_probs[0, 0] + 0.5 * log_probs[0, 2] + 2 * log_probs[1, 1]) / 3.5
    assert softmax_loss(logits, positives, none_excluded(2)).item() == pytest.approx(expected.item())
