"""How this user met *this* item: how often the candidate's own category is among what the user did.

Counts are whole numbers, so every device and every batch size gives the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prerank.schema import Bag, FeatureSchema
from prerank.types import Features

_CELLS_AT_ONCE = 1 << 24


def count_matches(codes: Tensor, wanted: Tensor) -> Tensor:
    """How many of `codes` int [B, L] are each of `wanted` int [B, N] -> float32 [B, N].

    Of a bag `wanted` is [B, N, M], and the matches of its members are added. What is not positive (0 is unknown, -1 no
    code at all) matches nothing: two unknown authors are not one.
    """
    if wanted.dim() == 3:
        return count_matches(codes, wanted.flatten(1)).view(wanted.shape).sum(-1)
    codes = torch.where(codes > 0, codes, -1)
    wanted = torch.where(wanted > 0, wanted, -2)
    rows = max(1, _CELLS_AT_ONCE // max(1, codes.numel()))
    chunks = wanted.split(rows, 1)  # type: ignore[no-untyped-call]
    parts = [(chunk.unsqueeze(-1) == codes.unsqueeze(1)).sum(-1, dtype=torch.float32) for chunk in chunks]
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


class Matching(nn.Module):
    """A number a history, a counter by an item feature and a bag of one: log(1 + matches), in their order.

    `names` are those histories, counters and bags, `of` the item features their codes are of.
    """

    def __init__(self, schema: FeatureSchema) -> None:
        super().__init__()
        by = {name: history.of for name, history in schema.histories().items()}
        by |= {name: counter.by for name, counter in schema.interaction.items() if counter.by}
        requested = {**schema.user, **schema.context}
        self.by = by | {name: kind.of for name, kind in requested.items() if isinstance(kind, Bag) and kind.of}
        self.names = list(self.by)
        self.of = list(dict.fromkeys(self.by.values()))

    @property
    def width(self) -> int:
        """F."""
        return len(self.names)

    def user_side(self, user: Features) -> dict[str, Tensor]:
        """The codes of each, as they came: int [B, L]."""
        return {f"codes_{name}": user[name] for name in self.names}

    def item_side(self, items: Features) -> dict[str, Tensor]:
        """Each item's own codes, as they came: int [I] or [I, M]."""
        return {f"of_{name}": items[name] for name in self.of}

    def forward(self, user_side: Features, item_side: Features) -> list[Tensor]:
        """The sides, items gathered [B, N, ...] -> F float32 [B, N]."""
        return [
            count_matches(user_side[f"codes_{name}"], item_side[f"of_{self.by[name]}"]).log1p() for name in self.names
        ]
