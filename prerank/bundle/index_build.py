"""The index of a version that is being made: the item tower's vectors, in as many shards as are asked for."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from prerank.bundle.index_files import keys_of, shards_of
from prerank.bundle.item_table import Empty, ItemTable
from prerank.bundle.parts import Parts
from prerank.config import IndexConfig
from prerank.errors import BundleError, DataError
from prerank.index.base import INDEXES, Index
from prerank.index.sharded import ShardedIndex, rows_of
from prerank.types import Array, Columns

_ITEMS_AT_ONCE = 1 << 16


@torch.no_grad()
def build_index(parts: Parts, items: ItemTable, raw: pa.Table, keep: int, empty: Empty) -> Index:
    """Over the item tower's vectors, in memory from `empty`, ready for as many as a request keeps; `raw` [I] by rows.

    Raises BundleError for vectors that are not finite, or a shard without items, DataError where the column that says
    in which shard an item is is missing.
    """
    chosen = parts.config.retrieval.index
    vectors = _vectors(parts, items, empty)
    index = _sharded(chosen, vectors, _keys(chosen, items, raw), empty)
    query = parts.towers.user_side(tensors_of_columns(parts.asked_user or parts.golden_user))
    index.prepare(query, keep, chosen.floor)
    return index


def tensors_of_columns(columns: Columns) -> dict[str, Tensor]:
    """Copies, by name."""
    return {name: torch.from_numpy(np.array(column)) for name, column in columns.items()}


def refuse_nonfinite(numbers: Tensor, what: str) -> None:
    """Raises BundleError where some are not finite, which says `what` they are."""
    if not numbers.is_floating_point() or not numbers.numel() or all(bool(end.isfinite()) for end in numbers.aminmax()):
        return
    wrong = (~numbers.isfinite()).nonzero()
    raise BundleError(f"{what}: {len(wrong)} are not finite, the first at {wrong[0].tolist()}; train again")


def _keys(chosen: IndexConfig, items: ItemTable, raw: pa.Table) -> Array:
    """What tells the shard of each item, int64 [n]."""
    if chosen.shards == 1 or not chosen.by:
        return items.item_ids[: items.num_published].numpy()
    if chosen.by not in raw.column_names:
        raise DataError(f"publish: retrieval.index.by: the items have {raw.column_names}, not {chosen.by!r}")
    return keys_of(raw[chosen.by].to_pylist())


def _sharded(chosen: IndexConfig, vectors: Tensor, keys: Array, empty: Empty) -> Index:
    """Over vectors float32 [I, D], of which the first are of items with these `keys` int64 [n], the rest free."""
    kind, of = INDEXES[chosen.kind], chosen.shards
    if of == 1:
        return kind(vectors, chosen.storage)
    shard_of = shards_of(keys, of)
    without = sorted(set(range(of)) - set(shard_of.tolist()))
    if without:
        raise BundleError(f"publish: none of {len(keys)} items is in shard {without[0]} of {of}; have fewer")
    free = np.arange(len(keys), len(vectors)) % of  # a row that nobody has yet may be anybody's
    rows = torch.from_numpy(np.concatenate([shard_of, free]).astype(np.int32))
    shards = []
    for number in range(of):
        own = rows_of(rows, number)
        some = empty((len(own), vectors.shape[1]), torch.float32)
        torch.index_select(vectors, 0, own, out=some)
        shards.append(kind(some, chosen.storage))
    return ShardedIndex(shards, rows)


@torch.no_grad()
def _vectors(parts: Parts, items: ItemTable, empty: Empty) -> Tensor:
    """The item tower's vectors float32 [C, D] in row order; those of the slack, NaN, are found by nobody."""
    order = parts.order()
    vectors: Tensor | None = None
    for start in range(0, len(order), _ITEMS_AT_ONCE):
        some = order[start : start + _ITEMS_AT_ONCE]
        made = _made(parts, some) if parts.vectors is None else torch.from_numpy(np.asarray(parts.vectors[some]))
        if vectors is None:
            vectors = empty((items.num_rows, made.shape[1]), torch.float32)
            vectors[len(order) :] = torch.nan
        vectors[start : start + len(some)] = made
    assert vectors is not None, "a version has items"
    refuse_nonfinite(vectors[: len(order)], "the item vectors")
    return vectors


def _made(parts: Parts, some: Array) -> Tensor:
    """What the towers give of items int64 [n]."""
    features = {name: torch.from_numpy(np.asarray(column[some])) for name, column in parts.item_columns.items()}
    return parts.towers.item_side(features, torch.from_numpy(np.asarray(parts.popularity[some], dtype=np.float32)))
