"""Which shapes a device is asked to compute: a captured graph has one, and what is smaller is padded to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

GRANULE = 256
"""Sizes are multiples of it, as tiles of a matrix product are."""
COMMON = tuple(num << 10 for num in (1, 4, 16, 32, 64, 128))
"""The sizes where nobody has seen yet what is asked."""


@dataclass(frozen=True, slots=True, order=True)
class Shape:
    """B `requests` of N `candidates` each, padding included."""

    requests: int
    candidates: int

    def __str__(self) -> str:
        return f"{self.requests} x {self.candidates:,}"


@dataclass(frozen=True, slots=True)
class Buckets:
    """The candidates that requests are padded to, `sizes` ascending, and how many requests share a batch.

    Requests of one size share one as long as they are `most_requests` at most and of `together` candidates at most,
    padding included. What is over the largest size is cut. Raises ValueError for sizes that are none.
    """

    sizes: tuple[int, ...] = COMMON
    together: int = 16 << 10
    most_requests: int = 16

    def __post_init__(self) -> None:
        if not self.sizes or self.sizes[0] < 1 or list(self.sizes) != sorted(set(self.sizes)):
            raise ValueError(f"buckets: expected sizes of 1 or more, ascending, got {self.sizes}")
        if self.most_requests < 1:
            raise ValueError(f"buckets: expected one request a batch or more, got {self.most_requests}")

    @classmethod
    def fit(cls, seen: Mapping[int, int], at_most: int = len(COMMON), largest: int = COMMON[-1]) -> Self:
        """The sizes that pad least where requests of each size are as many as `seen` says; COMMON where none were.

        There are at most so many of them, and none over `largest`.
        """
        asked = {num: count for num, count in seen.items() if num > 0 and count > 0}
        whole = {num: count for num, count in asked.items() if num <= largest}
        if not whole:
            return cls((*(size for size in COMMON if size < largest), largest))
        is_cut = len(whole) < len(asked)  # and what is cut wants the pieces as large as they may be
        found = best_sizes(whole, max(1, at_most - is_cut))
        sizes = {min(size, largest) for size in found} | ({largest} if is_cut else set())
        return cls(tuple(sorted(sizes)[-at_most:]))

    @property
    def largest(self) -> int:
        """What is over it is cut."""
        return self.sizes[-1]

    def size_of(self, num: int) -> int:
        """What `num` candidates are padded to; the largest size where they are more."""
        return next((size for size in self.sizes if size >= num), self.largest)

    def pieces(self, num: int) -> list[tuple[int, int]]:
        """Where `num` candidates are cut, first and one past the last of each piece; a piece where they fit."""
        starts = range(0, max(num, 1), self.largest)
        return [(start, min(num, start + self.largest)) for start in starts]

    def most_of(self, size: int) -> int:
        """How many requests of a size may share a batch; 1 is alone."""
        return max(self._counts(size))

    def shape_of(self, nums: Sequence[int]) -> Shape:
        """The shape of a batch of requests of so many candidates each: they are of one size, and may share it."""
        size = self.size_of(max(nums))
        return Shape(next(count for count in self._counts(size) if count >= len(nums)), size)

    def shapes(self) -> list[Shape]:
        """Every shape that `shape_of` gives, the largest first: memory that it took is enough for the others."""
        found = [Shape(count, size) for size in self.sizes for count in self._counts(size)]
        return sorted(found, key=lambda one: (one.requests * one.candidates, one), reverse=True)

    def _counts(self, size: int) -> list[int]:
        """The numbers of requests that a batch of a size is padded to: 1, and twice as many each time."""
        most = max(1, min(self.most_requests, self.together // size))
        return [1 << power for power in range(most.bit_length())]


def best_sizes(seen: Mapping[int, int], at_most: int, granule: int = GRANULE) -> tuple[int, ...]:
    """At most so many sizes, multiples of `granule`, that pad requests of the sizes `seen`, counted, by the least.

    The largest holds the largest request. Of equally good ones those of the fewest sizes.
    """
    assert seen
    assert at_most > 0
    rounded: dict[int, int] = {}
    for num, count in seen.items():
        size = -(-num // granule) * granule
        rounded[size] = rounded.get(size, 0) + count
    sizes = np.array(sorted(rounded), np.int64)
    # before[i]: how many requests are of the first i sizes
    before = np.concatenate([[0], np.cumsum([rounded[size] for size in sizes.tolist()])])
    # cost[i]: the least that those of the first i sizes are padded to, with as many buckets as there are rounds
    cost = np.concatenate([[0.0], np.full(len(sizes), np.inf)])
    cuts: list[list[int]] = []
    totals: list[float] = []
    for _ in range(min(at_most, len(sizes))):
        least, cut = np.full(len(cost), np.inf), [0] * len(cost)
        for end in range(1, len(cost)):
            asked = cost[:end] + sizes[end - 1] * (before[end] - before[:end])
            cut[end] = int(asked.argmin())
            least[end] = asked[cut[end]]
        cost = least
        cuts.append(cut)
        totals.append(float(cost[-1]))
    end, found = len(sizes), list[int]()
    for cut in reversed(cuts[: totals.index(min(totals)) + 1]):
        found.append(int(sizes[end - 1]))
        end = cut[end]
    return tuple(reversed(found))
