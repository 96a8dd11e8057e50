"""Six attributes of a million items to eligible rows: packed bitmaps beside numpy booleans, roaring, a Bloom index.

The least it could take is reading the bitmaps asked for and writing the rows, at a copy's bytes a second. Every index
knows all values of all attributes and is made once; what is timed is one request.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from benchmarks.bloom_peer import BloomIndex
from benchmarks.machine import times_ms
from benchmarks.result import Row
from prerank.business.targeting import Targeting
from prerank.config import TargetingRule
from prerank.types import Array, Given

VALUES = {"country": 60, "age": 8, "device": 5, "language": 30, "interests": 200, "placement": 20}
LISTED = {"country": 20, "age": 5, "device": 4, "language": 15, "interests": 100, "placement": 12}
"""Of a restricted item, how many of an attribute's values it lists; seven items in ten are restricted."""
ASKED = {name: (1,) if name != "interests" else (1, 7, 30) for name in VALUES}
BLOOM_BITS = (64, 128, 256, 512)


class _Roaring(Protocol):
    """What is asked of pyroaring's bitmap, whose package need not be installed."""

    def __iter__(self) -> Iterator[int]: ...
    def __len__(self) -> int: ...
    def to_array(self) -> array[int]: ...


@dataclass(frozen=True, slots=True)
class Audience:
    """Who may see which of `num` items: lists of values by attribute, and the bitmaps fitted to them."""

    listed: Mapping[str, pa.Array]
    targeting: Targeting

    @classmethod
    def draw(cls, num: int, made: np.random.Generator) -> Audience:
        """Restricted at random, and fitted."""
        listed = {name: _lists(made, num, VALUES[name], LISTED[name]) for name in VALUES}
        rules = {name: TargetingRule(item=name, user=name) for name in VALUES}
        return cls(listed, Targeting.fit(rules, {name: pa.chunked_array([one]) for name, one in listed.items()}, num))

    def profile(self) -> dict[str, Given]:
        """The user who is asked for."""
        return {name: [str(value) for value in values] for name, values in ASKED.items()}

    def bitmaps(self, name: str, values: Sequence[int]) -> Array:
        """Of items that some value of one attribute may see, a row a value: int64 [., W]."""
        one: dict[str, Given] = {**dict.fromkeys(VALUES), name: [str(value) for value in values]}
        chosen, starts, _ = self.targeting.choose(one, {}, 0)
        group = list(VALUES).index(name)
        found: Array = self.targeting.bitmaps[chosen[starts[group] : starts[group + 1]].long()].numpy()
        return found

    def masks(self) -> dict[str, Array]:
        """Booleans [I] by attribute, of the values asked for: numpy's index, whose ORs are made already."""
        found = {}
        for name, values in ASKED.items():
            either = np.bitwise_or.reduce(self.bitmaps(name, values))
            found[name] = _bits(either, self.targeting.num_items).astype(bool)
        return found


def eligibility_rows(audience: Audience, copy_gb_s: float, calls: int) -> Iterator[Row]:
    """Bars are of a million items."""
    targeting = audience.targeting
    chosen, num = targeting.choose(audience.profile(), {}, 0), targeting.num_items
    ours = partial(targeting, *chosen)
    masks = list(audience.masks().values())
    works: dict[str, Callable[[], Array]] = {"eligibility by numpy booleans held ready": partial(_by_numpy, masks)}
    rows = [Row.of("eligibility: bytes of the bitmaps", targeting.bitmaps.nbytes / 1e6, "MB", num)]
    if find_spec("pyroaring"):
        bitmaps = _roaring(audience)
        works["eligibility by roaring, to its own array of ids"] = partial(_by_roaring, bitmaps, _as_array)
        works["eligibility by roaring, iterated to ids"] = partial(_by_roaring, bitmaps, _iterated)
        size = sum(len(bitmap.serialize()) for by_value in bitmaps.values() for bitmap in by_value.values())
        rows.append(Row.of("eligibility by roaring: bytes of the bitmaps", size / 1e6, "MB", num))
    else:
        rows.append(Row.skipped("eligibility by roaring", "not installed"))
    exact = ours().numpy()
    for name, work in works.items():
        assert np.array_equal(exact, work()), name
    # by turns, so that all see the same machine
    spent: dict[str, list[float]] = {name: [] for name in ("ours", *works)}
    for _ in range(calls):
        spent["ours"] += times_ms(ours, 1)
        for name, work in works.items():
            spent[name] += times_ms(work, 1)
    read, written = targeting.bitmaps.shape[1] * 8 * len(chosen[0]), exact.nbytes
    least = (read + written) / copy_gb_s / 1e6
    median = float(np.median(spent["ours"]))
    yield Row.of("eligible of six attributes", float(len(exact)), "rows", num)
    yield replace(Row.timed("eligibility, six attributes, to rows", spent["ours"], num), bar=0.5, holds=median < 0.5)
    yield Row.of("eligibility: the least that its bytes could take", least, "ms", num)
    yield Row.of("eligibility: over that", median / least, "times", num)
    for name in works:
        yield Row.timed(name, spent[name], num)
        ratio = median / float(np.median(spent[name]))
        bar = 1 / 8 if "numpy" in name else 1 / 10
        over = name.removeprefix("eligibility by ")
        yield replace(Row.of(f"eligibility over {over}", ratio, "times", num), bar=bar, holds=ratio <= bar)
    yield from rows
    yield from _bloom_rows(audience, exact, max(3, calls // 8))


def _by_numpy(masks: Sequence[Array]) -> Array:
    mask = masks[0]
    for other in masks[1:]:
        mask = mask & other
    return np.flatnonzero(mask)


def _roaring(audience: Audience) -> dict[str, dict[int, Any]]:
    """A bitmap of each value of each attribute."""
    found: dict[str, dict[int, Any]] = {name: {} for name in VALUES}
    bitmap, num = import_module("pyroaring").BitMap, audience.targeting.num_items
    for name, values in VALUES.items():
        for value in range(values):
            [bits] = audience.bitmaps(name, (value,))
            made = bitmap(np.flatnonzero(_bits(bits, num)).astype(np.uint32))
            made.run_optimize()
            found[name][value] = made
    return found


def _by_roaring(bitmaps: Mapping[str, Mapping[int, Any]], to_ids: Callable[[_Roaring], Array]) -> Array:
    left: Any = None
    for name, values in ASKED.items():
        first, *others = (bitmaps[name][value] for value in values)
        group = first.union(first, *others) if others else first
        left = group if left is None else left & group
    return to_ids(left)


def _as_array(bitmap: _Roaring) -> Array:
    """Of 32 bits, as roaring holds them: half of what a row takes."""
    return np.frombuffer(bitmap.to_array(), np.uint32)


def _iterated(bitmap: _Roaring) -> Array:
    """As numpy takes what it can only iterate over."""
    return np.fromiter(bitmap, np.int64, len(bitmap))


def _bloom_rows(audience: Audience, exact: Array, calls: int) -> Iterator[Row]:
    """What is beside the bitmaps: reported though not eligible, of all reported; bytes; time."""
    num = audience.targeting.num_items
    for bits in BLOOM_BITS:
        index = BloomIndex(audience.listed, bits)
        found = index.rows(ASKED)
        assert np.isin(exact, found).all(), "a Bloom index leaves no eligible item out"
        name = f"eligibility by a Bloom index of {bits} bits an item"
        yield Row.timed(name, times_ms(partial(index.rows, ASKED), calls), num)
        false = 1 - len(exact) / len(found)
        yield Row.of(f"{name}: not eligible, of those reported", false, "share", num)
        yield Row.of(f"{name}: bytes", index.bytes / 1e6, "MB", num)


def _lists(made: np.random.Generator, num: int, values: int, listed: int) -> pa.Array:
    """Of three items in ten nothing, of the others `listed` of so many values each."""
    lengths = np.where(made.random(num) < 0.3, 0, listed)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    starts = made.integers(0, values, num).repeat(lengths)
    place = np.arange(offsets[-1]) - offsets[:-1].repeat(lengths)
    return pa.ListArray.from_arrays(offsets, ((starts + place) % values).astype(np.int16))


def _bits(words: Array, num: int) -> Array:
    """uint8 [I] of packed int64 [W]."""
    return np.unpackbits(words.view(np.uint8), bitorder="little")[:num]
