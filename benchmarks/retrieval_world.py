"""Vectors as trained towers give them, any number of them: items of owners of topics, and users who are no items.

Drawn, not trained: their lengths, how many directions matter (19 of 64), the spread of the popularity column, how long
users are and how their similarities fall off were set to those of the towers that the simulated market trains on 5,000
ads. A user is a mixture of up to three owners' middles: near none of the items, as in a log.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

DIM, SEED = 64, 7
_DIRECTIONS, _TOPICS, _ITEMS_AN_OWNER = 32, 200, 50
_LENGTH, _USER_LENGTH, _OFFSET, _POPULARITY = 5.6, 1.7, 2.7, 0.65


def tower_vectors(num_items: int, num_users: int, seed: int = SEED) -> tuple[Tensor, Tensor]:
    """Items float32 [num_items, DIM] and users float32 [num_users, DIM], whose last number is popularity, and 1."""
    rng = np.random.default_rng(seed)
    width, owners = DIM - 1, max(4, num_items // _ITEMS_AN_OWNER)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    falling = np.linspace(1, 0.15, _DIRECTIONS, dtype=np.float32)
    basis = np.linalg.qr(normal(width, _DIRECTIONS))[0].T * falling[:, None]
    topics = normal(_TOPICS, _DIRECTIONS)
    middles = 0.7 * topics[rng.integers(0, _TOPICS, owners)] + 0.7 * normal(owners, _DIRECTIONS)
    share = 1 / (1 + np.arange(owners)) ** 0.7
    share /= share.sum()
    items = (middles[rng.choice(owners, num_items, p=share)] + 0.5 * normal(num_items, _DIRECTIONS)) @ basis
    items += 0.05 * normal(num_items, width)
    items *= _LENGTH / np.linalg.norm(items, axis=1).mean()
    items *= rng.lognormal(0, 0.1, (num_items, 1)).astype(np.float32)
    offset = normal(width)
    offset /= np.linalg.norm(offset)
    items = np.concatenate([items + _OFFSET * offset, _POPULARITY * normal(num_items, 1)], axis=1)

    weights = rng.dirichlet([0.7] * 3, num_users).astype(np.float32)[:, :, None]
    wanted = (middles[rng.choice(owners, (num_users, 3), p=share)] * weights).sum(1)
    users = (wanted + 0.5 * normal(num_users, _DIRECTIONS)) @ basis
    users *= _USER_LENGTH / np.linalg.norm(users, axis=1, keepdims=True)
    users = np.concatenate([users - 0.3 * offset, np.ones((num_users, 1), np.float32)], axis=1)
    return torch.from_numpy(items), torch.from_numpy(users.astype(np.float32))


def equally_long(items: Tensor) -> Tensor:
    """One number more, float32 [n, DIM + 1], makes all as long: the nearest are then those of the largest product."""
    squares = items.square().sum(1)
    return torch.cat([items, (squares.max() - squares).sqrt().unsqueeze(1)], dim=1)
