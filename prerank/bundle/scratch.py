"""Room for tensors that may be larger than memory while a version is made: files that have no name any more."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

IN_MEMORY = 1 << 24
"""Tensors of fewer bytes than this are in memory all the same."""


class Scratch:
    """Tensors in files of `folder`, which must be on a disk with room for them.

    Their pages are the system's to write out when memory is wanted. A file is removed as soon as it is mapped, so
    nothing is left of it, whatever becomes of the process.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor to write into; what it holds before is no matter."""
        num = math.prod(shape)
        if num * dtype.itemsize < IN_MEMORY:
            return torch.empty(tuple(shape), dtype=dtype)
        path = self._folder / f".scratch-{secrets.token_hex(8)}"
        try:
            return torch.from_file(str(path), shared=True, size=num, dtype=dtype).view(tuple(shape))
        finally:
            path.unlink(missing_ok=True)
