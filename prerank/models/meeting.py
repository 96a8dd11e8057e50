"""What crosses user and item before anything is averaged: target attention over histories, and matches.

Everything a side can know alone is computed with the side; a candidate costs a gather, a few dot products and counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from prerank.config import Crossing
from prerank.models.attention import TargetAttention
from prerank.models.matching import Matching
from prerank.schema import FeatureSchema
from prerank.types import Features


class Meeting(nn.Module):
    """The crossing features `crossings` ask for, [B, N, C]; `tables` are the item tower's own.

    "attention": of each history, what `TargetAttention` makes of it for the candidate. "matches": `Matching`'s counts.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        tables: nn.ModuleDict,
        crossings: Sequence[Crossing],
        heads: int,
        dropout: float,
    ) -> None:
        super().__init__()
        histories = schema.histories() if "attention" in crossings else {}
        self.of = {name: history.of for name, history in histories.items()}
        self.attention = nn.ModuleDict()
        for name, history in histories.items():
            width = _table(tables, history.of).embedding_dim
            dim = max(1, width // (2 * heads))
            self.attention[name] = TargetAttention(history.length, width, heads, dim, dropout)
        self.matching = Matching(schema) if "matches" in crossings else None

    @property
    def width(self) -> int:
        """C."""
        attended = sum(one.width for one in self.attention.values() if isinstance(one, TargetAttention))
        return attended + (self.matching.width if self.matching is not None else 0)

    def item_side(self, items: Features, tables: nn.ModuleDict) -> dict[str, Tensor]:
        """Item features [I, ...] -> queries and codes [I, ...]."""
        out = {} if self.matching is None else self.matching.item_side(items)
        for name, attention in self.attention.items():
            assert isinstance(attention, TargetAttention)
            out[f"query_{name}"] = attention.queries(tables[self.of[name]](items[self.of[name]].long()))
        return out

    def user_side(self, user: Features, tables: nn.ModuleDict) -> dict[str, Tensor]:
        """Histories and counters [B, ...] -> keys, values and codes [B, ...]."""
        out = {} if self.matching is None else self.matching.user_side(user)
        for name, attention in self.attention.items():
            assert isinstance(attention, TargetAttention)
            table = _table(tables, self.of[name]).weight
            named = zip(("key", "value", "bias"), attention.keys(user[name], table), strict=True)
            out |= {f"{part}_{name}": tensor for part, tensor in named}
        return out

    def forward(self, user_side: Features, item_side: Features) -> Tensor:
        """The sides, items gathered [B, N, ...] -> [B, N, C]."""
        parts = []
        for name, attention in self.attention.items():
            sides = (user_side[f"{part}_{name}"] for part in ("key", "value", "bias"))
            parts.append(attention(item_side[f"query_{name}"], *sides))
        if self.matching is not None:
            parts.append(torch.stack(self.matching(user_side, item_side), dim=-1))
        return torch.cat(parts, dim=-1)


def _table(tables: nn.ModuleDict, name: str) -> nn.Embedding:
    table = tables[name]
    assert isinstance(table, nn.Embedding)
    return table
