"""Numbers without a generator: each a pure function of a seed, a name and an index, the same with any numpy.

It does not know what the numbers are for.
"""

import math
import zlib
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

Ints: TypeAlias = NDArray[np.int64]
Hashes: TypeAlias = NDArray[np.uint64]
Floats: TypeAlias = NDArray[np.float32]
Doubles: TypeAlias = NDArray[np.float64]

_GOLDEN: Final = 0x9E3779B97F4A7C15
_MASK64: Final = (1 << 64) - 1
_ID_BITS: Final = 40
_ID_MASK: Final = (1 << _ID_BITS) - 1
HASH_BLOCK: Final = 1 << 16
# Odd multipliers: multiplying by one is a bijection modulo 2^40, so ids look arbitrary and are decoded by arithmetic.
_ID_MULTIPLIERS: Final = {
    "user": 0x5851F42D4D, "item": 0x9E3779B97F, "campaign": 0xD1342543DF, "advertiser": 0xAEF17502B5,
}  # fmt: skip


def stream(seed: int, name: str) -> int:
    """The starting point of one named stream of hashes, 0 .. 2^64 - 1."""
    start = np.array([(seed * _GOLDEN + zlib.crc32(name.encode()) * 0xC2B2AE3D27D4EB4F) & _MASK64], np.uint64)
    return int(_mix(start)[0])


def hashes(start: int, index: Ints) -> Hashes:
    """One 64-bit hash an index, same shape. Source: the splitmix64 finaliser (Steele, Lea, Flood, OOPSLA 2014)."""
    out = index.astype(np.uint64)
    out += np.uint64(1)
    out *= np.uint64(_GOLDEN)
    out += np.uint64(start)
    return _mix(out)


def uniforms(start: int, index: Ints) -> Doubles:
    """One number in [0, 1) an index."""
    return (hashes(start, index) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normals(start: int, index: Ints) -> Floats:
    """One number an index, mean 0 and deviation 1: the sum of four 16-bit uniforms, so within 3.47 of zero."""
    out = np.empty(index.shape, np.float32)
    flat_in, flat_out = index.reshape(-1), out.reshape(-1)
    for at in range(0, flat_in.size, HASH_BLOCK):  # blocks stay in the L2 cache
        parts = hashes(start, flat_in[at : at + HASH_BLOCK]).view(np.uint16).reshape(-1, 4)
        flat_out[at : at + HASH_BLOCK] = parts.sum(axis=1, dtype=np.uint32)
    out -= np.float32(2 * 65535)
    out /= np.float32(math.sqrt((65536**2 - 1) / 3))
    return out


def normal_rows(start: int, rows: Ints, dim: int) -> Floats:
    """[len(rows), dim] normals; a row depends on its number alone."""
    return normals(start, rows[:, None] * dim + np.arange(dim))


def world_ids(kind: str, rows: Ints) -> Ints:
    """The stable int64 names of rows 0..n of one kind: distinct, positive, below 2^40, in no order."""
    return ((rows + 1).astype(np.uint64) * np.uint64(_ID_MULTIPLIERS[kind]) & np.uint64(_ID_MASK)).astype(np.int64)


def rows_of_ids(kind: str, ids: Ints) -> Ints:
    """The rows that `world_ids` named so; an id of no row comes back as some number outside 0..n."""
    inverse = pow(_ID_MULTIPLIERS[kind], -1, 1 << _ID_BITS)
    rows = (ids.astype(np.uint64) * np.uint64(inverse) & np.uint64(_ID_MASK)).astype(np.int64) - 1
    return np.where((ids >= 0) & (ids <= _ID_MASK), rows, -1)


def pick(shares: tuple[float, ...] | Doubles, u: Doubles) -> Ints:
    """For each uniform `u` the code it falls on when codes have these shares."""
    bounds = np.cumsum(np.asarray(shares, np.float64))
    return np.searchsorted(bounds[:-1] / bounds[-1], u, side="right")


def _mix(x: Hashes) -> Hashes:
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x
