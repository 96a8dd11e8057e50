"""A ranker's forward, run from its program over the item side that a scorer holds: natively, or on its device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from prerank.kernels.device_program import DeviceProgram
from prerank.kernels.engine import Engine, NativeProgram
from prerank.kernels.program import Program, of_request
from prerank.models.programs import Programmed
from prerank.models.ranker import Ranker
from prerank.models.segmented import SEGMENT, SegmentedRanker, of_segment
from prerank.types import Features


class NativeRanker:
    """What `ranker` gives on rows of `item_side` [I, ...], but for bfloat16's rounding; of one a segment, each its own.

    The tables are used as `NativeProgram` says; the weights are those of now.
    """

    def __init__(self, ranker: Ranker, item_side: Features, engine: Engine) -> None:
        self.tasks = ranker.tasks
        self._programs = [NativeProgram(program, side, engine) for program, side in _programs(ranker, item_side)]

    def __call__(self, user_side: Features, rows: Tensor) -> Tensor:
        """A batch's user side [B, ...] and rows int64 [B, N] -> logits float32 [B, N, T]. Raises IndexError."""
        found = []
        for number, own in enumerate(rows):
            user = of_request(user_side, number)
            segment = int(user[SEGMENT]) if SEGMENT in user else 0
            found.append(self._programs[segment](user, own))
        return torch.stack(found) if found else torch.zeros(*rows.shape, len(self.tasks))

    def update(self, rows: Tensor) -> None:
        """Read rows int64 [n] of the item side again; see `NativeProgram.update`."""
        for one in self._programs:
            one.update(rows)


class DeviceRanker:
    """The same on the device of `item_side`, products in `dtype`: requests of one segment in one launch.

    Beside `NativeRanker` for a scorer on a GPU; `DeviceProgram` says what it does elsewhere, and to the tables.
    """

    def __init__(self, ranker: Ranker, item_side: Features, dtype: torch.dtype = torch.bfloat16) -> None:
        self.tasks = ranker.tasks
        self._programs = [DeviceProgram(program, side, dtype) for program, side in _programs(ranker, item_side)]

    def __call__(self, user_side: Features, rows: Tensor) -> Tensor:
        """A batch's user side [B, ...] and rows int64 [B, N] -> logits float32 [B, N, T].

        A row that is not there gets NaN. Only where there are segments does the host wait for the device, to read them.
        """
        if SEGMENT not in user_side:
            return self._programs[0](user_side, rows)
        segments: list[int] = user_side[SEGMENT].tolist()
        if len(set(segments)) == 1:
            return self._programs[segments[0]](user_side, rows)
        logits = torch.empty(*rows.shape, len(self.tasks), device=rows.device)
        for number in sorted(set(segments)):
            own = torch.tensor([place for place, one in enumerate(segments) if one == number], device=rows.device)
            user = {name: tensor[own] for name, tensor in user_side.items()}
            logits[own] = self._programs[number](user, rows[own])
        return logits

    def update(self, rows: Tensor) -> None:
        """Read rows int64 [n] of the item side again; see `DeviceProgram.update`."""
        for one in self._programs:
            one.update(rows)


def _programs(ranker: Ranker, item_side: Features) -> Iterator[tuple[Program, Features]]:
    """Of each segment its program and its own item side."""
    if not isinstance(ranker, SegmentedRanker):
        yield cast("Programmed", ranker).program(), item_side
        return
    for number, one in enumerate(ranker.each()):
        yield cast("Programmed", one).program(), of_segment(item_side, number)
