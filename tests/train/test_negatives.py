"""Columns are there as often as their log-Q says; corrected by it, some items teach what all would."""

from collections.abc import Iterator
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prerank.train.losses import Positives, sampled_softmax_loss, softmax_loss
from prerank.train.negatives import Presence, VectorCache, examples_with, uniform_items

NUM_ITEMS, NUM_EXAMPLES, BATCH = 30, 40, 7
NOBODY = torch.full((1, 1), -1)


def a_log(seed: int = 0) -> list[np.ndarray]:
    """The items of each of the examples, one to five of them, popularity spread over two decades; the last has none."""
    rng = np.random.default_rng(seed)
    popularity = np.geomspace(1, 0.01, NUM_ITEMS - 1)
    chance = popularity / popularity.sum()
    return [rng.choice(NUM_ITEMS - 1, rng.integers(1, 6), p=chance) for _ in range(NUM_EXAMPLES)]


def counted(log: list[np.ndarray]) -> np.ndarray:
    example = np.repeat(np.arange(len(log)), [len(items) for items in log])
    return examples_with(np.concatenate(log), example, NUM_ITEMS)


def probability(presence: Presence, cached: int = 0) -> np.ndarray:
    return presence.log_probability(torch.arange(NUM_ITEMS), BATCH, cached).exp().numpy()


def there(log: list[np.ndarray], chosen: np.ndarray, uniform: int, draw: np.random.Generator) -> np.ndarray:
    """bool [I]: which items are columns of one step."""
    found = np.zeros(NUM_ITEMS, dtype=bool)
    found[np.concatenate([log[example] for example in chosen])] = True
    found[uniform_items(NUM_ITEMS, uniform, draw).numpy()] = True
    return found


def test_an_item_twice_in_an_example_is_in_one_example():
    found = examples_with(np.array([3, 3, 1, 3]), np.array([0, 0, 0, 2]), 5)
    np.testing.assert_array_equal(found, [0, 1, 0, 2, 0])


@pytest.mark.parametrize(("uniform", "cached"), [(0, 0), (5, 0), (0, 2), (5, 2), (NUM_ITEMS, 0)])
def test_items_are_columns_as_often_as_presence_says(uniform, cached):
    log, draw, steps = a_log(), np.random.default_rng(1), 20_000
    seen = np.zeros(NUM_ITEMS)
    for _ in range(steps):
        batches = [draw.choice(NUM_EXAMPLES, BATCH, replace=False) for _ in range(cached + 1)]
        seen += np.any([there(log, chosen, uniform, draw) for chosen in batches], axis=0)
    said = probability(Presence(counted(log), NUM_EXAMPLES, uniform), cached)
    error = np.sqrt(said * (1 - said) / steps)
    assert (np.abs(seen / steps - said) <= 4.5 * error + 1e-6).all()
    assert said[-1] == pytest.approx(1 - (1 - min(uniform / NUM_ITEMS, 1)) ** (cached + 1))  # nobody wants it


def test_batches_of_one_epoch_hold_an_item_little_more_often_than_as_many_drawn_alone():
    counts, size, cached = np.arange(1, 20), 50, 3
    alone = Presence(counts, 10_000, 0).log_probability(torch.arange(19), size, cached).exp().double()
    together = Presence(counts, 10_000, 0).log_probability(torch.arange(19), size * (cached + 1)).exp().double()
    share = size * (cached + 1) / 10_000
    assert ((alone < together) & (together < alone * (1 + share))).all()


def test_an_epoch_of_one_batch_has_every_item_that_is_wanted():
    log = Presence(np.array([3, 1, 0]), 10, 0).log_probability(torch.arange(2), 10)
    np.testing.assert_array_equal(log.numpy(), [0, 0])


def test_uniform_items_are_distinct_and_no_item_is_preferred():
    draw, times, seen = np.random.default_rng(2), 4000, np.zeros(12)
    for _ in range(times):
        found = uniform_items(12, 3, draw).numpy()
        assert len(np.unique(found)) == 3
        seen[found] += 1
    assert np.abs(seen / times - 3 / 12).max() < 4.5 * np.sqrt(0.25 * 0.75 / times)
    assert len(uniform_items(12, 100, draw)) == 12
    assert len(uniform_items(12, 0, draw)) == 0


@settings(max_examples=25)
@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3), min_size=3, max_size=5), st.integers(0, 4))
def test_over_all_draws_corrected_columns_sum_to_the_whole_catalogue(items, uniform):
    """Every batch of two examples with every set of drawn items: the mean of sum exp(logit - log q) is exact."""
    num_items = 6
    log = [np.array(one) for one in items]
    example = np.repeat(np.arange(len(log)), [len(one) for one in log])
    counts = examples_with(np.concatenate(log), example, num_items)
    possible = torch.from_numpy((counts > 0) | (uniform > 0))
    log_q = Presence(counts, len(log), uniform).log_probability(torch.arange(num_items), 2).double()
    terms = (torch.linspace(-2, 1, num_items, dtype=torch.float64) - log_q).exp()
    sums = []
    for batch in combinations(range(len(log)), 2):
        for drawn in combinations(range(num_items), uniform):
            columns = np.unique(np.concatenate([*(log[one] for one in batch), drawn]).astype(int))
            sums.append(terms[columns].sum())
    whole = torch.linspace(-2, 1, num_items, dtype=torch.float64).exp()[possible].sum()
    assert torch.stack(sums).mean().item() == pytest.approx(whole.item(), rel=1e-5)


# what is learnt

CATALOGUE, WANTED = 120, 24


def a_market() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits float64 [I] of a user, and the item of each example, popularity spread over two decades."""
    rng = np.random.default_rng(3)
    popularity = np.geomspace(1, 0.01, CATALOGUE)
    items = rng.choice(CATALOGUE, 2000, p=popularity / popularity.sum())
    return torch.from_numpy(rng.normal(0, 1, CATALOGUE)), torch.from_numpy(items)


def gradients(uniform: int, steps: int, kind: str) -> Iterator[torch.Tensor]:
    """The gradient [I] of each step's loss on shared logits, by `kind` of log-Q: exact, of the batch alone, or none."""
    logits, items = a_market()
    counts = np.bincount(items, minlength=CATALOGUE)
    corrected_for = {"exact": uniform, "of the batch": 0}
    presence = Presence(counts, len(items), corrected_for.get(kind, 0))
    draw = np.random.default_rng(4)
    for _ in range(steps):
        wanted = items[draw.choice(len(items), WANTED, replace=False)]
        columns = torch.cat([wanted, uniform_items(CATALOGUE, uniform, draw)]).unique()
        # an item nobody wants would, if only the batch's were corrected for, be there with probability 0
        log_q = presence.log_probability(columns, WANTED).clamp_min(-30)
        table = logits.clone().requires_grad_()
        positives = Positives(torch.arange(WANTED), wanted, torch.ones(WANTED, dtype=torch.float64))
        log_q = torch.zeros(len(columns)) if kind == "none" else log_q
        of_columns = table[columns].expand(WANTED, -1)
        sampled_softmax_loss(of_columns, columns, log_q, positives, NOBODY.expand(WANTED, 1)).backward()
        assert table.grad is not None
        yield table.grad


def full_gradient() -> torch.Tensor:
    """Of the full softmax over every example of the market: predicted less wanted."""
    logits, items = a_market()
    wanted = torch.bincount(items, minlength=CATALOGUE).double() / len(items)
    return logits.softmax(0) - wanted


def off(uniform: int, kind: str, steps: int = 3000) -> float:
    """How far the mean gradient is from the full softmax's, over the latter's length."""
    mean = torch.stack(list(gradients(uniform, steps, kind))).mean(0)
    return float((mean - full_gradient()).norm() / full_gradient().norm())


def test_corrected_mixed_negatives_have_the_full_softmax_gradient_in_expectation():
    exact = off(60, "exact")
    assert exact < 0.08
    assert off(60, "none") > 3 * exact
    assert off(60, "of the batch") > 3 * exact


def test_the_more_items_are_drawn_the_nearer_is_the_gradient():
    few, some, many = (off(uniform, "exact") for uniform in (0, 30, 90))
    assert few > some > many


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1))
def test_with_the_whole_catalogue_drawn_it_is_the_full_softmax(seed):
    rng = np.random.default_rng(seed)
    num_items, batch = int(rng.integers(2, 40)), int(rng.integers(1, 9))
    logits = torch.from_numpy(rng.normal(0, 3, (batch, num_items)))
    item = torch.from_numpy(rng.integers(num_items, size=batch))
    positives = Positives(torch.arange(batch), item, torch.ones(batch, dtype=torch.float64))
    excluded = torch.from_numpy(rng.integers(-1, num_items, (batch, 3)))
    excluded[excluded == item[:, None]] = -1
    columns = torch.cat([item, uniform_items(num_items, num_items + 5, rng)]).unique()
    presence = Presence(rng.integers(0, 5, num_items), 4, num_items + 5)
    log_q = presence.log_probability(columns, 3)
    sampled = sampled_softmax_loss(logits[:, columns], columns, log_q, positives, excluded)
    assert sampled.item() == pytest.approx(softmax_loss(logits, positives, excluded).item())


# vectors of earlier batches

BATCHES = st.lists(st.sets(st.integers(0, 9), min_size=1), max_size=12)


@given(BATCHES, st.integers(0, 4), st.integers(0, 3))
def test_the_cache_holds_the_newest_vector_of_each_item_of_the_last_batches(batches, size, warm_up):
    cache = VectorCache(size, 2, warm_up)
    for number, items in enumerate(batches):
        fresh = torch.tensor(sorted(items))
        begin = max(warm_up, number - size) if size else number
        newest = {item: step for step in range(begin, number) for item in batches[step]}
        rows, vectors = cache.beside(fresh)
        expected = {item: step for item, step in newest.items() if item not in items}
        assert dict(zip(rows.tolist(), vectors[:, 0].tolist(), strict=True)) == expected
        assert len(rows) == len(expected)
        assert cache.filled == max(0, number - begin)
        cache.add(fresh, torch.full((len(fresh), 2), float(number)))


def test_no_gradient_flows_into_earlier_vectors():
    cache = VectorCache(1, 3, 0)
    cache.add(torch.tensor([4]), torch.ones(1, 3, requires_grad=True) * 2)
    assert not cache.beside(torch.tensor([5]))[1].requires_grad


def test_the_cache_goes_on_exactly_from_its_state():
    draw = torch.Generator().manual_seed(5)
    batches = [torch.randint(40, (6,), generator=draw).unique() for _ in range(20)]
    straight, first, second = (VectorCache(3, 2, 4) for _ in range(3))
    for number, fresh in enumerate(batches):
        vectors = torch.full((len(fresh), 2), float(number))
        straight.add(fresh, vectors)
        if number < 10:
            first.add(fresh, vectors)
        if number == 10:
            second.load_state(first.state())
        if number >= 10:
            second.add(fresh, vectors)
    assert second.filled == straight.filled == 3
    for name, tensor in straight.state().items():
        assert torch.equal(tensor, second.state()[name]), name
