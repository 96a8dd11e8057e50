import json

import pytest
import torch

from prerank.index.plan import SHARES, Plan, Step, measure
from prerank.types import CandidateSet

NUM_ROWS, K = 1_000, 10


class World:
    """Two ways to search and a clock: looking at every eligible row takes a microsecond each, the graph `cost` a width.

    The graph finds the best only where it is searched `wide` times k over the share of the rows that is eligible.
    """

    def __init__(self, wide: float, cost: float) -> None:
        self.wide, self.cost, self.now, self.widths = wide, cost, 0.0, []
        self.vectors = torch.randn(NUM_ROWS, 4, generator=torch.Generator().manual_seed(0))
        self.query = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))

    def clock(self) -> float:
        return self.now

    def exact(self, query: torch.Tensor, k: int, eligible: torch.Tensor | None) -> CandidateSet:
        num = NUM_ROWS if eligible is None else int(eligible.sum())
        self.now += num
        rows = torch.arange(k)[None]
        return CandidateSet(rows, rows.float(), rows >= 0)

    def by_graph(self, query: torch.Tensor, k: int, eligible: torch.Tensor | None, step: Step) -> CandidateSet:
        self.widths.append(step.width)
        self.now += self.cost * step.width
        rows = torch.arange(k)[None]
        if step.width < self.wide * k / step.share:
            rows = rows + 1  # the best is missing
        return CandidateSet(rows, rows.float(), rows >= 0)

    def plan(self, k: int = K, floor: float = 0.95) -> Plan:
        return measure(self.exact, self.by_graph, self.query, self.vectors, k, floor, self.clock)


def test_the_graph_is_searched_no_wider_than_finds_the_floor():
    steps = World(wide=3.0, cost=1.0).plan().steps
    assert steps[0].share == 1.0
    assert 3 * K <= steps[0].width <= 3 * K * 1.25 + 1
    assert steps[0].recall == 1.0
    for step in steps:
        assert not step.width or step.width >= 3 * K / step.share


def test_where_the_graph_is_not_faster_and_below_every_row_is_looked_at():
    # at a share s the exact scan takes 1000 s, the graph of width 30 / s about as many times 3: even at s about .37
    plan = World(wide=3.0, cost=3.0).plan()
    assert [step.share for step in plan.steps if step.width] == [1.0, 0.9, 0.7, 0.45]
    assert (plan.steps[-1].share, plan.steps[-1].width) == (0.3, 0)
    assert plan.step(K, 450) is plan.steps[3]
    assert plan.step(K, 449) is None
    assert plan.step(K, NUM_ROWS) is plan.steps[0]


def test_a_graph_that_is_slower_even_for_all_is_given_up_at_once():
    world = World(wide=3.0, cost=1_000.0)
    assert [step.width for step in world.plan().steps] == [0]
    assert set(world.widths) == {K}


def test_a_floor_that_no_width_finds_is_left_to_looking_at_every_row():
    plan = World(wide=10**6, cost=0.0).plan()
    assert [step.width for step in plan.steps] == [0]
    assert not plan.has_graph


def test_a_plan_is_for_as_many_as_it_was_measured_for_and_for_fewer():
    plan = World(wide=1.0, cost=0.1).plan()
    assert plan.step(1, NUM_ROWS)
    assert plan.step(K, NUM_ROWS)
    assert plan.step(K + 1, NUM_ROWS) is None
    assert plan.step(0, NUM_ROWS) is None
    assert plan.step(K, K - 1) is None


@pytest.mark.parametrize("k", [0, NUM_ROWS, NUM_ROWS + 1])
def test_where_all_are_asked_for_nothing_is_measured(k):
    assert World(wide=1.0, cost=0.0).plan(k=k).steps == ()


def test_without_a_query_nothing_is_measured():
    world = World(wide=1.0, cost=0.0)
    world.query = world.query[:0]
    assert world.plan().steps == ()


def test_a_plan_comes_back_from_its_file():
    plan = World(wide=3.0, cost=1.0).plan()
    assert len(plan.steps) > 1
    assert plan.steps[-1].share in SHARES
    assert Plan.from_plain(json.loads(json.dumps(plan.to_plain()))) == plan


@pytest.mark.parametrize(("slow", "shares"), [(600.0, [1.0, 0.9, 0.7]), (1_000.0, [1.0])])
def test_a_graph_is_searched_where_both_kinds_of_eligible_rows_together_gain_and_neither_loses(slow, shares):
    class Alike(World):
        """Where the eligible rows are like each other the graph takes `slow` more."""

        def by_graph(self, query: torch.Tensor, k: int, eligible: torch.Tensor | None, step: Step) -> CandidateSet:
            if eligible is not None and (self.vectors[eligible].mean(0) - self.vectors.mean(0)).norm() > 0.1:
                self.now += slow
            return super().by_graph(query, k, eligible, step)

    assert [step.share for step in Alike(wide=1.0, cost=0.1).plan().steps if step.width] == shares
