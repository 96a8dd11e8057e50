"""A version's index on the disk: one file, or one a shard and beside them one that says in which shard each row is.

Which shard an item is in is asked of its item_id, or of a column's value, never of a row: so it is the same in every
version, and while some hosts have a newer version than others no item is in two shards or in none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from prerank._tensor_files import read_tensors, write_tensors
from prerank.bundle import manifest
from prerank.config import Config, IndexConfig
from prerank.errors import BundleError
from prerank.index.base import INDEXES, Index, StoredIndex
from prerank.index.sharded import ShardedIndex, rows_of
from prerank.stores.contexts import digest
from prerank.types import Array

_SHARD = "shard"


def keys_of(values: Sequence[object]) -> Array:
    """What tells the shard of an item with such a value of a column, int64 [n]; a list is as one text."""
    plain = [one if one is None or isinstance(one, str | int) else str(one) for one in values]
    known = {one: digest(one) for one in set(plain)}
    return np.array([known[one] for one in plain], np.int64)


def shards_of(keys: Array, of: int) -> Array:
    """int64 [n] item_ids or `keys_of` values -> the shard of each, int64 [n] from 0 to `of` - 1.

    The remainder of the splitmix64 finaliser (Steele, Lea, Flood, OOPSLA 2014), so that ids in any order spread; part
    of the hosts' contract.
    """
    mixed = keys.astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    return (mixed % np.uint64(of)).astype(np.int64)


def new_index(chosen: IndexConfig, vectors: Tensor, keys: Array) -> Index:
    """Over vectors float32 [I, D], of which the first are of items with these `keys` int64 [n], the rest free.

    Raises BundleError where a shard has no item.
    """
    if chosen.shards == 1:
        return INDEXES[chosen.kind](vectors, chosen.storage)
    shard_of = shards_of(keys, chosen.shards)
    empty = sorted(set(range(chosen.shards)) - set(shard_of.tolist()))
    if empty:
        raise BundleError(f"publish: none of {len(keys)} items is in shard {empty[0]} of {chosen.shards}; have fewer")
    free = np.arange(len(keys), len(vectors)) % chosen.shards  # a row that nobody has yet may be anybody's
    rows = torch.from_numpy(np.concatenate([shard_of, free]).astype(np.int32))
    each = [vectors[rows_of(rows, number)] for number in range(chosen.shards)]
    return ShardedIndex([INDEXES[chosen.kind](some, chosen.storage) for some in each], rows)


def save_index(index: Index, folder: Path, models: Mapping[str, str]) -> None:
    """Write it into a version's `folder`, `models` beside the vectors."""
    parts = index.parts if isinstance(index, ShardedIndex) else (index,)
    (folder / manifest.INDEX).parent.mkdir()
    for number, part in enumerate(parts):
        cast("StoredIndex", part).save(folder / manifest.shard_file(number), models)
    if isinstance(index, ShardedIndex):
        write_tensors(folder / manifest.SHARDS, {_SHARD: index.shard_of}, {})


def index_of(path: Path, config: Config, said: Mapping[str, object]) -> Index:
    """The index. Raises BundleError for one whose vectors are of other towers than the manifest lists."""
    of = config.retrieval.index.shards
    if of == 1:
        return part_of(path, config, said, 0)
    shard_of = _shard_of(path, of)
    parts = [part_of(path, config, said, number) for number in range(of)]
    return ShardedIndex(parts, shard_of)


def part_of(path: Path, config: Config, said: Mapping[str, object], number: int) -> StoredIndex:
    """Shard `number` of it alone. Raises BundleError as `index_of`."""
    where = path / manifest.shard_file(number)
    index = INDEXES[config.retrieval.index.kind].load(where)
    towers = manifest.files_of(path, said)[manifest.RETRIEVAL].model_id
    if index.models != {"retrieval": towers}:
        raise BundleError(
            f"{where}: expected vectors of the towers {towers}, found those of {dict(index.models)}; "
            "its user vectors would be of another space"
        )
    return index


def rows_of_part(path: Path, of: int, number: int) -> Tensor:
    """The rows that shard `number` has, int64, rising, of a version published in `of` shards. Raises BundleError."""
    return rows_of(_shard_of(path, of), number)


def _shard_of(path: Path, of: int) -> Tensor:
    where = path / manifest.SHARDS
    tensors, _ = read_tensors(where)
    shard_of = tensors.get(_SHARD)
    if shard_of is None or shard_of.dtype != torch.int32 or shard_of.dim() != 1 or not len(shard_of):
        raise BundleError(f"{where}: expected {_SHARD!r} int32 [I], found {sorted(tensors)}; publish again")
    low, high = (int(one) for one in shard_of.aminmax())
    if low < 0 or high >= of:
        raise BundleError(f"{where}: expected shards 0 to {of - 1}, found {low} to {high}; publish again")
    return shard_of
