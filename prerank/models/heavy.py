"""The heavy ranker: everything of user and item together, for few candidates and for teaching the lightweight one.

It costs what a lightweight ranker may not: every layer but the sides' own runs for every pair.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from prerank.config import Config, HeavyRankerConfig
from prerank.errors import ConfigError
from prerank.models.embedding import MLP, counter_numbers
from prerank.models.layers import CrossExpert, Gate
from prerank.models.meeting import Meeting
from prerank.models.towers import ItemTower, UserTower
from prerank.schema import Number, Rate
from prerank.types import Features


class HeavyRanker(nn.Module):
    """z = [x_u; x_i; x_u * x_i; n; c], normalised; cross experts of a linear map of z and MLP experts of z, by task.

    x_u and x_i are maps of a side's features, as wide as each other, n all numbers, rates and counters of both sides as
    they are, c what `Meeting` crosses: target attention over histories (Zhou et al. 2018), matches and counters. Cross
    networks (Wang et al. 2021) and deep ones stand side by side as experts of one gate a task (Ma et al. 2018). It is a
    `Ranker`.
    """

    def __init__(self, config: Config, sizes: Mapping[str, int]) -> None:
        super().__init__()
        options, schema = _options(config), config.features
        side = max(options.width // 2, 1)
        count, width = options.experts, options.width
        self.tasks = tuple(config.tasks)
        self.item_input = ItemTower(schema, sizes, None, side, options.id_dropout)
        tables = self.item_input.tables
        self.user_input = UserTower(schema, sizes, tables, None, side, options.id_dropout)
        self.meeting = Meeting(schema, tables, options.crossings, options.heads, options.dropout)
        self.numbers = {
            "item": [name for name, kind in schema.item.items() if isinstance(kind, Number | Rate)],
            "user": [name for name, kind in {**schema.user, **schema.context}.items() if isinstance(kind, Number)],
        }
        self.counters = {name: counter for name, counter in schema.interaction.items() if not counter.by}
        numbers = sum(map(len, self.numbers.values())) + len(self.counters)
        together = 3 * side + numbers + self.meeting.width
        self.norm = nn.LayerNorm(together)
        self.dropout = nn.Dropout(options.dropout)
        self.linear = nn.Linear(together, width)
        self.crossing = nn.ModuleList(CrossExpert(width, options.cross_layers, options.low_rank) for _ in range(count))
        self.deep = nn.ModuleList(MLP(together, options.hidden, width, options.dropout) for _ in range(count))
        self.gates = nn.ModuleList(Gate(width, (), 2 * count, options.dropout) for _ in self.tasks)
        self.heads = nn.ModuleList(nn.Linear(width, 1) for _ in self.tasks)

    def item_side(self, items: Features) -> dict[str, Tensor]:
        """Item features [I, ...] -> x float32 [I, W / 2], numbers, and what `Meeting` needs of an item."""
        numbers = _stacked([items[name].float() for name in self.numbers["item"]], items)
        return {
            "x": self.item_input(items),
            "numbers": numbers,
            **self.meeting.item_side(items, self.item_input.tables),
        }

    def user_side(self, user: Features) -> dict[str, Tensor]:
        """User and context features, counters [B, ...] -> x float32 [B, W / 2], numbers, and what `Meeting` needs."""
        tables = self.item_input.tables
        numbers = [user[name].float() for name in self.numbers["user"]]
        numbers += counter_numbers(self.counters, user)
        return {
            "x": self.user_input(user, tables),
            "numbers": _stacked(numbers, user),
            **self.meeting.user_side(user, tables),
        }

    def forward(self, user_side: Features, item_side: Features) -> Tensor:
        """The sides, items gathered [B, N, ...] -> logits float32 [B, N, T]."""
        item = item_side["x"]
        user = user_side["x"].unsqueeze(1).expand_as(item)
        numbers = user_side["numbers"].unsqueeze(1).expand(-1, item.shape[1], -1)
        parts = [item, user, item * user, item_side["numbers"], numbers]
        if self.meeting.width:
            parts.append(self.meeting(user_side, item_side))
        z = self.norm(torch.cat(parts, dim=-1))
        x = self.linear(self.dropout(z))
        experts = [*(one(x) for one in self.crossing), *(one(z) for one in self.deep)]
        pairs = zip(self.gates, self.heads, strict=True)
        return torch.cat([head(gate(x, experts)) for gate, head in pairs], dim=-1)


def _stacked(numbers: Sequence[Tensor], like: Features) -> Tensor:
    """Numbers float [...] each -> [..., F]; F may be 0."""
    if numbers:
        return torch.stack(list(numbers), dim=-1)
    first = next(iter(like.values()))
    return torch.zeros(len(first), 0, device=first.device)


def _options(config: Config) -> HeavyRankerConfig:
    if config.heavy_ranker is None:
        raise ConfigError("heavy_ranker: missing; a teacher needs the section [heavy_ranker], if an empty one")
    return config.heavy_ranker
