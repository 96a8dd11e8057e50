import torch

from prerank.business.reserve import Reserve
from prerank.config import Rules

ROWS = torch.zeros(1, 1, dtype=torch.int64)
"""The reserve and the floors are the same for every item."""


def test_who_may_win_has_the_reserve_and_every_floor_exactly_or_more():
    reserve = Reserve(["click", "like"], Rules(reserve_micros=10.0, floor={"like": 0.25}))
    utility = torch.tensor([[10.0, 9.999, 50.0, 50.0, torch.nan, 50.0]])
    like = torch.tensor([[0.25, 0.25, 0.249, 0.9, 0.9, torch.nan]])
    probs = torch.stack([torch.zeros(1, 6), like], dim=-1)
    assert reserve.may_win(probs, utility, ROWS).tolist() == [[True, False, False, True, False, False]]


def test_a_floor_alone_asks_for_no_utility():
    reserve = Reserve(["click"], Rules(floor={"click": 0.5}))
    probs = torch.tensor([[[0.5], [0.4]]], dtype=torch.bfloat16)
    assert reserve.may_win(probs, torch.tensor([[-1e30, 5.0]]), ROWS).tolist() == [[True, False]]


def test_no_rules_ask_for_nothing_and_are_no_state():
    assert Reserve.build(["click"], Rules(), 3) is None


def test_reserve_and_floors_are_part_of_the_state():
    low, high = (
        Reserve.build(["click"], Rules(reserve_micros=r, floor={"click": f}), 3) for r, f in ((1, 0), (9, 0.5))
    )
    assert low is not None
    assert high is not None
    low.load_state_dict(high.state_dict())
    probs = torch.tensor([[[0.5], [0.4], [0.9]]])
    assert low.may_win(probs, torch.tensor([[9.0, 9.0, 8.0]]), ROWS).tolist() == [[True, False, False]]
