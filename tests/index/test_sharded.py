import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prerank.errors import BundleError
from prerank.index.exact import ExactIndex
from prerank.index.hnsw import HNSWIndex
from prerank.index.sharded import ShardedIndex, rows_of
from prerank.index.storage import STORAGES
from tests.index.world import FLOOR, K, always_worth_it, queries, vectors

__all__ = ["always_worth_it"]
NUM_ITEMS, WIDTH = 300, 4


def small_numbers(*shape: int, seed: int) -> torch.Tensor:
    """Whole numbers, so that every product is exact and many are equal."""
    return torch.from_numpy(np.random.default_rng(seed).integers(-2, 3, shape).astype(np.float32))


def sharded(some: torch.Tensor, of: int, kind=ExactIndex, storage="float32", seed: int = 1) -> ShardedIndex:
    """Rows at random in shards, one of which may be empty."""
    shard_of = torch.from_numpy(np.random.default_rng(seed).integers(0, of, len(some)).astype(np.uint8))
    parts = [kind(some[rows_of(shard_of, number)], storage) for number in range(of)]
    return ShardedIndex(parts, shard_of)


def is_the_same(found, expected):
    assert torch.equal(found.rows, expected.rows)
    assert torch.equal(found.similarity, expected.similarity)
    assert torch.equal(found.valid, expected.valid)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("of", [1, 2, 7])
def test_shards_find_what_one_index_of_all_rows_does(storage, of):
    some, query = small_numbers(NUM_ITEMS, WIDTH, seed=1), small_numbers(3, WIDTH, seed=2)
    some[5], some[250] = torch.nan, torch.inf
    whole, index = ExactIndex(some, storage), sharded(some, of, storage=storage)
    mask = torch.from_numpy(np.random.default_rng(3).random(NUM_ITEMS) < 0.3)
    for k in (0, 1, 20, NUM_ITEMS + 5):
        for eligible in (None, mask, rows_of(mask, True), torch.zeros(0, dtype=torch.int64)):
            is_the_same(index.search(query, k, eligible), whole.search(query, k, eligible))
    is_the_same(index.search(query[:0], 5, None), whole.search(query[:0], 5, None))
    assert index.is_exact


@given(st.data())
def test_any_rows_in_any_shards(data):
    num, of = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 4))
    some = small_numbers(num, 2, seed=data.draw(st.integers(0, 99)))
    shard_of = torch.tensor(data.draw(st.lists(st.integers(0, of - 1), min_size=num, max_size=num)))
    index = ShardedIndex([ExactIndex(some[rows_of(shard_of, number)]) for number in range(of)], shard_of)
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=num, max_size=num)))
    k = data.draw(st.integers(1, 50))
    is_the_same(index.search(some[:1], k, mask), ExactIndex(some).search(some[:1], k, mask))


def test_rows_that_come_and_leave_do_so_in_their_shard():
    some, query = small_numbers(NUM_ITEMS, WIDTH, seed=1), small_numbers(2, WIDTH, seed=2)
    whole, index = ExactIndex(some.clone()), sharded(some.clone(), 3)
    index.own()
    rows, new = torch.tensor([200, 3, 77, 4]), small_numbers(4, WIDTH, seed=9) * 5
    for one in (whole, index):
        one.put(rows, new)
        one.put(torch.tensor([10, 11, 12]), None)
    is_the_same(index.search(query, 50, None), whole.search(query, 50, None))
    assert not {10, 11, 12} & set(index.search(query, NUM_ITEMS, None).rows.flatten().tolist())


@pytest.mark.usefixtures("always_worth_it")
def test_shards_of_graphs_find_the_floor_and_say_that_they_may_miss_some():
    some, query = vectors(), queries(40, seed=3)
    index = sharded(some, 2, HNSWIndex)
    index.prepare(queries(16), K, FLOOR)
    assert all(part.plan.has_graph for part in index.parts)
    assert not index.is_exact
    found, best = index.search(query, K, None), ExactIndex(some).search(query, K, None)
    shares = [len(set(a.tolist()) & set(b.tolist())) / K for a, b in zip(found.rows, best.rows, strict=True)]
    assert np.mean(shares) >= FLOOR


def test_threads_are_those_of_every_shard():
    index = sharded(small_numbers(NUM_ITEMS, WIDTH, seed=1), 3)
    index.threads = 2
    assert [part.threads for part in index.parts] == [2, 2, 2]
    assert index.threads == 2


def test_shards_of_different_models_are_refused():
    some, shard_of = small_numbers(4, WIDTH, seed=1), torch.tensor([0, 0, 1, 1])
    parts = [ExactIndex(some[:2]), ExactIndex(some[2:])]
    parts[1].models = {"retrieval": "another"}
    with pytest.raises(BundleError, match="expected shards built with"):
        ShardedIndex(parts, shard_of)


def test_rows_that_there_are_not_are_refused():
    with pytest.raises(IndexError, match="expected rows"):
        sharded(small_numbers(9, WIDTH, seed=1), 2).search(torch.ones(1, WIDTH), 2, torch.tensor([3, 9]))
