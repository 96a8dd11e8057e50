"""How much an item was in demand lately, seen from a day: counts of earlier days only, fading by half-life."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prerank.types import Array


def popularity(counts: Array, half_life_days: Sequence[float], prior: float = 0.1) -> Array:
    """Centred log popularity at the start of each day -> float32 [C + 1, I, S * H].

    counts [S, C, I]: events of each of S series on each of C consecutive days. For each half-life of H, day d's number
    is log(1 + m / prior), centred over items, where m = sum over e < d of counts[e] 2^(-(d - 1 - e) / half-life), times
    1 - 2^(-1 / half-life): a faded mean a day. A day with nothing before it is all zeros; day C is the
    day after the last counted.
    """
    series, days, num_items = counts.shape
    out = np.zeros((days + 1, num_items, series * len(half_life_days)), dtype=np.float32)
    for s in range(series):
        for h, half_life in enumerate(half_life_days):
            fade = 2.0 ** (-1.0 / half_life)
            total = np.zeros(num_items)
            for day in range(days + 1):
                logs = np.log1p(total * (1 - fade) / prior)
                out[day, :, s * len(half_life_days) + h] = logs - logs.mean()
                if day < days:
                    total = total * fade + counts[s, day]
    return out
