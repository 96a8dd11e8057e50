"""Products of eight-bit numbers: of a weight every row has a scale of its own, and so has what it multiplies.

y = x W^T with x[n, k] = scale[n] * q[n, k] and W[m, k] = scale[m] * p[m, k], q and p whole numbers of -127 to 127. The
scales of x are of the moment, so nothing is measured beforehand and nothing is cut off (dynamic quantisation).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prerank.kernels.layout import padded

MOST = 127
_ABOVE = 128  # what is added to a byte of x, which the instruction takes without a sign


@dataclass(frozen=True, slots=True)
class CoarseWeight:
    """A weight [M, K] as int8 `places` times a float32 `scale` [M]."""

    places: Tensor
    scale: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> CoarseWeight:
        """The nearest to a float one; a row of zeros stays one."""
        wide = weight.float()
        scale = wide.abs().amax(1) / MOST
        by = torch.where(scale > 0, 1 / scale, 0.0)
        return cls((wide * by.unsqueeze(1)).round().to(torch.int8), scale)

    def packed(self) -> Tensor:
        """int8 [M / 16, K / 4, 16, 4], both rounded up to a tile with zeros: what an instruction multiplies at once."""
        rows, depth = self.places.shape
        whole = self.places.new_zeros(padded(rows), padded(depth))
        whole[:rows, :depth] = self.places
        return whole.view(padded(rows) // 16, 16, padded(depth) // 4, 4).transpose(1, 2).contiguous()

    def begin(self) -> Tensor:
        """int32 [M rounded up]: where sums begin, for x comes with 128 more."""
        found = torch.zeros(padded(len(self.scale)), dtype=torch.int32)
        found[: len(self.scale)] = -_ABOVE * self.places.sum(1)
        return found


def quantized_linear(x: Tensor, weight: CoarseWeight) -> Tensor:
    """x [N, K] of bfloat16 numbers -> x W^T, float32 [N, M]: the reference of the native product.

    A row with a number that is not finite gives NaN.
    """
    wide = x.float()
    high = wide.abs().amax(1, keepdim=True)
    by = torch.where(high > 1e-30, torch.full_like(high, MOST) / high, 0.0)
    # in float64, to be rounded once, as a fused instruction does
    places = (wide.double() * by + _ABOVE).float().round() - _ABOVE
    found = (places @ weight.places.float().t()) * (high / MOST * weight.scale)
    return torch.where(high.isfinite(), found, torch.nan)
