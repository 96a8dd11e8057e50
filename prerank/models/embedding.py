"""Encoded features to one wide vector: a table per category and bag, numbers as they are, histories pooled.

Which values mean what is the transforms' business; here an index is only a row of a table, 0 the unknown one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from prerank.schema import Bag, Category, Counter, Embedding, Kind, Number, Rate
from prerank.types import Features


def _table(rows: int, width: int) -> nn.Embedding:
    table = nn.Embedding(rows, width)
    nn.init.normal_(table.weight, std=0.05)
    return table


def masked_mean(vectors: Tensor, present: Tensor) -> Tensor:
    """The mean over M of `vectors` float [..., M, D] where `present` bool [..., M]; zeros where none is -> [..., D]."""
    weights = present.to(vectors.dtype)
    total = torch.einsum("...md,...m->...d", vectors, weights)
    return total / weights.sum(-1, keepdim=True).clamp_min(1.0)


def counter_numbers(counters: Mapping[str, Counter], user: Features) -> list[Tensor]:
    """Of each counter by no item feature float32 [B]: log(1 + count), or of a share its log odds as they are."""
    return [user[name].float() if one.share else user[name].float().log1p() for name, one in counters.items()]


class FeatureSum(nn.Module):
    """One owner's features as one vector x of `out` numbers; histories and values are left out.

    `kinds` are the features by name, `sizes` the table rows of each category and bag, the unknown row included.
    x = the sum of tables already `out` wide + a linear map of all other features. A category as wide as the output is
    thus its own vector, which a history of it can share.
    """

    def __init__(
        self, kinds: Mapping[str, Kind], sizes: Mapping[str, int], out: int, dropout: float, beside: int = 0
    ) -> None:
        super().__init__()
        self.categories = [n for n, k in kinds.items() if isinstance(k, Category)]
        self.bags = [n for n, k in kinds.items() if isinstance(k, Bag)]
        self.numbers = [n for n, k in kinds.items() if isinstance(k, Number | Rate)]
        self.embeddings = [n for n, k in kinds.items() if isinstance(k, Embedding)]
        self.out = out
        self.dropout = Dropout(dropout)
        self.tables = nn.ModuleDict()
        rest = len(self.numbers) + beside
        for name, kind in kinds.items():
            if isinstance(kind, Category | Bag):
                self.tables[name] = _table(sizes[name], kind.dim)
                rest += kind.dim if kind.dim != out else 0
            elif isinstance(kind, Embedding):
                rest += kind.width
        self.rest = rest
        self.linear = nn.Linear(rest, out) if rest else None

    def forward(self, features: Features, beside: Tensor | None = None, start: Tensor | None = None) -> Tensor:
        """`features` of leading shape [...] -> float32 [..., out].

        `beside` float [..., beside] are further inputs, `start` float [..., out] is added to the sum.
        """
        return self.summed(features, beside, start)[0]

    def summed(self, features: Features, beside: Tensor | None, start: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x float32 [..., out], and all that was not as wide as it, [..., rest]; None where there is none."""
        direct, rest = self._gathered(features)
        if beside is not None:
            rest.append(beside)
        others = torch.cat(rest, dim=-1) if rest else None
        if others is not None and self.linear is not None:
            direct.append(self.linear(others))
        if start is not None:
            direct.append(start)
        return torch.stack(direct).sum(0) if len(direct) > 1 else direct[0], others

    def _gathered(self, features: Features) -> tuple[list[Tensor], list[Tensor]]:
        """The vectors as wide as the output, and everything else."""
        vectors = [self.dropout(self.tables[name](features[name].long())) for name in self.categories]
        for name in self.bags:
            members = features[name].long()
            vectors.append(masked_mean(self.tables[name](members.clamp_min(0)), members >= 0))
        direct = [v for v in vectors if v.shape[-1] == self.out]
        rest = [v for v in vectors if v.shape[-1] != self.out]
        rest += [features[name].float() for name in self.embeddings]
        if self.numbers:
            rest.append(torch.stack([features[name].float() for name in self.numbers], dim=-1))
        return direct, rest


class FeatureEncoder(FeatureSum):
    """x of `FeatureSum` and an MLP beside it: x + MLP(x and everything that is not as wide as x)."""

    def __init__(
        self,
        kinds: Mapping[str, Kind],
        sizes: Mapping[str, int],
        hidden: tuple[int, ...],
        out: int,
        dropout: float,
        beside: int = 0,
    ) -> None:
        super().__init__(kinds, sizes, out, dropout, beside)
        self.mlp = MLP(self.rest + out, hidden, out, dropout)

    def forward(self, features: Features, beside: Tensor | None = None, start: Tensor | None = None) -> Tensor:
        """As `FeatureSum.forward`."""
        x, others = self.summed(features, beside, start)
        out: Tensor = x + self.mlp(x if others is None else torch.cat([x, others], dim=-1))
        return out


class Dropout(nn.Module):
    """Whole embedding rows are zeroed at `rate`, the kept ones scaled up, so that no id is relied on alone."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, vectors: Tensor) -> Tensor:
        """float [..., D] -> [..., D]; the identity when not training."""
        if not self.training or not self.rate:
            return vectors
        kept = torch.rand(vectors.shape[:-1], device=vectors.device) >= self.rate
        return vectors * (kept / (1 - self.rate)).unsqueeze(-1)


class HistoryPooling(nn.Module):
    """An ordered history as one vector: a softmax over learned weights of position and of content pools its items.

    The content part is attention with a learned query, one number an item of the table (Yang et al. 2016, eq. 5-7,
    without the tanh layer). In training each event is hidden at the dropout rate.
    """

    def __init__(self, length: int, width: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        ages = torch.arange(length - 1, -1, -1, dtype=torch.float32)
        self.position = nn.Parameter(-ages / length)
        self.query = nn.Parameter(torch.zeros(width))

    def forward(self, rows: Tensor, table: nn.Embedding) -> Tensor:
        """rows int [B, L] of `table`, newest last, -1 where there is none -> float [B, D]; zeros for no history."""
        present = rows >= 0
        if self.training and self.dropout:
            present = present & (torch.rand(present.shape, device=present.device) >= self.dropout)
        place = rows.long().clamp_min(0)
        weight_logits = self.position + (table.weight @ self.query)[place]
        # a row of padding alone would be a softmax over -inf; the finite floor keeps it defined and the mask zeroes it
        floor = torch.finfo(weight_logits.dtype).min
        weights = weight_logits.masked_fill(~present, floor).softmax(-1) * present
        # pools without ever holding [B, L, D]
        return embedding_bag(place, table.weight, per_sample_weights=weights, mode="sum")


class MLP(nn.Sequential):
    """Linear layers of the `hidden` widths with GELU and dropout between, then one to `out`."""

    def __init__(self, width: int, hidden: tuple[int, ...], out: int, dropout: float) -> None:
        layers: list[nn.Module] = []
        for h in hidden:
            layers += [nn.Linear(width, h), nn.GELU(), nn.Dropout(dropout)]
            width = h
        super().__init__(*layers, nn.Linear(width, out))
