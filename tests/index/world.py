"""Vectors as towers give them: items in groups, of many lengths, and users who are no items."""

from functools import cache

import numpy as np
import pytest
import torch

from prerank.index import plan
from prerank.index.hnsw import HNSWIndex
from prerank.index.storage import Storage

NUM_ROWS, WIDTH, K, FLOOR = 2_000, 16, 20, 0.95


def vectors(num: int = NUM_ROWS, width: int = WIDTH, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    groups = rng.normal(size=(40, width))
    some = groups[rng.integers(0, 40, num)] + 0.7 * rng.normal(size=(num, width))
    return torch.from_numpy((some * rng.lognormal(0, 0.3, (num, 1))).astype(np.float32))


def queries(num: int, width: int = WIDTH, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed + 1_000)
    groups = np.random.default_rng(0).normal(size=(40, width))
    mixed = (groups[rng.integers(0, 40, (num, 2))]).mean(1) + 0.5 * rng.normal(size=(num, width))
    return torch.from_numpy(mixed.astype(np.float32))


@pytest.fixture
def always_worth_it(monkeypatch):
    """Of so few rows a graph is never faster than a scan; here it is searched wherever it finds enough."""
    monkeypatch.setattr(plan, "_pace", lambda tried, truth: 0.5)


@cache
def plain(storage: Storage) -> HNSWIndex:
    """Over `vectors()`, for those who change nothing of it."""
    return prepared(vectors(), storage)


def prepared(some: torch.Tensor, storage: Storage = "float32", k: int = K, floor: float = FLOOR) -> HNSWIndex:
    index = HNSWIndex(some, storage)
    index.prepare(queries(16, some.shape[1]), k, floor)
    return index
