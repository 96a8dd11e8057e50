"""The first ranker: one dot product a task between a user and an item vector, trained on real labels.

It sees what each side is, never how the two met; the rankers that cross features take its place.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from prerank.config import Config
from prerank.kernels.program import Program
from prerank.models.layers import VECTORS, task_logits
from prerank.models.programs import dots_program
from prerank.models.towers import ItemTower, UserTower
from prerank.types import Features


class TwoTowerRanker(nn.Module):
    """logit[t] = u_t . v_t / sqrt(D) + user bias[t] + item bias[t]."""

    def __init__(self, config: Config, sizes: Mapping[str, int]) -> None:
        super().__init__()
        options = config.ranker
        self.tasks = tuple(config.tasks)
        self.dim = options.dim
        width = len(self.tasks) * (self.dim + 1)
        self.item_tower = ItemTower(config.features, sizes, options.hidden, width, options.dropout)
        tables = self.item_tower.tables
        self.user_tower = UserTower(config.features, sizes, tables, options.hidden, width, options.dropout)

    def item_side(self, items: Features) -> dict[str, Tensor]:
        """Item features [I, ...] -> vectors float32 [I, T (D + 1)]: each task's vector, then each task's bias."""
        return {VECTORS: self.item_tower(items)}

    def user_side(self, user: Features) -> dict[str, Tensor]:
        """User and context features [B, ...] -> vectors float32 [B, T (D + 1)], laid out as the item side."""
        return {VECTORS: self.user_tower(user, self.item_tower.tables)}

    def forward(self, user_side: Features, item_side: Features) -> Tensor:
        """vectors [B, T (D + 1)] and [B, N, T (D + 1)] -> logits float32 [B, N, T]."""
        return task_logits(user_side[VECTORS], item_side[VECTORS], len(self.tasks))

    def program(self) -> Program:
        """`forward` as steps."""
        return dots_program(VECTORS, len(self.tasks), self.dim)
