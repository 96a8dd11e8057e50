"""Beyond two towers: user and item cross in the first layer, by experts that see how this user met this item.

Its first layer is split, W [u; i; c] = W_u u + W_i i + W_c c: the item's part is computed once a version, the user's
once a request, and a candidate adds the two rows, their product, and its own crossing features.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from prerank.config import Config
from prerank.kernels.program import Builder, Gather, Linear, OfUser, Program, Scale
from prerank.models.embedding import MLP
from prerank.models.layers import CrossExpert, Gate
from prerank.models.meeting import Meeting
from prerank.models.programs import emit_expert, emit_meeting, emit_mixes, emit_mlp, emit_norm
from prerank.models.towers import ItemTower, UserTower
from prerank.types import Features


class CrossFeatureRanker(nn.Module):
    """x = norm(x_u + x_i + W [x_u * x_i; c]); each task mixes cross experts of x by its gate, an MLP makes its logit.

    x_u and x_i are linear maps of a side's features, c what `Meeting` crosses. MMoE (Ma et al. 2018) over DCN V2
    (Wang et al. 2021); `models.layers` says where we differ.
    """

    def __init__(self, config: Config, sizes: Mapping[str, int]) -> None:
        super().__init__()
        options, schema = config.ranker, config.features
        width, count = options.width, options.experts
        self.tasks = tuple(config.tasks)
        self.item_input = ItemTower(schema, sizes, None, width, options.dropout)
        tables = self.item_input.tables
        self.user_input = UserTower(schema, sizes, tables, None, width, options.dropout)
        self.meeting = Meeting(schema, tables, options.crossings, options.heads, options.dropout)
        self.crossed = nn.Linear(width + self.meeting.width, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.experts = nn.ModuleList(CrossExpert(width, options.cross_layers, options.low_rank) for _ in range(count))
        self.gates = nn.ModuleList(Gate(width, options.hidden, count, options.dropout) for _ in self.tasks)
        self.heads = nn.ModuleList(MLP(width, options.hidden, 1, options.dropout) for _ in self.tasks)

    def item_side(self, items: Features) -> dict[str, Tensor]:
        """Item features [I, ...] -> x float32 [I, W], and what `Meeting` needs of an item."""
        return {"x": self.item_input(items), **self.meeting.item_side(items, self.item_input.tables)}

    def user_side(self, user: Features) -> dict[str, Tensor]:
        """User and context features and counters [B, ...] -> x float32 [B, W], and what `Meeting` needs of a user."""
        tables = self.item_input.tables
        return {"x": self.user_input(user, tables), **self.meeting.user_side(user, tables)}

    def forward(self, user_side: Features, item_side: Features) -> Tensor:
        """The sides, items gathered [B, N, ...] -> logits float32 [B, N, T]."""
        user, item = user_side["x"].unsqueeze(1), item_side["x"]
        met = [user * item]
        if self.meeting.width:
            met.append(self.meeting(user_side, item_side).to(item.dtype))
        x = self.norm(user + item + self.crossed(torch.cat(met, dim=-1)))
        experts = [expert(x) for expert in self.experts]
        pairs = zip(self.gates, self.heads, strict=True)
        return torch.cat([head(gate(x, experts)) for gate, head in pairs], dim=-1)

    def program(self) -> Program:
        """`forward` as steps."""
        builder, width = Builder(), self.norm.normalized_shape[0]
        item = builder.add(Gather(builder.register(width), "x"))
        met = builder.register(width + self.meeting.width)
        builder.add(Scale(met.columns(0, width), item, OfUser("x")))
        if self.meeting.width:
            emit_meeting(builder, self.meeting, met.columns(width, self.meeting.width))
        summed = Linear(builder.register(width), met, self.crossed.weight.detach(), OfUser("x"), add=item)
        x = emit_norm(builder, self.norm, builder.add(summed))
        experts = [emit_expert(builder, expert, x) for expert in self._experts()]
        mixes = emit_mixes(builder, [gate for gate in self.gates if isinstance(gate, Gate)], x, experts)
        logits = builder.register(len(self.tasks))
        for task, (head, mix) in enumerate(zip(self.heads, mixes, strict=True)):
            assert isinstance(head, MLP)
            emit_mlp(builder, head, mix, logits.columns(task, 1))
        return builder.program(logits)

    def _experts(self) -> list[CrossExpert]:
        return [expert for expert in self.experts if isinstance(expert, CrossExpert)]
