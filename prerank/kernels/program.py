"""A ranker's arithmetic per candidate as a short list of steps: gather a row, matrix product and epilogue, mix.

A ranker emits the list once, with its weights in it. `run` here is the reference, in plain torch; `engine` runs the
same list natively over blocks of candidates that never leave the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

from prerank.types import Features

Activation: TypeAlias = Literal["none", "gelu"]


@dataclass(frozen=True, slots=True)
class Part:
    """Columns `start` to `start + width` of a register, itself float [N, ...]: a number a candidate and column."""

    register: int
    start: int
    width: int

    def columns(self, start: int, width: int) -> Part:
        """Some of these columns."""
        assert start >= 0
        assert start + width <= self.width
        return Part(self.register, self.start + start, width)


@dataclass(frozen=True, slots=True)
class OfUser:
    """A piece of one request's user side: the tensor `name` at the indexes `place`, some `columns` of its last axis.

    What is found is multiplied by `factor` and, of a matrix, rows and columns are exchanged if `transposed`.
    """

    name: str
    place: tuple[int, ...] = ()
    columns: tuple[int, int] | None = None
    transposed: bool = False
    factor: float = 1.0

    def view(self, user: Features) -> Tensor:
        """In one request's user side, tensors without the axis of requests; not yet times `factor`."""
        found = user[self.name][self.place] if self.place else user[self.name]
        if self.columns is not None:
            found = found[..., self.columns[0] : self.columns[0] + self.columns[1]]
        return found.t() if self.transposed else found

    def find(self, user: Features) -> Tensor:
        """The same times `factor`."""
        found = self.view(user)
        return found if self.factor == 1.0 else found * self.factor


Weight: TypeAlias = Tensor | OfUser
_Read: TypeAlias = Callable[[Part], Tensor]


@dataclass(frozen=True, slots=True)
class Gather:
    """out = the candidate's row of the item side's `table`, float [I, W]."""

    out: Part
    table: str


@dataclass(frozen=True, slots=True)
class Scale:
    """out = x * by, a vector of the user's."""

    out: Part
    x: Part
    by: OfUser


@dataclass(frozen=True, slots=True)
class Dot:
    """out, one column, = x . by + bias + add, all in float32: `by` is a vector of the user's, `bias` one number."""

    out: Part
    x: Part
    by: OfUser
    bias: OfUser
    add: Part


@dataclass(frozen=True, slots=True)
class Linear:
    """out = activation(x W^T + bias + add), or x0 * (x W^T + bias) + x1 where `cross` is (x0, x1).

    `weight` is float [width of out, width of x] and `bias` one of out's width. Where eight bits are asked for
    (`Engine`), `is_coarse` says that they are enough for this one.
    """

    out: Part
    x: Part
    weight: Weight
    bias: Weight | None = None
    add: Part | None = None
    cross: tuple[Part, Part] | None = None
    activation: Activation = "none"
    is_coarse: bool = False

    def __post_init__(self) -> None:
        assert not self.is_coarse or isinstance(self.weight, Tensor)
        assert self.add is None or self.cross is None
        assert self.cross is None or self.activation == "none"


@dataclass(frozen=True, slots=True)
class Norm:
    """out = LayerNorm(x) by `weight` and `bias`, float [W] each."""

    out: Part
    x: Part
    weight: Tensor
    bias: Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class Softmax:
    """out = softmax(x) over its columns; `log_sum`, one column, is the log of what was divided by."""

    out: Part
    x: Part
    log_sum: Part | None = None


@dataclass(frozen=True, slots=True)
class Mix:
    """out = the sum of `experts`, each times its own column of `weights`."""

    out: Part
    weights: Part
    experts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Match:
    """out = log(1 + how many of the user's `codes` are among the candidate's own of `table`), int [I] or [I, M].

    What is not positive matches nothing.
    """

    out: Part
    table: str
    codes: OfUser


Step: TypeAlias = Gather | Scale | Dot | Linear | Norm | Softmax | Mix | Match


@dataclass(frozen=True, slots=True)
class Program:
    """`steps` in order over registers of the given `widths`; `logits` is where the answer [N, T] stands.

    A register's columns are each written once, before they are read.
    """

    widths: tuple[int, ...]
    steps: tuple[Step, ...]
    logits: Part

    @property
    def flops(self) -> int:
        """Of products, a candidate: two a weight."""
        return sum(2 * step.out.width * step.x.width for step in self.steps if isinstance(step, Linear | Dot))

    def tables(self) -> list[str]:
        """The item side's tensors that are read, each once."""
        return list(dict.fromkeys(step.table for step in self.steps if isinstance(step, Gather | Match)))


@dataclass(slots=True)
class Builder:
    """Makes a Program, register by register and step by step."""

    widths: list[int] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    def register(self, width: int) -> Part:
        """A new register, all of it."""
        self.widths.append(width)
        return Part(len(self.widths) - 1, 0, width)

    def add(self, step: Step) -> Part:
        """The next step; -> what it writes."""
        self.steps.append(step)
        return step.out

    def linear(
        self,
        x: Part,
        weight: Tensor,
        bias: Weight | None,
        activation: Activation = "none",
        cross: tuple[Part, Part] | None = None,
        is_coarse: bool = False,
    ) -> Part:
        """A Linear into a register of its own."""
        return self.add(Linear(self.register(len(weight)), x, weight, bias, None, cross, activation, is_coarse))

    def program(self, logits: Part) -> Program:
        """What was built, its answer at `logits`."""
        return Program(tuple(self.widths), tuple(self.steps), logits)


def run(program: Program, user: Features, items: Features) -> Tensor:
    """One request's user side and its candidates' item side [N, ...] -> logits float32 [N, T], in plain torch.

    All of it is computed in the type of the weights.
    """
    registers: dict[int, dict[Part, Tensor]] = {}

    def read(part: Part) -> Tensor:
        written = registers[part.register]
        if part in written:
            return written[part]
        pieces = [tensor for _, tensor in sorted(written.items(), key=lambda one: one[0].start)]
        return torch.cat(pieces, dim=-1)[..., part.start : part.start + part.width]

    for step in program.steps:
        for part, tensor in _computed(step, read, user, items):
            registers.setdefault(part.register, {})[part] = tensor
    return read(program.logits).float()


def _computed(step: Step, read: _Read, user: Features, items: Features) -> list[tuple[Part, Tensor]]:
    if isinstance(step, Gather):
        return [(step.out, items[step.table])]
    if isinstance(step, Scale):
        return [(step.out, read(step.x) * step.by.find(user))]
    if isinstance(step, Dot):
        dot = (read(step.x) * step.by.find(user)).sum(-1, keepdim=True)
        return [(step.out, dot + step.bias.find(user) + read(step.add))]
    if isinstance(step, Linear):
        return [(step.out, _linear(step, read, user))]
    if isinstance(step, Norm):
        return [(step.out, layer_norm(read(step.x), (step.x.width,), step.weight, step.bias, step.eps))]
    if isinstance(step, Softmax):
        x = read(step.x)
        out = [(step.out, x.softmax(-1))]
        return out if step.log_sum is None else [*out, (step.log_sum, x.logsumexp(-1, keepdim=True))]
    if isinstance(step, Mix):
        weights = read(step.weights).unbind(-1)
        mixed = [w.unsqueeze(-1) * read(expert) for w, expert in zip(weights, step.experts, strict=True)]
        return [(step.out, torch.stack(mixed).sum(0))]
    wanted, codes = items[step.table], step.codes.find(user)
    wanted = (wanted.unsqueeze(-1) if wanted.dim() == 1 else wanted).long()
    same = (wanted.unsqueeze(-1) == codes.long()) & (codes > 0)
    return [(step.out, same.sum((1, 2)).float().log1p().unsqueeze(-1))]


def _linear(step: Linear, read: _Read, user: Features) -> Tensor:
    x, weight = read(step.x), _found(step.weight, user).reshape(step.out.width, step.x.width)
    y = x @ weight.t().to(x.dtype)
    if step.bias is not None:
        y = y + _found(step.bias, user).reshape(-1).to(x.dtype)
    if step.cross is not None:
        x0, x1 = map(read, step.cross)
        return torch.addcmul(x1, x0, y)
    if step.add is not None:
        y = y + read(step.add)
    return gelu(y) if step.activation == "gelu" else y


def _found(weight: Weight, user: Features) -> Tensor:
    return weight.find(user) if isinstance(weight, OfUser) else weight


def of_request(user_side: Features, number: int) -> Mapping[str, Tensor]:
    """One request of a batch's user side [B, ...], without the axis of requests."""
    return {name: tensor[number] for name, tensor in user_side.items()}
