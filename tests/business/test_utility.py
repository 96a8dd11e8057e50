import torch

from prerank.business.utility import Utility
from prerank.config import UtilityTerm


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


def test_an_event_given_others_is_as_probable_as_all_of_them_together():
    terms = {"click": UtilityTerm(8.0), "purchase": UtilityTerm("price", given=("click", "cart"))}
    utility = Utility.build(["click", "cart", "purchase"], terms)
    probs = torch.tensor([[[0.5, 0.25, 0.5], [0.25, 1.0, 1.0]]])
    assert utility.values == ("price",)
    assert utility(probs, {"price": torch.tensor([[1600, 400]])}).tolist() == [[4.0 + 100.0, 2.0 + 100.0]]
