import torch

from prerank.business.utility import Utility


def test_utility_is_the_sum_of_probability_times_worth():
    utility = Utility(["click", "like", "follow"], {"follow": 100.0, "click": "bid_micros"})
    probs = torch.tensor([[[0.5, 0.9, 0.25], [0.1, 0.9, 0.0]]])
    bids = torch.tensor([[1000, 2000]])
    assert utility.values == ("bid_micros",)
    assert torch.allclose(utility(probs, {"bid_micros": bids}), torch.tensor([[525.0, 200.0]]))


def test_a_constant_is_part_of_the_state():
    cheap, dear = Utility(["click"], {"click": 1.0}), Utility(["click"], {"click": 5.0})
    cheap.load_state_dict(dear.state_dict())
    assert cheap(torch.ones(1, 1, 1), {}).tolist() == [[5.0]]


def test_utility_is_float32_of_any_probabilities_and_values():
    utility = Utility(["click"], {"click": "bid"})
    assert utility(torch.ones(2, 3, 1, dtype=torch.bfloat16), {"bid": torch.ones(2, 3)}).dtype == torch.float32
