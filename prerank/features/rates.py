"""How often an item was clicked, seen from a day: rates of earlier days only, drawn towards everybody's."""

from __future__ import annotations

import numpy as np

from prerank.types import Array


def rates(
    shown: Array, happened: Array, group: Array, prior: float, before: tuple[Array, Array] | None = None
) -> Array:
    """Log odds of each item's rate over all items' at the start of each day -> float32 [C + 1, I].

    shown, happened float [C, I]: impressions on each of C consecutive days, and those with the label. group int [I]
    joins items (np.arange(I) for none); 0 stays 0 for a group without impressions. With n impressions and h labels
    of the group before a day, and r the rate of all, p = (h + prior r) / (n + prior), the mean of a Beta distribution
    (Gelman et al. 2013, Bayesian Data Analysis, 2.4), and the number is logit p - logit r. Day C is after the last.
    `before` is shown and happened [I] of all that is older than the first day; without it day 0 knows nothing.
    """
    if before is not None:
        older_shown, older_happened = before
        return rates(np.vstack([older_shown, shown]), np.vstack([older_happened, happened]), group, prior)[1:]
    days, num_items = shown.shape
    out = np.zeros((days + 1, num_items), dtype=np.float32)
    groups = int(group.max(initial=-1)) + 1
    n, h = np.zeros(groups), np.zeros(groups)
    for day in range(1, days + 1):
        n += np.bincount(group, shown[day - 1], groups)
        h += np.bincount(group, happened[day - 1], groups)
        rate = h.sum() / max(n.sum(), 1.0)
        if 0 < rate < 1:
            p = (h + prior * rate) / (n + prior)
            out[day] = (np.log(p / (1 - p)) - np.log(rate / (1 - rate)))[group]
    return out


class GroupRates:
    """The rate of each group, which all its items share: of group int [I] and rate float32 [I] of I items."""

    def __init__(self, group: Array, rate: Array) -> None:
        self._codes, first = np.unique(group, return_index=True)
        self._rates = rate[first].astype(np.float32)

    def of(self, group: Array) -> Array:
        """int [n] -> float32 [n]; 0, as of all items together, for a group that has no item."""
        at = np.searchsorted(self._codes, group).clip(0, len(self._codes) - 1)
        return np.where(self._codes[at] == group, self._rates[at], np.float32(0.0))
