"""The ranker of a version on a device, or that of each segment: by its program's kernel, or by torch's modules."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from prerank.bundle.executor import DeviceRanker
from prerank.bundle.scorer import ItemSide
from prerank.kernels import triton
from prerank.models.ranker import Ranker
from prerank.models.segmented import SEGMENT, SegmentedRanker, of_segment
from prerank.serve.device_streams import Device
from prerank.types import Features

_log = logging.getLogger(__name__)


def segment_of(user_side: Features) -> int | None:
    """The segment of all users whose sides [B, ...] on the host these are; None where there are none, or several."""
    if SEGMENT not in user_side:
        return None
    found = {int(one) for one in user_side[SEGMENT].tolist()}
    return found.pop() if len(found) == 1 else None


@dataclass(slots=True)
class _Part:
    """One ranker with its own item side, and its kernel if it has one."""

    ranker: Ranker
    item_side: ItemSide
    fused: DeviceRanker | None


class RankerReplica:
    """`ranker` on `device`, where `item_side` [S, ...] by name is too; both are read as they are then.

    In half precision it is its program's kernel where Triton serves.
    """

    def __init__(self, ranker: Ranker, item_side: Features, device: Device) -> None:
        self._device = device
        self._whole, self._item_side = ranker, ItemSide(item_side)
        self._is_segmented = isinstance(ranker, SegmentedRanker)
        sides = [(ranker, dict(item_side))]
        if isinstance(ranker, SegmentedRanker):
            sides = [(one, of_segment(item_side, number)) for number, one in enumerate(ranker.each())]
        self._parts = [_Part(one, ItemSide(side), self._as_program(one, side)) for one, side in sides]

    @property
    def segments(self) -> tuple[int | None, ...]:
        """Those there are; None alone where there is one ranker for all."""
        return tuple(range(len(self._parts))) if self._is_segmented else (None,)

    @property
    def num_fused(self) -> int:
        """How many rankers are kernels."""
        return sum(one.fused is not None for one in self._parts)

    def logits(self, user_side: Features, slots: Tensor, segment: int | None = None) -> Tensor:
        """Users' sides [B, ...] and slots int64 [B, N] -> float32 [B, N, T], whatever it computes in.

        All users are of `segment`; where they are of several it is None, and the host waits for the device to see of
        which.
        """
        if self._is_segmented and segment is None:
            return self._whole(user_side, self._item_side.gather(slots)).float()
        part = self._parts[segment or 0]
        user = {name: tensor for name, tensor in user_side.items() if name != SEGMENT}
        if part.fused is not None:
            try:
                return part.fused(user, slots)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # of a compiler's many kinds
                if self._device.is_lost(error):
                    raise
                part.fused = None
                _log.warning("the ranker's program has no kernel here, torch ranks module by module: %s", error)
        return part.ranker(user, part.item_side.gather(slots)).float()

    def _as_program(self, ranker: Ranker, item_side: Features) -> DeviceRanker | None:
        """The ranker in one kernel, of products in half precision."""
        dtype = next((one.dtype for one in cast("nn.Module", ranker).parameters()), torch.float32)
        is_half = dtype in (torch.bfloat16, torch.float16)
        if not is_half or not hasattr(ranker, "program") or not triton.serves(self._device.where):
            return None
        return DeviceRanker(ranker, item_side, dtype)
