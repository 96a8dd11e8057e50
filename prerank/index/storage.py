"""What an index may keep its vectors as."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

Storage = Literal["float32", "bfloat16", "int8"]
"""float32 as given; bfloat16 in half of the bytes; int8 in a quarter, with a float32 scale a row."""

STORAGES: Mapping[Storage, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
"""The type of the stored numbers, by name."""

_MOST = 127


def storage_named(name: object) -> Storage | None:
    """The storage of this name, float32 where a file names none, or None where it is not one."""
    if name is None:
        return "float32"
    return next((storage for storage in STORAGES if storage == name), None)


def store(vectors: Tensor, storage: Storage) -> tuple[Tensor, Tensor | None]:
    """Vectors float32 [I, D] as `storage` keeps them, and for int8 the scales float32 [I] that multiply each row.

    A row's scale is its largest magnitude over 127, so the error of a number is at most half of that. A row with a
    number that is not finite has such a scale, and so no finite similarity.
    """
    if storage != "int8":
        return vectors.to(STORAGES[storage]), None
    largest = vectors.abs().amax(1) if vectors.shape[1] else vectors.new_zeros(len(vectors))
    scales = largest / _MOST
    # dividing by the largest first: a scale may be too small to be told from 0
    codes = (vectors / largest.unsqueeze(1) * _MOST).round().nan_to_num_(0, 0, 0).clamp_(-_MOST, _MOST)
    return codes.to(torch.int8), scales
