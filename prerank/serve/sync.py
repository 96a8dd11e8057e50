"""Which version each shard is asked in, and how answers of several versions become one list: no files, no network.

Similarities of two versions are numbers of two spaces. They are compared nowhere.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import ceil, sqrt

import torch
from torch import Tensor


def choose(held: Sequence[Collection[str]], usable: Sequence[str]) -> list[str | None]:
    """The version to ask each shard in, given those it holds and the `usable` ones, the preferred first.

    One for all shards where all hold one, otherwise as few as the greedy choice finds; None for a shard that holds none
    that is usable.
    """
    chosen: list[str | None] = [None] * len(held)
    left = {n for n, versions in enumerate(held) if not set(usable).isdisjoint(versions)}
    while left:
        best = max(usable, key=lambda version: sum(version in held[n] for n in left))  # of equals the first
        for n in [n for n in left if best in held[n]]:
            chosen[n] = best
            left.discard(n)
    return chosen


@dataclass(frozen=True, slots=True)
class Part:
    """What one shard found in `version`, best first: rows int64 [n] of whoever asks, similarity float32 [n].

    `num_eligible` is how many items it was found among.
    """

    version: str
    rows: Tensor
    similarity: Tensor
    num_eligible: int


def merge(parts: Sequence[Part], k: int) -> tuple[Tensor, Tensor]:
    """The best of all parts, each row once: rows int64 [n] and similarity float32 [n].

    Of one version the k most similar, ties by the smaller row. Of several, each row's rank in its version over how many
    items that version was searched among is compared, and as the best k of a version need not be spread evenly over
    its shards, there are some more than k: three standard deviations of how many of them a share of the items has.
    There the similarity is NaN: one of another version would mean nothing beside it.
    """
    versions = dict.fromkeys(part.version for part in parts)
    ranked = [_ranked([part for part in parts if part.version == version]) for version in versions]
    if not ranked:
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    if len(ranked) == 1:
        rows, similarity, _ = ranked[0]
        kept = _first_of_each(rows)[:k]
        return rows[kept], similarity[kept]
    total = sum(num for *_, num in ranked)
    own, places = [], []
    for rows, _, num in ranked:
        share = num / max(total, 1)
        own.append(rows[: ceil(k * share + 3 * sqrt(k * share * (1 - share)))])
        places.append((torch.arange(len(own[-1]), dtype=torch.float64) + 0.5) / max(num, 1))
    together = torch.cat(own)[torch.cat(places).argsort(stable=True)]
    kept_rows = together[_first_of_each(together)]
    return kept_rows, torch.full((len(kept_rows),), torch.nan)


def _ranked(parts: Sequence[Part]) -> tuple[Tensor, Tensor, int]:
    """Parts of one version by falling similarity, ties by the smaller row, and how many items they are of."""
    rows, similarity = torch.cat([part.rows for part in parts]), torch.cat([part.similarity for part in parts])
    by_row = rows.argsort(stable=True)
    order = by_row[similarity[by_row].argsort(descending=True, stable=True)]
    return rows[order], similarity[order], sum(part.num_eligible for part in parts)


def _first_of_each(rows: Tensor) -> Tensor:
    """Where each distinct row comes first, ascending."""
    by_row = rows.argsort(stable=True)
    ordered = rows[by_row]
    is_first = torch.ones(len(rows), dtype=torch.bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    return by_row[is_first].sort().values
