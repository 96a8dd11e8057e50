"""Target attention: what of a user's history matters depends on the candidate that is looked at."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding


class TargetAttention(nn.Module):
    """softmax(q . k / sqrt(d) + position) v by `heads`, q of the candidate, k and v of the history.

    After Zhou et al. 2018 (Deep Interest Network, eq. 3), whose activation unit is an MLP of both: a dot product
    (Vaswani et al. 2017, eq. 1) stands for it, so the candidate's part can be computed once a version and the
    history's once a request. Its weights do not add up to one, ours do, and each head's log of what they were divided
    by stands beside: how much of the history suits the candidate at all. A learned first key, whose value is learned
    too, takes the weight where nothing does.
    """

    def __init__(self, length: int, width: int, heads: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dim, self.dropout = heads, dim, dropout
        self.query = nn.Linear(width, heads * dim, bias=False)
        self.key = nn.Linear(width, heads * dim, bias=False)
        self.value = nn.Linear(width, heads * dim, bias=False)
        ages = torch.arange(length - 1, -1, -1, dtype=torch.float32)
        self.position = nn.Parameter((-ages / length).repeat(heads, 1))
        self.nothing = nn.Parameter(torch.zeros(2, heads, 1, dim))

    @property
    def width(self) -> int:
        """How many numbers a candidate gets."""
        return self.heads * (self.dim + 1)

    def queries(self, vectors: Tensor) -> Tensor:
        """Items' vectors float [I, width] -> [I, heads * dim]."""
        out: Tensor = self.query(vectors)
        return out

    def keys(self, rows: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """History rows int [B, L] (-1 is none) of a table float [R, width].

        -> keys and values float [B, heads, 1 + L, dim], what to add to the logits float [B, heads, 1, 1 + L].
        """
        present, place = rows >= 0, rows.long().clamp_min(0)
        if self.training and self.dropout:
            present = present & (torch.rand(present.shape, device=present.device) >= self.dropout)
        shape = (*rows.shape, self.heads, self.dim)
        key, value = (_mapped(part, table, place).view(shape).transpose(1, 2) for part in (self.key, self.value))
        nothing = self.nothing.unsqueeze(1).expand(-1, len(rows), -1, -1, -1).to(key.dtype)
        bias = self.position.to(key.dtype).expand(len(rows), -1, -1).masked_fill(~present.unsqueeze(1), -torch.inf)
        bias = torch.cat([bias.new_zeros(len(rows), self.heads, 1), bias], dim=-1)
        return torch.cat([nothing[0], key], 2), torch.cat([nothing[1], value], 2), bias.unsqueeze(2)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        """queries float [B, N, heads * dim] and what `keys` gave -> float [B, N, heads * (dim + 1)]."""
        split = query.view(*query.shape[:2], self.heads, self.dim).transpose(1, 2)
        logits = torch.add(bias, split @ key.transpose(2, 3), alpha=self.dim**-0.5)
        attended = (logits.softmax(-1) @ value).transpose(1, 2).reshape(query.shape)
        return torch.cat([attended, logits.logsumexp(-1).transpose(1, 2)], dim=-1)


def _mapped(linear: nn.Linear, table: Tensor, place: Tensor) -> Tensor:
    """The rows `place` int [B, L] of a linear map of a table, by whichever order has fewer rows to map."""
    if place.numel() > len(table):
        return embedding(place, linear(table))
    mapped: Tensor = linear(embedding(place, table))
    return mapped
