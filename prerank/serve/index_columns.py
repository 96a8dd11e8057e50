"""Candidates as columns of one Arrow record batch, as index hosts send them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from prerank.types import Features

ITEM_IDS, SIMILARITY = "item_ids", "similarity"
COMPRESSED = "zstd"
"""Fewer bytes for some time at both ends: worth it where hosts are far, or the network is what is short."""
_MOST = 2**32


def columns_of(item_ids: Tensor, more: Features) -> dict[str, pa.Array]:
    """item_ids int64 [n] and more columns [n] by name -> Arrow columns; the ids as uint32 where that holds them all."""
    ids = item_ids.numpy()
    if not len(ids) or (ids.min() >= 0 and ids.max() < _MOST):
        ids = ids.astype(np.uint32)
    return {ITEM_IDS: pa.array(ids), **{name: pa.array(column.numpy()) for name, column in more.items()}}


def batch_of(columns: dict[str, pa.Array], said: dict[str, str] | None = None) -> pa.RecordBatch:
    """Columns of columns_of as a record batch without nulls, `said` in its schema."""
    fields = [pa.field(name, column.type, False) for name, column in columns.items()]
    return pa.record_batch(list(columns.values()), schema=pa.schema(fields, metadata=said))


def options_of(is_compressed: bool) -> pa.ipc.IpcWriteOptions:
    """How a batch is written."""
    return pa.ipc.IpcWriteOptions(compression=COMPRESSED if is_compressed else None, use_threads=False)


def tensors_of(table: pa.Table, values: tuple[str, ...]) -> tuple[Tensor, Tensor, dict[str, Tensor]] | None:
    """item_ids int64 [n], similarity float32 [n] and the `values` by name of what came; None where that is not it."""
    if table.column_names != [ITEM_IDS, SIMILARITY, *values]:
        return None
    ids, similarity = table.schema.types[:2]
    if ids not in (pa.uint32(), pa.int64()) or similarity != pa.float32():
        return None
    found = [torch.from_numpy(np.array(column.to_numpy())) for column in table.columns[1:]]
    item_ids = torch.from_numpy(table.column(0).to_numpy().astype(np.int64))
    return item_ids, found[0], dict(zip(values, found[1:], strict=True))
