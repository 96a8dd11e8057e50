"""Tensors side by side in one piece of memory, so that one copy brings them all to a device, or back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

_ALIGNED = 16


@dataclass(frozen=True, slots=True)
class Field:
    """A tensor's name, shape and type."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """What it takes, rounded up so that the next one is aligned."""
        return -(-prod(self.shape) * self.dtype.itemsize // _ALIGNED) * _ALIGNED


class Layout:
    """Where each of `fields` stands, one after the other."""

    def __init__(self, fields: Sequence[Field]) -> None:
        self.fields = tuple(fields)
        self._ends: dict[str, int] = {}
        self.num_bytes = 0
        for one in fields:
            self.num_bytes += one.num_bytes
            self._ends[one.name] = self.num_bytes

    def end_of(self, name: str) -> int:
        """How many bytes all fields up to this one take."""
        return self._ends[name]

    def views(self, memory: Tensor) -> dict[str, Tensor]:
        """The fields in memory uint8 [num_bytes or more], by name."""
        found = {}
        for one in self.fields:
            start = self._ends[one.name] - one.num_bytes
            part = memory[start : start + prod(one.shape) * one.dtype.itemsize]
            found[one.name] = part.view(one.dtype).view(one.shape)
        return found
