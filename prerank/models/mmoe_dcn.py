"""Two towers of cross experts: each task mixes, by its own gate, experts that multiply a side's features together.

It crosses the features of one side with each other, never the user's with the item's.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from prerank.config import Config, RankerConfig
from prerank.kernels.program import Program
from prerank.models.layers import VECTORS, CrossExpert, Gate, TaskHeads, task_logits
from prerank.models.programs import dots_program
from prerank.models.towers import ItemTower, UserTower
from prerank.types import Features


class CrossTower(nn.Module):
    """x -> each task's vector and bias: `experts` of `CrossExpert`, shared, and an MLP gate a task."""

    def __init__(self, options: RankerConfig, num_tasks: int) -> None:
        super().__init__()
        width, count = options.width, options.experts
        self.experts = nn.ModuleList(CrossExpert(width, options.cross_layers, options.low_rank) for _ in range(count))
        self.gates = nn.ModuleList(Gate(width, options.hidden, count, options.dropout) for _ in range(num_tasks))
        self.heads = TaskHeads(width, num_tasks, options.dim)

    def forward(self, x: Tensor) -> Tensor:
        """float [..., W] -> [..., T (D + 1)]."""
        experts = [expert(x) for expert in self.experts]
        out: Tensor = self.heads([gate(x, experts) for gate in self.gates])
        return out


class MMoEDCNRanker(nn.Module):
    """logit[t] = u_t . v_t / sqrt(D) + user bias[t] + item bias[t], both sides by a `CrossTower`.

    MMoE (Ma et al. 2018) over the cross layers of DCN V2 (Wang et al. 2021); `models.layers` says where we differ.
    """

    def __init__(self, config: Config, sizes: Mapping[str, int]) -> None:
        super().__init__()
        options = config.ranker
        self.tasks = tuple(config.tasks)
        self.dim = options.dim
        self.item_input = ItemTower(config.features, sizes, None, options.width, options.dropout)
        tables = self.item_input.tables
        self.user_input = UserTower(config.features, sizes, tables, None, options.width, options.dropout)
        self.item_tower = CrossTower(options, len(self.tasks))
        self.user_tower = CrossTower(options, len(self.tasks))

    def item_side(self, items: Features) -> dict[str, Tensor]:
        """Item features [I, ...] -> vectors float32 [I, T (D + 1)]: each task's vector, then each task's bias."""
        return {VECTORS: self.item_tower(self.item_input(items))}

    def user_side(self, user: Features) -> dict[str, Tensor]:
        """User and context features [B, ...] -> vectors float32 [B, T (D + 1)], laid out as the item side."""
        return {VECTORS: self.user_tower(self.user_input(user, self.item_input.tables))}

    def forward(self, user_side: Features, item_side: Features) -> Tensor:
        """vectors [B, T (D + 1)] and [B, N, T (D + 1)] -> logits float32 [B, N, T]."""
        return task_logits(user_side[VECTORS], item_side[VECTORS], len(self.tasks))

    def program(self) -> Program:
        """`forward` as steps."""
        return dots_program(VECTORS, len(self.tasks), self.dim)
