"""The straightforward way on a GPU, and what each lever is worth: rung by rung to what is served.

A rung answers one request of an idle device: what the host has of a user and candidates in, winners out, timed by the
host's clock. Every rung is checked against the one before by the winners it finds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from benchmarks.device_graphs import Captured, by_name, made
from benchmarks.device_world import Asked, Logits, Stage, World
from benchmarks.result import Row
from benchmarks.scorer_whole import plain_greedy
from benchmarks.scorer_world import WINNERS
from prerank.serve.device_streams import Device
from prerank.types import Features

Answer: TypeAlias = Callable[[Asked], Sequence[int]]
"""One request -> the rows that win, best first."""
NAIVE, GRAPH, COMPILED, FUSED = "naive", "+ graph", "torch.compile, graph", "fused program, graph"
SLOW = (NAIVE, "+ items on the device", "+ bfloat16")
"""What has Python's rules in it."""
_ALIKE = 0.9  # of the winners: what is less is another computation


@dataclass(frozen=True, slots=True)
class Ladder:
    """Rungs over a world on a device; `compiles` says whether torch.compile is one of them."""

    world: World
    device: Device
    compiles: bool = True

    def rungs(self, like: Asked) -> Iterator[tuple[str, Answer | Row]]:
        """By name, for requests as large as `like`: what answers, or the row that says why it cannot."""
        yield NAIVE, made(self.device, lambda: Naive(self.world, self.device.where))
        full, half = (self._stage(dtype) for dtype in (torch.float32, torch.bfloat16))
        yield SLOW[1], partial(self._scores_back, full)
        yield SLOW[2], partial(self._scores_back, half)
        yield "+ rules on the device", partial(self._eager, half, half.logits)
        yield GRAPH, self._captured(GRAPH, half, lambda: half.logits, like)
        if self.compiles:
            yield COMPILED, self._captured(COMPILED, half, lambda: compiled(half), like)
        fused = made(self.device, half.fused)
        yield "fused program, no graph", partial(self._eager, half, fused)
        yield FUSED, self._captured(FUSED, half, lambda: fused, like)

    def _stage(self, dtype: torch.dtype) -> Stage:
        return made(self.device, lambda: Stage(self.world, self.device.where, dtype))

    def _scores_back(self, stage: Stage, asked: Asked) -> list[int]:
        """Rows up, every candidate's probability down, rules in Python."""
        side = {name: stage.there(one) for name, one in asked.user_side.items()}
        probs = stage.logits(side, asked.rows.to(stage.where)).float().sigmoid().cpu()
        return plain_rules(self.world, asked.rows[0], probs[0])

    def _eager(self, stage: Stage, logits: Logits, asked: Asked) -> list[int]:
        side = {name: stage.there(one) for name, one in asked.user_side.items()}
        won = stage.winners(stage.judge(side, asked.rows.to(stage.where), logits))
        return told(won.rows.cpu(), won.valid.cpu())

    def _captured(self, name: str, stage: Stage, make: Callable[[], Logits], like: Asked) -> Answer | Row:
        try:
            graph = captured(self.device, stage, make(), given(stage, like))
        except Exception as error:  # of a compiler's many kinds, and of what cannot be captured
            return Row(f"{name} (cannot run: {type(error).__name__}: {first_line(error)})")

        def answer(asked: Asked) -> list[int]:
            found = graph(given(stage, asked))
            return told(found["rows"], found["valid"])

        return answer


def captured(device: Device, stage: Stage, logits: Logits, like: Features) -> Captured:
    """A stage's whole work on batches like `like`, see `given`."""

    def work(inputs: Features) -> Features:
        side = {name: one for name, one in inputs.items() if name != "rows"}
        return by_name(stage.winners(stage.judge(side, inputs["rows"], logits)))

    return Captured(device, work, like)


def given(stage: Stage, asked: Asked) -> dict[str, Tensor]:
    """A request as inputs of a graph; floats of the user in the stage's type."""
    side = {name: one.to(stage.dtype) if one.is_floating_point() else one for name, one in asked.user_side.items()}
    return {**side, "rows": asked.rows}


def compiled(stage: Stage) -> Logits:
    """torch.compile of the ranker with the gather of what it reads, of one shape."""
    torch.compiler.reset()  # or the sizes before would make this one's dynamic
    found: Logits = torch.compile(stage.logits, dynamic=False)
    return found


class Naive:
    """Eager float32 on the default stream: features of candidates copied up, all probabilities down, Python's rules."""

    def __init__(self, world: World, where: torch.device) -> None:
        self._world, self._where = world, where
        self._ranker = deepcopy(world.drawn.ranker).to(where)

    def __call__(self, asked: Asked) -> list[int]:
        """Rows of the winners."""
        items, rows = self._world.drawn.items, asked.rows[0]
        there = {name: column[rows].to(self._where) for name, column in items.items()}
        user = {name: one.to(self._where) for name, one in asked.user.items()}
        side = {name: one.unsqueeze(0) for name, one in self._ranker.item_side(there).items()}
        probs = self._ranker(self._ranker.user_side(user), side).sigmoid().cpu()
        return plain_rules(self._world, rows, probs[0])


def plain_rules(world: World, rows: Tensor, probs: Tensor) -> list[int]:
    """Rows int64 [N] and probabilities [N, T] -> the rows that win, in Python."""
    worth = (probs[:, 0] * world.drawn.items["bid_micros"][rows]).numpy()
    return plain_greedy(worth, rows.numpy(), world.diversity.codes[rows].numpy(), WINNERS)


def told(rows: Tensor, valid: Tensor) -> list[int]:
    """Of the winners [1, k] those there are."""
    found: list[int] = rows[0][valid[0]].tolist()
    return found


def first_line(error: BaseException) -> str:
    """Of what it says."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")


def check_alike(name: str, found: Sequence[int], wanted: Sequence[int]) -> None:
    """Raises RuntimeError where a rung finds others than rounding explains."""
    shared = len(set(found) & set(wanted)) / max(1, len(wanted))
    if shared < _ALIKE:
        raise RuntimeError(f"{name}: {100 * shared:.0f} % of its winners are those of the straightforward way")
