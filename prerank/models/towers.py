"""Two towers: user and item into one space, where a dot product says who suits whom.

Temperature, normalising and the popularity bias are folded into the vectors, so an index needs to know none of them.
A dot product cannot say how this user met this advertiser; that is a ranker's work.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from prerank.config import Config, Retrieval
from prerank.models.embedding import MLP, FeatureEncoder, HistoryPooling
from prerank.schema import FeatureSchema, Owner
from prerank.types import Features


def owner_sizes(sizes: Mapping[str, int], owner: Owner) -> dict[str, int]:
    """The table rows of one owner's features by plain name, from `sizes` keyed "owner.name"."""
    return {key.partition(".")[2]: rows for key, rows in sizes.items() if key.startswith(f"{owner}.")}


class ItemTower(nn.Module):
    """An item's features -> float32 [..., out]: a linear path of every feature plus an MLP beside it."""

    def __init__(
        self, schema: FeatureSchema, sizes: Mapping[str, int], hidden: tuple[int, ...], out: int, dropout: float
    ) -> None:
        super().__init__()
        self.encoder = FeatureEncoder(schema.item, owner_sizes(sizes, "item"))
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(self.encoder.width, out)
        self.mlp = MLP(self.encoder.width, hidden, out, dropout)

    def forward(self, items: Features) -> Tensor:
        """`items` of leading shape [...] -> [..., out]."""
        x = self.dropout(self.encoder(items))
        out: Tensor = self.linear(x) + self.mlp(x)
        return out


class UserTower(nn.Module):
    """Profile, context and ordered histories -> float32 [B, out].

    A history looks its items up in the item tower's own table of the feature it is `of` (one table for input and
    output), so that table must be passed to `forward`'s owner at construction.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        sizes: Mapping[str, int],
        item_tables: nn.ModuleDict,
        hidden: tuple[int, ...],
        out: int,
        dropout: float,
    ) -> None:
        super().__init__()
        kinds = {**schema.user, **schema.context}
        rows = {**owner_sizes(sizes, "user"), **owner_sizes(sizes, "context")}
        self.encoder = FeatureEncoder(kinds, rows)
        self.histories = schema.histories()
        widths = {name: _width(item_tables, history.of) for name, history in self.histories.items()}
        self.pooling = nn.ModuleDict({n: HistoryPooling(h.length, widths[n]) for n, h in self.histories.items()})
        pooled = sum(widths.values())
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(pooled, out, bias=False) if pooled else None
        self.mlp = MLP(self.encoder.width + pooled, hidden, out, dropout)

    def forward(self, user: Features, item_tables: nn.ModuleDict) -> Tensor:
        """User and context features [B, ...] and the item tower's tables -> [B, out]."""
        pooled = []
        for name, history in self.histories.items():
            rows = user[name].long()
            pooled.append(self.pooling[name](item_tables[history.of](rows.clamp_min(0)), rows >= 0))
        x = self.dropout(torch.cat([*pooled, self.encoder(user)] if self.encoder.width else pooled, dim=-1))
        out: Tensor = self.mlp(x)
        if self.linear is not None:
            out = out + self.linear(x[..., : self.linear.in_features])
        return out


def _width(item_tables: nn.ModuleDict, name: str) -> int:
    table = item_tables[name]
    assert isinstance(table, nn.Embedding)
    return table.embedding_dim


class TwoTower(nn.Module):
    """Similarity = user_side . item_side, for retrieval.

    With `retrieval.normalise` both vectors are of length one before the temperature divides (Yi et al. 2019, §3).
    The last column holds the popularity bias: items carry weight x popularity, users carry 1.
    """

    def __init__(self, schema: FeatureSchema, sizes: Mapping[str, int], options: Retrieval) -> None:
        super().__init__()
        self.normalise = options.normalise
        self.temperature = options.temperature
        self.item_tower = ItemTower(schema, sizes, options.hidden, options.dim, options.dropout)
        tables = self.item_tower.encoder.tables
        self.user_tower = UserTower(schema, sizes, tables, options.hidden, options.dim, options.dropout)
        self.popularity_weight = nn.Parameter(torch.tensor(float(options.popularity.weight)))
        self.popularity_weight.requires_grad_(options.popularity.weight != 0)

    @property
    def width(self) -> int:
        """The width D of both sides, the popularity column included."""
        return self.item_tower.linear.out_features + 1

    def user_vectors(self, user: Features) -> Tensor:
        """User and context features [B, ...] -> float32 [B, D - 1], temperature applied."""
        vectors: Tensor = self.user_tower(user, self.item_tower.encoder.tables)
        return (normalize(vectors, dim=-1) if self.normalise else vectors) / self.temperature

    def item_vectors(self, items: Features) -> Tensor:
        """Item features [I, ...] -> float32 [I, D - 1], without the popularity column."""
        vectors: Tensor = self.item_tower(items)
        return normalize(vectors, dim=-1) if self.normalise else vectors

    def user_side(self, user: Features) -> Tensor:
        """User and context features [B, ...] -> float32 [B, D]."""
        vectors = self.user_vectors(user)
        return torch.cat([vectors, vectors.new_ones(*vectors.shape[:-1], 1)], dim=-1)

    def item_side(self, items: Features, popularity: Tensor) -> Tensor:
        """Item features [I, ...] and their popularity float32 [I] (see `features.popularity`) -> float32 [I, D]."""
        bias = self.popularity_weight * popularity
        return torch.cat([self.item_vectors(items), bias.unsqueeze(-1)], dim=-1)


def build_towers(config: Config, sizes: Mapping[str, int]) -> TwoTower:
    """The towers a funnel file asks for; `sizes` are the fitted transforms' table rows, keyed "owner.name"."""
    return TwoTower(config.features, sizes, config.retrieval)
