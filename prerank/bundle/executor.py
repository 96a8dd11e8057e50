"""A ranker's forward, run natively from its program over the item side that a scorer holds."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from prerank.kernels.engine import Engine, NativeProgram
from prerank.kernels.program import of_request
from prerank.models.programs import Programmed
from prerank.models.ranker import Ranker
from prerank.models.segmented import SEGMENT, SegmentedRanker
from prerank.types import Features


class NativeRanker:
    """What `ranker` gives on rows of `item_side` [I, ...], but for bfloat16's rounding; of one a segment, each its own.

    The tables are used as `NativeProgram` says; the weights are those of now.
    """

    def __init__(self, ranker: Ranker, item_side: Features, engine: Engine) -> None:
        self.tasks = ranker.tasks
        rankers, sides = [ranker], [item_side]
        if isinstance(ranker, SegmentedRanker):
            rankers = ranker.each()
            sides = [_of_segment(item_side, number) for number in range(len(rankers))]
        programs = [cast("Programmed", one).program() for one in rankers]
        self._programs = [NativeProgram(one, side, engine) for one, side in zip(programs, sides, strict=True)]

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


def _of_segment(item_side: Features, number: int) -> dict[str, Tensor]:
    prefix = f"{number}_"
    return {name.removeprefix(prefix): tensor for name, tensor in item_side.items() if name.startswith(prefix)}
