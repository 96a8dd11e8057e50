"""What a generated program reads beside tables: weights, and pieces of the users' sides, as blocks in one buffer each.

A block stands for a piece of a product's input and one of its output, so it is read from its first number on, without
a mask: what is padding there is zero here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from prerank.kernels.device_layout import LEAST, Piece
from prerank.kernels.layout import padded
from prerank.kernels.program import OfUser, Part, Weight
from prerank.types import Features

CODES = 32
"""Of a user's codes compared at once: they are padded to a power of two from it on, with zeros, which match nothing."""


@dataclass(frozen=True, slots=True)
class Span:
    """A piece's columns, counted from the first one of the part it belongs to."""

    start: int
    width: int
    padded: int

    @classmethod
    def of(cls, piece: Piece, part: Part) -> Span:
        """Where `piece` is in `part`."""
        return cls(piece.start - part.start, piece.width, piece.padded)


ONE = Span(0, 1, 1)


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """[inputs, outputs] of a weight [all outputs, all inputs]; of a vector `inputs` is ONE."""

    source: Weight
    inputs: Span
    outputs: Span

    @property
    def size(self) -> int:
        """In the buffer, where every block begins at a multiple of LEAST."""
        return padded(self.inputs.padded * self.outputs.padded, LEAST)

    def taken(self, found: Tensor) -> Tensor:
        """The block of the weight that was `found`, [size], zeros where it is padding."""
        whole = found.reshape(len(found), -1) if found.dim() else found.reshape(1, 1)
        own = whole[self.outputs.start :, self.inputs.start :][: self.outputs.width, : self.inputs.width].t()
        assert own.shape == (self.inputs.width, self.outputs.width), "a weight is as wide as its step says"
        own = pad(own, (0, self.outputs.padded - own.shape[1], 0, self.inputs.padded - own.shape[0])).flatten()
        return pad(own, (0, self.size - len(own)))


@dataclass(slots=True)
class Blocks:
    """Blocks one after another, in the order in which they are read."""

    blocks: list[Block] = field(default_factory=list)
    size: int = 0

    def add(self, block: Block) -> int:
        """-> where it begins."""
        self.blocks.append(block)
        self.size += block.size
        return self.size - block.size

    def packed(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """All of them, of weights, [size]."""
        found = [block.taken(block.source) for block in self.blocks if isinstance(block.source, Tensor)]
        assert len(found) == len(self.blocks)
        return torch.cat([one.to(device, dtype) for one in found]) if found else torch.zeros(1, device=device)


class UserPacking:
    """Blocks of users' sides and the codes that matches compare, packed by a gather each, for sides of one shape."""

    def __init__(self, blocks: Sequence[Block], codes: Sequence[OfUser], user: Features) -> None:
        """`user` is a batch's side [B, ...]."""
        asked = [block.source for block in blocks if isinstance(block.source, OfUser)]
        self._names = list(dict.fromkeys(one.name for one in asked))
        self._of_codes = list(dict.fromkeys(one.name for one in codes))
        self._like = {name: user[name].shape[1:] for name in (*self._names, *self._of_codes)}
        device = next(iter(user.values())).device
        places = self._places(self._names)
        found = [block.taken(one.view(places)) for block, one in zip(blocks, asked, strict=True)]
        factors = [torch.full((block.size,), one.factor) for block, one in zip(blocks, asked, strict=True)]
        self._index = torch.cat(found).to(device) if found else torch.zeros(1, dtype=torch.int64, device=device)
        self._factors = torch.cat(factors).to(device) if found else torch.zeros(1, device=device)
        places = self._places(self._of_codes)
        own = [one.view(places) for one in codes]
        longest = max((len(one) for one in own), default=1)
        self.num_codes = max(CODES, 1 << (longest - 1).bit_length())
        wide = [pad(one, (0, self.num_codes - len(one))) for one in own]
        self._code_index = torch.cat(wide).to(device) if wide else torch.zeros(1, dtype=torch.int64, device=device)

    def fits(self, user: Features) -> bool:
        """Whether this batch's side has the shapes it was made for."""
        return all(user[name].shape[1:] == shape for name, shape in self._like.items())

    def numbers(self, user: Features) -> Tensor:
        """Every block of each request, float32 [B, size]."""
        return _flat(user, self._names, torch.float32)[:, self._index] * self._factors

    def codes(self, user: Features) -> Tensor:
        """Every match's codes of each request, int64 [B, matches * num_codes]."""
        return _flat(user, self._of_codes, torch.int64)[:, self._code_index]

    def _places(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Where each number of these tensors is in `_flat`, whose first is zero."""
        at, found = 1, {}
        for name in names:
            size = self._like[name].numel()
            found[name] = torch.arange(at, at + size).view(self._like[name])
            at += size
        return found


def _flat(user: Features, names: Sequence[str], dtype: torch.dtype) -> Tensor:
    first = next(iter(user.values()))
    zero = torch.zeros(len(first), 1, dtype=dtype, device=first.device)
    return torch.cat([zero, *(user[name].flatten(1).to(dtype) for name in names)], 1)
