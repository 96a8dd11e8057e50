"""A Bloom index of who may see an item: a signature an item, in which a request looks for the bits of its values.

A signature has the bits of every (attribute, value) that the item lists, and of (attribute, anyone) where it lists
none. A request asks of each attribute whether all bits of one of its values, or of anyone, are there: some are there
by chance, and such an item is reported though it is not eligible. After signature files and SilverTorch's index.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log

import numpy as np
import pyarrow as pa

from prerank.types import Array

_WORD = 64
_ANYONE = -1
_ITEMS_AT_ONCE = 1 << 16


class BloomIndex:
    """Signatures of `bits` each of the items' lists [I] by attribute; as many bits a value as fill them best.

    `bytes` is what they take; words uint64 [bits / 64, I], so that a request reads only the words its bits are in.
    """

    def __init__(self, listed: Mapping[str, pa.Array], bits: int) -> None:
        num = len(next(iter(listed.values())))
        pairs = sum(int(np.maximum(_lengths(lists), 1).sum()) for lists in listed.values())
        self.bits, self.num_bits = bits, max(1, round(log(2) * bits * num / pairs))
        self.attributes = list(listed)
        self.words = np.zeros((bits // _WORD, num), np.uint64)
        for name, lists in listed.items():
            self._add(name, lists)

    @property
    def bytes(self) -> int:
        """Of all signatures."""
        return self.words.nbytes

    def rows(self, asked: Mapping[str, Sequence[int]]) -> Array:
        """The rows reported for values by attribute: every eligible one, int64 [n], ascending."""
        left = None
        for name, values in asked.items():
            group = None
            for mask in self._masks(name, [*values, _ANYONE]):
                has = self._has(mask)
                group = has if group is None else group | has
            assert group is not None
            left = group if left is None else left & group
        assert left is not None
        return np.flatnonzero(left)

    def _has(self, mask: Array) -> Array:
        """bool [I]: whether every bit of a mask uint64 [bits / 64] is there."""
        found: Array | None = None
        for word, wanted in zip(self.words, mask, strict=True):
            if wanted:
                has = (word & wanted) == wanted
                found = has if found is None else found & has
        assert found is not None
        return found

    def _add(self, name: str, lists: pa.Array) -> None:
        lengths, members = _lengths(lists), lists.flatten().to_numpy()
        masks = self._masks(name, range(int(members.max(initial=0)) + 1))
        [anyone] = self._masks(name, [_ANYONE])
        ends = np.cumsum(lengths)
        for start in range(0, len(lengths), _ITEMS_AT_ONCE):
            some = lengths[start : start + _ITEMS_AT_ONCE]
            lists_some = np.flatnonzero(some)
            nobody = np.flatnonzero(some == 0)
            first = ends[start] - some[0]
            own = members[first : ends[start + len(some) - 1]]
            for word, of_word in enumerate(masks.T):
                self.words[word, start + nobody] |= anyone[word]
                if len(own):
                    starts = (ends[start : start + len(some)] - some)[lists_some] - first
                    self.words[word, start + lists_some] |= np.bitwise_or.reduceat(of_word[own], starts)

    def _masks(self, name: str, values: Sequence[int]) -> Array:
        """uint64 [., bits / 64]: the bits of each value, distinct ones, as drawn from the value's own seed."""
        masks = np.zeros((len(values), self.bits // _WORD), np.uint64)
        for row, value in enumerate(values):
            drawn = np.random.default_rng([self.attributes.index(name), value + 1])
            for bit in drawn.choice(self.bits, self.num_bits, replace=False).tolist():
                masks[row, bit // _WORD] |= np.uint64(1 << bit % _WORD)
        return masks


def _lengths(lists: pa.Array) -> Array:
    lengths: Array = np.diff(lists.offsets.to_numpy())
    return lengths
