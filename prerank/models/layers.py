"""What rankers are made of: cross layers, experts and their gates, and one dot product a task.

A tower of experts reads one vector x a side; where x comes from is the towers' business.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from prerank.models.embedding import MLP


class CrossLayer(nn.Module):
    """x0 * (W x + b) + x, element by element, W full rank (Wang et al. 2021, DCN V2, eq. 1)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x0: Tensor, x: Tensor) -> Tensor:
        """The first layer's input and this layer's, both float [..., W] -> [..., W]."""
        return torch.addcmul(x, x0, self.linear(x))


class LowRankCrossLayer(nn.Module):
    """x0 * (U (V^T x) + b) + x, U and V [W, rank] (Wang et al. 2021, DCN V2, eq. 2); cheaper below rank W / 2."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.narrow = nn.Linear(width, rank, bias=False)  # V^T
        self.widen = nn.Linear(rank, width)  # U and b

    def forward(self, x0: Tensor, x: Tensor) -> Tensor:
        """The first layer's input and this layer's, both float [..., W] -> [..., W]."""
        return torch.addcmul(x, x0, self.widen(self.narrow(x)))


class CrossExpert(nn.Module):
    """`layers` full-rank cross layers, then as many of low rank, all with the same x0.

    Where we differ from DCN V2: its x0 is every feature's vector side by side, ours the tower's x, a linear map of
    those, so that a layer costs the square of a width we choose; its low-rank layers are mixed by gates of their own
    (eq. 3), ours are plain; and no deep network stands beside or behind the cross layers.
    """

    def __init__(self, width: int, layers: int, rank: int) -> None:
        super().__init__()
        full = [CrossLayer(width) for _ in range(layers)]
        self.layers = nn.ModuleList([*full, *(LowRankCrossLayer(width, rank) for _ in range(layers))])

    def forward(self, x0: Tensor) -> Tensor:
        """float [..., W] -> [..., W]."""
        x = x0
        for layer in self.layers:
            x = layer(x0, x)
        return x


class Gate(nn.Module):
    """One task's mix of E experts: sum_e g_e expert_e, g = softmax(MLP(x)) (Ma et al. 2018, MMoE, eq. 7 and 8).

    Where we differ: an MLP stands for their one matrix; it is theirs, with a bias, where `hidden` is empty.
    """

    def __init__(self, width: int, hidden: tuple[int, ...], num_experts: int, dropout: float) -> None:
        super().__init__()
        self.mlp = MLP(width, hidden, num_experts, dropout)

    def weights(self, x: Tensor) -> Tensor:
        """float [..., W] -> g [..., E], not negative, of sum one."""
        g: Tensor = self.mlp(x).softmax(-1)
        return g

    def forward(self, x: Tensor, experts: Sequence[Tensor]) -> Tensor:
        """x float [..., W] and what each of the E experts made of it, [..., W] each -> [..., W]."""
        # E products and sums: as one batched product they would be many of one row each
        weights = self.weights(x).unsqueeze(-1).unbind(-2)
        mix = weights[0] * experts[0]
        for weight, expert in zip(weights[1:], experts[1:], strict=True):
            mix = torch.addcmul(mix, weight, expert)
        return mix


class TaskHeads(nn.Module):
    """A task's mix to its vector and its bias, by a linear map of its own (h^k of Ma et al. 2018, MMoE, eq. 6)."""

    def __init__(self, width: int, num_tasks: int, dim: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(width, dim + 1) for _ in range(num_tasks))

    def forward(self, mixes: Sequence[Tensor]) -> Tensor:
        """Each task's mix float [..., W] -> [..., T (D + 1)]: each task's vector, then each task's bias."""
        out = [head(mix) for head, mix in zip(self.heads, mixes, strict=True)]
        return torch.cat([*(o[..., :-1] for o in out), *(o[..., -1:] for o in out)], dim=-1)


VECTORS = "vectors"
"""The one tensor of a side whose ranker is two towers."""


def task_logits(user_side: Tensor, item_side: Tensor, num_tasks: int) -> Tensor:
    """logit[t] = u_t . v_t / sqrt(D) + user bias[t] + item bias[t].

    [B, T (D + 1)] and [B, N, T (D + 1)], each T vectors and then T biases -> float32 [B, N, T].
    """
    vectors = user_side.shape[-1] - num_tasks
    shape = (num_tasks, vectors // num_tasks)
    user_B1TD = user_side[:, None, :vectors].reshape(user_side.shape[0], 1, *shape)
    item_BNTD = item_side[..., :vectors].reshape(*item_side.shape[:-1], *shape)
    dots = (user_B1TD * item_BNTD).sum(-1) * shape[1] ** -0.5
    logits: Tensor = dots + user_side[:, None, vectors:] + item_side[..., vectors:]
    return logits
