"""Encoded features to one wide vector: a table per category and bag, numbers as they are, histories pooled.

Which values mean what is the transforms' business; here an index is only a row of a table, 0 the unknown one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from prerank.schema import Bag, Category, Embedding, Kind, Number
from prerank.types import Features


def _table(rows: int, width: int) -> nn.Embedding:
    table = nn.Embedding(rows, width)
    nn.init.normal_(table.weight, std=width**-0.5)
    return table


def masked_mean(vectors: Tensor, present: Tensor) -> Tensor:
    """The mean over M of `vectors` float [..., M, D] where `present` bool [..., M]; zeros where none is -> [..., D]."""
    weights = present.to(vectors.dtype)
    total = torch.einsum("...md,...m->...d", vectors, weights)
    return total / weights.sum(-1, keepdim=True).clamp_min(1.0)


class FeatureEncoder(nn.Module):
    """One owner's features concatenated -> float32 [..., width]; histories and values are left out.

    `kinds` are the features by name, `sizes` the table rows of each category and bag, the unknown row included.
    """

    def __init__(self, kinds: Mapping[str, Kind], sizes: Mapping[str, int]) -> None:
        super().__init__()
        self.categories = [n for n, k in kinds.items() if isinstance(k, Category)]
        self.bags = [n for n, k in kinds.items() if isinstance(k, Bag)]
        self.numbers = [n for n, k in kinds.items() if isinstance(k, Number)]
        self.embeddings = [n for n, k in kinds.items() if isinstance(k, Embedding)]
        self.tables = nn.ModuleDict()
        self.width = len(self.numbers)
        for name, kind in kinds.items():
            if isinstance(kind, Category | Bag):
                self.tables[name] = _table(sizes[name], kind.dim)
                self.width += kind.dim
            elif isinstance(kind, Embedding):
                self.width += kind.width

    def forward(self, features: Features) -> Tensor:
        """`features` with leading shape [...] -> float32 [..., width]."""
        parts = [self.tables[name](features[name].long()) for name in self.categories]
        for name in self.bags:
            members = features[name].long()
            parts.append(masked_mean(self.tables[name](members.clamp_min(0)), members >= 0))
        parts += [features[name].float() for name in self.embeddings]
        if self.numbers:
            parts.append(torch.stack([features[name].float() for name in self.numbers], dim=-1))
        return torch.cat(parts, dim=-1)


class HistoryPooling(nn.Module):
    """An ordered history as one vector: softmax over learned weights of position (newest last) and of content.

    vectors float [B, L, D], present bool [B, L] -> float [B, D]; zeros for an empty history.
    The content part is additive attention with a learned query (Yang et al. 2016, eq. 5-7), without its tanh layer.
    """

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        ages = torch.arange(length - 1, -1, -1, dtype=torch.float32)
        self.position = nn.Parameter(-ages / max(length, 1))
        self.content = nn.Linear(width, 1, bias=False)
        nn.init.zeros_(self.content.weight)

    def forward(self, vectors: Tensor, present: Tensor) -> Tensor:
        """See the class."""
        weight_logits = self.position + self.content(vectors).squeeze(-1)
        # an all-padding row would be softmax over -inf; the finite floor keeps it defined and the mask zeroes it
        weights = weight_logits.masked_fill(~present, torch.finfo(vectors.dtype).min).softmax(-1) * present
        return torch.einsum("bld,bl->bd", vectors, weights)


class MLP(nn.Sequential):
    """Linear layers of the `hidden` widths with ReLU and dropout between, then one to `out`."""

    def __init__(self, width: int, hidden: tuple[int, ...], out: int, dropout: float) -> None:
        layers: list[nn.Module] = []
        for h in hidden:
            layers += [nn.Linear(width, h), nn.ReLU(), nn.Dropout(dropout)]
            width = h
        super().__init__(*layers, nn.Linear(width, out))
