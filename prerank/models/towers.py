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
from prerank.models.embedding import FeatureEncoder, FeatureSum, HistoryPooling, counter_numbers
from prerank.schema import FeatureSchema, Kind, Owner
from prerank.types import Features


def owner_sizes(sizes: Mapping[str, int], owner: Owner) -> dict[str, int]:
    """The table rows of one owner's features by plain name, from `sizes` keyed "owner.name"."""
    return {key.partition(".")[2]: rows for key, rows in sizes.items() if key.startswith(f"{owner}.")}


def _encoder(
    kinds: Mapping[str, Kind],
    sizes: Mapping[str, int],
    hidden: tuple[int, ...] | None,
    out: int,
    dropout: float,
    beside: int = 0,
) -> FeatureSum:
    if hidden is None:
        return FeatureSum(kinds, sizes, out, dropout, beside)
    return FeatureEncoder(kinds, sizes, hidden, out, dropout, beside)


class ItemTower(nn.Module):
    """An item's features -> float32 [..., out]; `hidden` None leaves the MLP out, for experts to take its place."""

    def __init__(
        self, schema: FeatureSchema, sizes: Mapping[str, int], hidden: tuple[int, ...] | None, out: int, dropout: float
    ) -> None:
        super().__init__()
        self.encoder = _encoder(schema.item, owner_sizes(sizes, "item"), hidden, out, dropout)

    @property
    def tables(self) -> nn.ModuleDict:
        """The table of each category and bag, by feature name."""
        return self.encoder.tables

    def forward(self, items: Features) -> Tensor:
        """`items` of leading shape [...] -> [..., out]."""
        out: Tensor = self.encoder(items)
        return out


class UserTower(nn.Module):
    """Profile, context and ordered histories -> float32 [B, out].

    A history is looked up in the item tower's own table of the feature it is `of`: one table for input and output.
    Where that table is as wide as the output, the pooled history itself, scaled, is the vector the rest corrects.
    A counter by no item feature is one more number of the user.
    `hidden` None leaves the MLP out, as in `ItemTower`.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        sizes: Mapping[str, int],
        item_tables: nn.ModuleDict,
        hidden: tuple[int, ...] | None,
        out: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.histories = schema.histories()
        self.counters = {name: one for name, one in schema.interaction.items() if not one.by}
        widths = {name: _width(item_tables, history.of) for name, history in self.histories.items()}
        self.pooling = nn.ModuleDict(
            {name: HistoryPooling(h.length, widths[name], dropout) for name, h in self.histories.items()}
        )
        self.direct = [name for name, width in widths.items() if width == out]
        self.scale = nn.Parameter(torch.ones(len(self.direct)))
        kinds = {**schema.user, **schema.context}
        rows = {**owner_sizes(sizes, "user"), **owner_sizes(sizes, "context")}
        beside = sum(widths.values()) + len(widths) + len(self.counters)
        self.encoder = _encoder(kinds, rows, hidden, out, dropout, beside)

    def forward(self, user: Features, item_tables: nn.ModuleDict) -> Tensor:
        """User and context features [B, ...] and the item tower's tables -> [B, out]."""
        pooled: dict[str, Tensor] = {}
        lengths = []
        for name, history in self.histories.items():
            pooled[name] = self.pooling[name](user[name], item_tables[history.of])
            lengths.append((user[name] >= 0).sum(-1).float().log1p() / 2)
        lengths += counter_numbers(self.counters, user)
        start = [self.scale[n] * pooled[name] for n, name in enumerate(self.direct)]
        beside = torch.cat([*pooled.values(), torch.stack(lengths, dim=-1)], dim=-1) if lengths else None
        out: Tensor = self.encoder(user, beside, torch.stack(start).sum(0) if start else None)
        return out


def _width(item_tables: nn.ModuleDict, name: str) -> int:
    return _table(item_tables, name).embedding_dim


def _table(tables: nn.ModuleDict, name: str) -> nn.Embedding:
    table = tables[name]
    assert isinstance(table, nn.Embedding)
    return table


class TwoTower(nn.Module):
    """Similarity = user_side . item_side, for retrieval.

    With `retrieval.normalise` both vectors are of length one before the temperature divides (Yi et al. 2019, §3).
    The last column holds the popularity bias: items carry their bias, users carry 1.
    """

    def __init__(self, schema: FeatureSchema, sizes: Mapping[str, int], options: Retrieval) -> None:
        super().__init__()
        self.normalise = options.normalise
        self.temperature = options.temperature
        self.item_tower = ItemTower(schema, sizes, options.hidden, options.dim, options.dropout)
        tables = self.item_tower.tables
        self.user_tower = UserTower(schema, sizes, tables, options.hidden, options.dim, options.dropout)
        series = options.popularity.num_series
        self.popularity_weight = nn.Parameter(torch.full((series,), 0.5 / max(series, 1)))

    @property
    def width(self) -> int:
        """The width D of both sides, the popularity column included."""
        return self.item_tower.encoder.out + 1

    def user_vectors(self, user: Features) -> Tensor:
        """User and context features [B, ...] -> float32 [B, D - 1], temperature applied."""
        vectors: Tensor = self.user_tower(user, self.item_tower.tables)
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
        """Item features [I, ...] and popularity float32 [I, S] (`features.popularity`) -> float32 [I, D]."""
        return torch.cat([self.item_vectors(items), self.popularity_bias(popularity).unsqueeze(-1)], dim=-1)

    def popularity_bias(self, popularity: Tensor) -> Tensor:
        """Popularity float32 [..., S] -> the learned bias [...]; zeros where the funnel file asks for none."""
        return popularity @ self.popularity_weight


def build_towers(config: Config, sizes: Mapping[str, int]) -> TwoTower:
    """The towers a funnel file asks for; they read what lasts a version, no counter and no rate.

    `sizes` are the fitted transforms' table rows, keyed "owner.name".
    """
    return TwoTower(config.features.lasting(), sizes, config.retrieval)


def adopt_tables(tower: ItemTower, of: ItemTower) -> None:
    """The item tables of `of` as `tower`'s, which trains them no further; both are of one schema and its sizes."""
    for name, table in of.tables.items():
        own = _table(tower.tables, name)
        own.load_state_dict(table.state_dict())
        own.weight.requires_grad_(False)
