"""A ranker a segment of traffic: each request goes to that of its own context value, any other to the common one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from prerank.models.ranker import Ranker
from prerank.types import Features

SEGMENT = "segment"


class SegmentedRanker(nn.Module):
    """`rankers`, the common one first, all of one kind and width; the next ones are of `codes` of the category `by`.

    It is a `Ranker`: its item side holds every ranker's, named `<number>_<name>`, so it costs as many rows as there are
    rankers. Only rankers that a request of the batch goes to are run.
    """

    codes: Tensor

    def __init__(self, by: str, codes: Sequence[int], rankers: Sequence[Ranker]) -> None:
        super().__init__()
        assert len(rankers) == len(codes) + 1
        self.by = by
        self.rankers = nn.ModuleList(cast("Sequence[nn.Module]", rankers))
        self.tasks = rankers[0].tasks
        self.register_buffer("codes", torch.tensor(codes, dtype=torch.int64))

    def segment(self, context: Tensor) -> Tensor:
        """Codes of the category int [B] -> which ranker, int64 [B]; 0 is the common one."""
        own = context.long().unsqueeze(-1) == self.codes
        place = torch.arange(1, len(self.codes) + 1, device=context.device)
        return (own * place).sum(-1)

    def item_side(self, items: Features) -> dict[str, Tensor]:
        """Item features [I, ...] -> every ranker's item side [I, ...]."""
        sides = [(number, ranker.item_side(items)) for number, ranker in enumerate(self.each())]
        return {f"{number}_{name}": tensor for number, side in sides for name, tensor in side.items()}

    def user_side(self, user: Features) -> dict[str, Tensor]:
        """User and context features and counters [B, ...] -> each request's own ranker's [B, ...], and which it is."""
        segment = self.segment(user[self.by])
        found: dict[str, Tensor] = {}
        for number in sorted({int(one) for one in segment.tolist()}):
            rows = (segment == number).nonzero().squeeze(1)
            if len(rows) == len(segment):
                return self.each()[number].user_side(user) | {SEGMENT: segment}
            side = self.each()[number].user_side({name: column[rows] for name, column in user.items()})
            for name, tensor in side.items():
                whole = found.get(name, tensor.new_zeros(len(segment), *tensor.shape[1:]))
                found[name] = whole.index_copy(0, rows, tensor)
        return found | {SEGMENT: segment}

    def forward(self, user_side: Features, item_side: Features) -> Tensor:
        """The sides, items gathered [B, N, ...] -> logits float32 [B, N, T]."""
        segment = user_side[SEGMENT]
        user = {name: tensor for name, tensor in user_side.items() if name != SEGMENT}
        out: Tensor | None = None
        for number in sorted({int(one) for one in segment.tolist()}):
            items = of_segment(item_side, number)
            rows = (segment == number).nonzero().squeeze(1)
            if len(rows) == len(segment):
                return self.each()[number](user, items)
            mine, theirs = ({n: t[rows] for n, t in side.items()} for side in (user, items))
            logits = self.each()[number](mine, theirs)
            out = logits.new_zeros(len(segment), *logits.shape[1:]) if out is None else out
            out = out.index_copy(0, rows, logits)
        assert out is not None, "a batch has a request"
        return out

    def each(self) -> list[Ranker]:
        """The rankers by number, the common one first."""
        return cast("list[Ranker]", list(self.rankers))


def of_segment(item_side: Features, number: int) -> dict[str, Tensor]:
    """What of the item side [I, ...] of all is the ranker's of this number."""
    prefix = f"{number}_"
    return {name.removeprefix(prefix): tensor for name, tensor in item_side.items() if name.startswith(prefix)}
