"""What rankers are made of as steps of a program: each function adds a module's own arithmetic to a builder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from prerank.kernels.program import Builder, Dot, Gather, Linear, Match, Mix, Norm, OfUser, Part, Program, Softmax
from prerank.models.attention import TargetAttention
from prerank.models.embedding import MLP
from prerank.models.layers import CrossExpert, CrossLayer, Gate, LowRankCrossLayer
from prerank.models.matching import Matching
from prerank.models.meeting import Meeting


class Programmed(Protocol):
    """A ranker whose `forward` can be said as a program of the same sides."""

    def program(self) -> Program:
        """The same arithmetic as `forward` in eval mode, with today's weights in it."""
        ...


def emit_mlps(builder: Builder, mlps: Sequence[MLP], x: Part, is_coarse: bool = False) -> Part:
    """Several MLPs of one x as one: -> their outputs side by side, float [..., sum of out].

    Eight bits may be enough for their first layers: `is_coarse`.
    """
    for number, layers in enumerate(zip(*(_linears(mlp) for mlp in mlps), strict=True)):
        weights = [layer.weight.detach() for layer in layers]
        weight = torch.cat(weights) if number == 0 else torch.block_diag(*weights)  # type: ignore[no-untyped-call]
        bias = torch.cat([_bias(layer) for layer in layers])
        is_last = number == len(list(_linears(mlps[0]))) - 1
        x = builder.linear(x, weight, bias, "none" if is_last else "gelu", is_coarse=is_coarse and number == 0)
    return x


def emit_mlp(builder: Builder, mlp: MLP, x: Part, out: Part) -> None:
    """One MLP of x into columns that are there already."""
    *hidden, last = _linears(mlp)
    for layer in hidden:
        x = builder.linear(x, layer.weight.detach(), _bias(layer), "gelu")
    builder.add(Linear(out, x, last.weight.detach(), _bias(last)))


def emit_norm(builder: Builder, norm: nn.LayerNorm, x: Part) -> Part:
    """LayerNorm with weights."""
    out = builder.register(x.width)
    return builder.add(Norm(out, x, norm.weight.detach(), norm.bias.detach(), norm.eps))


def emit_expert(builder: Builder, expert: CrossExpert, x0: Part) -> Part:
    """Cross layers, of full rank and low; each adds to what it read, so eight bits are enough for what it adds."""
    x = x0
    for layer in expert.layers:
        if isinstance(layer, CrossLayer):
            x = builder.linear(x, layer.linear.weight.detach(), _bias(layer.linear), cross=(x0, x), is_coarse=True)
        else:
            assert isinstance(layer, LowRankCrossLayer)
            narrow = builder.linear(x, layer.narrow.weight.detach(), None, is_coarse=True)
            x = builder.linear(narrow, layer.widen.weight.detach(), _bias(layer.widen), cross=(x0, x), is_coarse=True)
    return x


def emit_mixes(builder: Builder, gates: Sequence[Gate], x: Part, experts: Sequence[Part]) -> list[Part]:
    """Each gate's mix of the experts."""
    logits = emit_mlps(builder, [gate.mlp for gate in gates], x, is_coarse=True)
    mixes = []
    for number in range(len(gates)):
        weights = builder.register(len(experts))
        builder.add(Softmax(weights, logits.columns(number * len(experts), len(experts))))
        mixes.append(builder.add(Mix(builder.register(experts[0].width), weights, tuple(experts))))
    return mixes


def emit_meeting(builder: Builder, meeting: Meeting, out: Part) -> None:
    """Target attention over each history, then matches, into `out`, as wide as the meeting."""
    at = 0
    for name, attention in meeting.attention.items():
        assert isinstance(attention, TargetAttention)
        _emit_attention(builder, attention, name, out.columns(at, attention.width))
        at += attention.width
    if meeting.matching is not None:
        _emit_matches(builder, meeting.matching, out.columns(at, meeting.matching.width))


def dots_program(table: str, num_tasks: int, dim: int) -> Program:
    """The logits of two towers: one dot product a task of vectors laid out as `models.layers.task_logits` says."""
    builder, vectors = Builder(), num_tasks * dim
    item = builder.add(Gather(builder.register(vectors + num_tasks), table))
    logits = builder.register(num_tasks)
    for task in range(num_tasks):
        weight = OfUser(table, (), (task * dim, dim), factor=dim**-0.5)
        bias, own = OfUser(table, (), (vectors + task, 1)), item.columns(vectors + task, 1)
        builder.add(Dot(logits.columns(task, 1), item.columns(task * dim, dim), weight, bias, own))
    return builder.program(logits)


def _emit_attention(builder: Builder, attention: TargetAttention, name: str, out: Part) -> None:
    heads, dim = attention.heads, attention.dim
    query = builder.add(Gather(builder.register(heads * dim), f"query_{name}"))
    length = attention.position.shape[1] + 1
    for head in range(heads):
        key = OfUser(f"key_{name}", (head,), factor=dim**-0.5)
        value = OfUser(f"value_{name}", (head,), transposed=True)
        bias = OfUser(f"bias_{name}", (head, 0))
        logits = builder.add(Linear(builder.register(length), query.columns(head * dim, dim), key, bias))
        weights = builder.register(length)
        builder.add(Softmax(weights, logits, out.columns(heads * dim + head, 1)))
        builder.add(Linear(out.columns(head * dim, dim), weights, value))


def _emit_matches(builder: Builder, matching: Matching, out: Part) -> None:
    for number, name in enumerate(matching.names):
        builder.add(Match(out.columns(number, 1), f"of_{matching.by[name]}", OfUser(f"codes_{name}")))


def _linears(mlp: MLP) -> Iterator[nn.Linear]:
    return (layer for layer in mlp if isinstance(layer, nn.Linear))


def _bias(layer: nn.Linear) -> Tensor:
    return layer.bias.detach()
