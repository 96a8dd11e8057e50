"""By how many rows are eligible, whether to walk a graph or to look at all of them, as measured when a version is made.

Few eligible rows are soon looked at one by one, and a graph leads past most of them; of many a graph sees a small part.
Where the one gives way to the other, and how widely the graph must be searched, depends on the vectors, the queries and
the machine: nothing is assumed, both are tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import ceil
from typing import Self, TypeAlias

import numpy as np
import torch
from torch import Tensor

from prerank._toml import Problems, structure
from prerank.errors import BundleError
from prerank.types import CandidateSet

SHARES = (1.0, 0.9, 0.7, 0.45, 0.3, 0.18, 0.09, 0.045, 0.018)
"""How much of the rows is eligible where both are tried; of fewer every row is looked at.

Each a little below a share that filters often have, such as a half: a step is for its share and more.
"""
MOST_QUERIES = 256
"""By fewer the mean recall scatters by as much as a plan's floor is missed by."""
_WORTH = 0.75  # of the exact scan's time: what may be missing must buy something, and times scatter
_WIDER = 1.25
_ANCHORS = 4
_SEED = 7

_WIDTHS = (0.7, 1.0, 1.4, 2.0, 2.8)
"""Tried where rows are filtered: times the width that finds enough where none is, over their share."""

Exact: TypeAlias = Callable[[Tensor, int, Tensor | None], CandidateSet]
ByGraph: TypeAlias = Callable[[Tensor, int, Tensor | None, "Step"], CandidateSet]


@dataclass(frozen=True, slots=True)
class Step:
    """Where at least `share` of the rows is eligible: search the graph `width` wide, or, where it is 0, every row.

    A search that comes by fewer than `least` eligible rows went where they are not: then every row is looked at after
    all. `recall` is what was found of the k best, `pace` the time over that of looking at every row, as measured.
    """

    share: float
    width: int
    least: int
    recall: float
    pace: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What was measured for the `k` best of `num_rows` rows, of which at least `floor` are to be found.

    `steps` are of falling share; below the last, and for more than `k`, every row is looked at.
    """

    k: int
    floor: float
    num_rows: int
    steps: tuple[Step, ...] = ()

    @property
    def has_graph(self) -> bool:
        """Whether a graph is ever searched."""
        return any(step.width for step in self.steps)

    def step(self, k: int, num_eligible: int, num_fresh: int = 0) -> Step | None:
        """How to search the graph for `k` of so many eligible rows, None to look at every one.

        `num_fresh` more are eligible that are not in the graph, and are all looked at beside it.
        """
        if not 0 < k <= min(self.k, num_eligible):
            return None
        for step in self.steps:
            if num_eligible >= step.share * self.num_rows:
                is_worth_it = not num_fresh or num_fresh <= (1 - step.pace) * num_eligible
                return step if step.width and is_worth_it else None
        return None

    def to_plain(self) -> dict[str, object]:
        """As JSON values."""
        return {**asdict(self), "steps": [asdict(step) for step in self.steps]}

    @classmethod
    def from_plain(cls, plain: object) -> Self:
        """What `to_plain` gave. Raises BundleError for anything else."""
        problems = Problems()
        plan = structure(plain, cls, "plan", problems) if isinstance(plain, dict) else None
        if plan is None or any(step.width < 0 for step in plan.steps):
            said = "; ".join(problems) or f"a table of steps at least 0 wide, got {plain}"
            raise BundleError(f"expected an index's plan: {said}; publish again")
        return plan


def measure(
    exact: Exact, by_graph: ByGraph, query: Tensor, vectors: Tensor, k: int, floor: float, clock: Callable[[], float]
) -> Plan:
    """The plan for the k best of queries like `query` float32 [Q, D] among the finite rows of `vectors` [I, D].

    At each of SHARES both are asked with rows eligible at random and with those most like one of them, for targeting is
    seldom independent of what items are like. A width is enough if, for both, the mean recall less twice its standard
    error is `floor`; the fastest of those is taken. Where it is slower than looking at every row for either, or not by
    enough faster for both together, that is done there and at every smaller share. `clock` gives seconds.
    """
    found = vectors.isfinite().all(1)
    num_rows = int(found.sum())
    query = query[:MOST_QUERIES]
    steps: list[Step] = []
    for share in SHARES if 0 < k < num_rows and len(query) else ():
        cases = [list(_cases(masks, query)) for masks in _masks(vectors, found, share)]
        truth = [_asked(lambda one, mask: exact(one, k, mask), some, clock) for some in cases]
        best = None
        for width in _widths(k, num_rows, share, steps):
            step = Step(share, width, steps[0].width if steps else k, 1.0, 1.0)
            tried = [_asked(partial(_of_step, by_graph, k, step), some, clock) for some in cases]
            pace = _pace(tried, truth)
            least, recall = _recalls(tried, truth)
            if least >= floor and pace < (_WORTH if best is None else best.pace):
                best = replace(step, recall=recall, pace=pace)
            if share == 1 and (least >= floor or pace > _WORTH):
                break
        steps.append(best or Step(share, 0, 0, 1.0, 1.0))
        if best is None:
            break
    return Plan(k, floor, num_rows, tuple(steps))


def _of_step(by_graph: ByGraph, k: int, step: Step, one: Tensor, mask: Tensor | None) -> CandidateSet:
    return by_graph(one, k, mask, step)


def _widths(k: int, num_rows: int, share: float, steps: Sequence[Step]) -> Iterator[int]:
    """Ever wider ones."""
    if steps:
        yield from (ceil(times * steps[0].width / share) for times in _WIDTHS)
        return
    width = k
    while width < num_rows:
        yield width
        width = ceil(_WIDER * width)


def _masks(vectors: Tensor, found: Tensor, share: float) -> Iterator[Sequence[Tensor | None]]:
    """Rows at random, then those most like each of a few; at a share of 1 all."""
    if share == 1:
        yield (None,)
        return
    generator = torch.Generator().manual_seed(_SEED)
    yield ((torch.rand(len(vectors), generator=generator) < share) & found,)
    rows = found.nonzero().squeeze(1)
    anchors = vectors[rows[torch.randint(len(rows), (_ANCHORS,), generator=generator)]].float()
    middle = vectors[rows[:: max(1, len(rows) // 10_000)]].float().mean(0)
    alike = []
    for anchor in anchors - middle:
        nearness = vectors.float() @ anchor
        least = nearness[rows].kthvalue(min(len(rows), max(1, round((1 - share) * len(rows))))).values
        alike.append((nearness >= least) & found)
    yield alike


def _cases(masks: Sequence[Tensor | None], query: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
    for n in range(len(query)):
        yield query[n : n + 1], masks[n % len(masks)]


@dataclass(frozen=True, slots=True)
class _Asked:
    rows: list[set[int]]
    seconds: list[float]


def _asked(
    ask: Callable[[Tensor, Tensor | None], CandidateSet],
    cases: Sequence[tuple[Tensor, Tensor | None]],
    clock: Callable[[], float],
) -> _Asked:
    """Each case twice; of its times the less, for what else the machine does only adds."""
    rows, seconds = [], []
    for one, mask in cases:
        times = []
        for _ in range(2):
            start = clock()
            answer = ask(one, mask)
            times.append(clock() - start)
        rows.append(set(answer.rows[answer.valid].tolist()))
        seconds.append(min(times))
    return _Asked(rows, seconds)


def _pace(tried: Sequence[_Asked], truth: Sequence[_Asked]) -> float:
    """The mean of the kinds of eligible rows, or that of the slowest if it is no gain: a plan knows only how many."""
    paces = [sum(a.seconds) / max(sum(b.seconds), 1e-12) for a, b in zip(tried, truth, strict=True)]
    return max(paces) if max(paces) >= 1 else sum(paces) / len(paces)


def _recalls(tried: Sequence[_Asked], truth: Sequence[_Asked]) -> tuple[float, float]:
    """Of the worst kind of eligible rows: the mean less twice its standard error, and the mean."""
    both = []
    for a, b in zip(tried, truth, strict=True):
        shares = np.array([len(x & y) / max(len(y), 1) for x, y in zip(a.rows, b.rows, strict=True)])
        scatter = shares.std(ddof=1) / np.sqrt(len(shares)) if len(shares) > 1 else 0.0
        both.append((float(shares.mean() - 2 * scatter), float(shares.mean())))
    return min(both)
