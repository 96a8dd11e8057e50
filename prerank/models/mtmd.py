"""Many tasks, many domains: two towers of MLP experts, some shared, some a task's own, some the domain's own.

The domain is a context feature, such as the surface of the request; only the user's side may know it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from prerank.config import Config, RankerConfig
from prerank.kernels.program import Program
from prerank.models.embedding import MLP
from prerank.models.layers import VECTORS, Gate, TaskHeads, task_logits
from prerank.models.programs import dots_program
from prerank.models.towers import ItemTower, UserTower
from prerank.types import Features


class DomainExperts(nn.Module):
    """One MLP a domain, index 0 that of every unknown one; each row is given to its own domain's.

    In training a row is given to the unknown domain's at the dropout rate, which so learns from all domains: without
    it a domain first seen when serving would meet weights that never learned.
    """

    def __init__(self, num_domains: int, width: int, hidden: tuple[int, ...], dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.experts = nn.ModuleList(MLP(width, hidden, width, dropout) for _ in range(num_domains))

    def forward(self, x: Tensor, domain: Tensor) -> Tensor:
        """x float [B, W] and category indices int [B] -> [B, W]. Only the experts of domains in the batch run."""
        if self.training and self.dropout:
            domain = domain.masked_fill(torch.rand(domain.shape, device=domain.device) < self.dropout, 0)
        out = torch.zeros_like(x)
        for index in sorted(set(domain.tolist())):
            rows = (domain == index).nonzero().squeeze(1)
            out = out.index_copy(0, rows, self.experts[index](x[rows]))
        return out


class ExpertTower(nn.Module):
    """x -> each task's vector and bias: its gate mixes `experts` shared ones, the task's own, and the domain's own.

    `num_domains` 0 leaves the last out. Shared and own experts under one gate are the CGC of Tang et al. 2020 (PLE).
    """

    def __init__(self, options: RankerConfig, num_tasks: int, num_domains: int = 0) -> None:
        super().__init__()
        width, hidden, dropout = options.width, options.hidden, options.dropout
        self.shared = nn.ModuleList(MLP(width, hidden, width, dropout) for _ in range(options.experts))
        self.own = nn.ModuleList(MLP(width, hidden, width, dropout) for _ in range(num_tasks))
        self.domains = DomainExperts(num_domains, width, hidden, dropout) if num_domains else None
        mixed = options.experts + 1 + (self.domains is not None)
        self.gates = nn.ModuleList(Gate(width, (), mixed, dropout) for _ in range(num_tasks))
        self.heads = TaskHeads(width, num_tasks, options.dim)

    def forward(self, x: Tensor, domain: Tensor | None = None) -> Tensor:
        """x float [..., W], and int [B] with domains -> [..., T (D + 1)]."""
        common = [expert(x) for expert in self.shared]
        if self.domains is not None:
            assert domain is not None
            common.append(self.domains(x, domain))
        pairs = zip(self.gates, self.own, strict=True)
        out: Tensor = self.heads([gate(x, [*common, own(x)]) for gate, own in pairs])
        return out


class MTMDRanker(nn.Module):
    """logit[t] = u_t . v_t / sqrt(D) + user bias[t] + item bias[t], both sides by an `ExpertTower`.

    After the multi-task multi-domain ranker of Yang et al. 2025 (MTMD, arXiv:2510.09857) in outline: experts shared,
    of a task and of a domain, in two towers. Where we differ: a domain is one context feature, so only the user's tower
    has experts of it; knowledge passes between domains by the shared experts alone (no domain adaptation module); and
    no task's prediction is held to another's.
    """

    def __init__(self, config: Config, sizes: Mapping[str, int]) -> None:
        super().__init__()
        options = config.ranker
        self.tasks = tuple(config.tasks)
        self.dim = options.dim
        self.domain = options.domain
        num_domains = sizes[f"context.{options.domain}"] if options.domain else 0
        self.item_input = ItemTower(config.features, sizes, None, options.width, options.dropout)
        tables = self.item_input.tables
        self.user_input = UserTower(config.features, sizes, tables, None, options.width, options.dropout)
        self.item_tower = ExpertTower(options, len(self.tasks))
        self.user_tower = ExpertTower(options, len(self.tasks), num_domains)

    def item_side(self, items: Features) -> dict[str, Tensor]:
        """Item features [I, ...] -> vectors float32 [I, T (D + 1)]: each task's vector, then each task's bias."""
        return {VECTORS: self.item_tower(self.item_input(items))}

    def user_side(self, user: Features) -> dict[str, Tensor]:
        """User and context features [B, ...] -> vectors float32 [B, T (D + 1)], laid out as the item side."""
        x = self.user_input(user, self.item_input.tables)
        return {VECTORS: self.user_tower(x, user[self.domain].long() if self.domain else None)}

    def forward(self, user_side: Features, item_side: Features) -> Tensor:
        """vectors [B, T (D + 1)] and [B, N, T (D + 1)] -> logits float32 [B, N, T]."""
        return task_logits(user_side[VECTORS], item_side[VECTORS], len(self.tasks))

    def program(self) -> Program:
        """`forward` as steps."""
        return dots_program(VECTORS, len(self.tasks), self.dim)
