from dataclasses import fields, replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn

from prerank.bundle.item_table import ItemTable
from prerank.bundle.scorer import ItemSide, Scorer
from prerank.business.diversity import Diversity
from prerank.business.reserve import Reserve
from prerank.business.rule import Rule
from prerank.business.utility import Utility
from prerank.config import DiversityRule, Rules
from prerank.errors import SchemaMismatch
from prerank.types import CandidateSet, ItemChange

ALL = 500


class ByNumber(nn.Module):
    """logits = the item's two numbers, a side each, plus the user's number."""

    tasks = ("click", "like")

    def item_side(self, items):
        return {"a": items["a"], "b": items["b"][:, None]}

    def user_side(self, user):
        return {"u": user["u"]}

    def forward(self, user_side, item_side):
        return torch.cat([item_side["a"].unsqueeze(-1), item_side["b"]], dim=-1) + user_side["u"][:, None, None]


def scorer(a, b=None, bid=None, terms=None, **rules):
    num_items = len(a)
    columns = {
        "a": np.array(a, dtype=np.float32),
        "b": np.zeros(num_items, dtype=np.float32) if b is None else np.array(b, dtype=np.float32),
        "bid": np.ones(num_items, dtype=np.int64) if bid is None else np.array(bid),
    }
    items = ItemTable.build(np.arange(num_items) * 10, columns)
    return Scorer(items, ByNumber(), Utility(("click", "like"), terms or {"click": "bid"}), **rules).eval()


def candidates(rows, valid=None):
    rows = torch.tensor(rows)
    known = torch.ones(rows.shape, dtype=torch.bool) if valid is None else torch.tensor(valid)
    return CandidateSet(rows, torch.zeros(rows.shape), known)


def user(*numbers):
    return {"u": torch.tensor(numbers or (0.0,))}


def test_the_winners_are_those_of_highest_utility():
    top = scorer(a=[0.0, 1.0, 2.0, 3.0], bid=[100, 1, 1, 2])(user(), candidates([[0, 1, 2, 3]]), 2)
    assert top.item_ids.tolist() == [[0, 30]]
    assert top.rows.tolist() == [[0, 3]]
    assert torch.allclose(top.utility, torch.tensor([[50.0, 2 * torch.tensor(3.0).sigmoid()]]))
    assert torch.allclose(top.probs[0, 1], torch.tensor([3.0, 0.0]).sigmoid())
    assert top.valid.all()


@pytest.mark.parametrize("k", [1, 3, 77, ALL, ALL + 5])
def test_ties_are_broken_by_the_smaller_item_id_also_at_the_kth_place(k):
    rng = np.random.default_rng(k)
    a = rng.integers(0, 3, ALL).astype(np.float32)
    rows = rng.permutation(ALL)
    top = scorer(a)(user(), candidates([rows.tolist()]), k)
    expected = sorted(range(ALL), key=lambda row: (-a[row], row))[:k]
    assert top.rows[top.valid].tolist() == expected
    assert top.rows.shape == (1, k)


def test_every_request_of_a_batch_is_answered_as_if_alone():
    rng = np.random.default_rng(0)
    model = scorer(rng.normal(size=ALL), bid=rng.integers(1, 9, ALL))
    rows, valid = rng.integers(0, ALL, (3, 60)), rng.random((3, 60)) < 0.7
    together = model(user(-1.0, 0.0, 2.0), candidates(rows.tolist(), valid.tolist()), 10)
    for n, number in enumerate((-1.0, 0.0, 2.0)):
        alone = model(user(number), candidates(rows[n : n + 1].tolist(), valid[n : n + 1].tolist()), 10)
        assert torch.equal(alone.rows[0], together.rows[n])
        assert torch.equal(alone.utility[0], together.utility[n])
        assert torch.equal(alone.probs[0], together.probs[n])


def test_a_candidate_that_is_not_valid_never_wins():
    top = scorer(a=[0.0, 1.0, 2.0])(user(), candidates([[2, -7, 0]], [[False, False, True]]), 5)
    assert top.valid.tolist() == [[True, False, False, False, False]]
    assert top.item_ids.tolist() == [[0, -1, -1, -1, -1]]
    assert top.rows.tolist() == [[0, -1, -1, -1, -1]]
    assert top.utility.shape == (1, 5)
    assert top.probs.shape == (1, 5, 2)


def test_a_utility_that_is_not_finite_never_wins_and_is_counted():
    model = scorer(a=[np.nan, 1.0, 5.0, np.nan])
    top = model(user(0.0, np.inf), candidates([[0, 1, 2, 3]] * 2, [[True, True, True, False]] * 2), 4)
    assert top.item_ids[0][top.valid[0]].tolist() == [20, 10]
    assert top.num_nonfinite.tolist() == [1, 1]
    infinite = scorer(a=[1.0, 2.0], terms={"click": float("inf")})(user(), candidates([[0, 1]]), 2)
    assert not infinite.valid.any()
    assert infinite.num_nonfinite.tolist() == [2]


def test_a_probability_that_is_not_finite_never_wins_though_the_utility_does_not_read_it():
    top = scorer(a=[1.0, 1.0, 1.0], b=[0.0, np.nan, 0.0])(user(), candidates([[0, 1, 2]]), 3)
    assert top.item_ids[0][top.valid[0]].tolist() == [0, 20]
    assert top.num_nonfinite.tolist() == [1]


def test_no_candidates_have_no_winners():
    none = torch.zeros(1, 0, dtype=torch.int64)
    top = scorer(a=[1.0])(user(), CandidateSet(none, torch.zeros(1, 0), none.bool()), 3)
    assert top.valid.tolist() == [[False, False, False]]


def test_a_row_given_twice_is_ranked_twice():
    top = scorer(a=[1.0, 2.0])(user(), candidates([[1, 0, 1]]), 3)
    assert top.rows.tolist() == [[1, 1, 0]]


def test_refresh_follows_the_ranker_and_the_state_is_the_behaviour():
    model = scorer(a=[1.0, 2.0, 3.0])
    model.items.features()["a"].copy_(torch.tensor([3.0, 2.0, 1.0]))
    assert model(user(), candidates([[0, 1, 2]]), 1).rows.tolist() == [[2]]
    model.refresh()
    assert model(user(), candidates([[0, 1, 2]]), 1).rows.tolist() == [[0]]
    other = scorer(a=[1.0, 2.0, 3.0])
    other.load_state_dict(model.state_dict())
    assert other(user(), candidates([[0, 1, 2]]), 1).rows.tolist() == [[0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.int64])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_a_tensor_of_the_item_side_is_gathered_by_row_whatever_its_type_and_shape(dtype, shape):
    tensor = torch.randint(0, 100, (7, *shape)).to(dtype)
    rows = torch.tensor([[6, 0, 6], [2, 2, 5]])
    gathered = ItemSide({"x": tensor}).gather(rows)["x"]
    assert gathered.dtype == dtype
    assert torch.equal(gathered, tensor[rows])
    assert ItemSide({"x": tensor}).gather(rows[:, :0])["x"].shape == (2, 0, *shape)


def test_an_item_side_computed_in_pieces_is_that_of_all_items(monkeypatch):
    whole = scorer(a=range(10), b=range(10, 20)).item_side.tensors()
    monkeypatch.setattr("prerank.bundle.scorer._ITEMS_AT_ONCE", 3)
    pieces = scorer(a=range(10), b=range(10, 20)).item_side.tensors()
    assert list(pieces) == list(whole) == ["a", "b"]
    assert all(torch.equal(pieces[name], tensor) for name, tensor in whole.items())


def test_it_runs_in_inference_mode():
    model = scorer(a=[1.0, 2.0])
    with torch.inference_mode():
        assert model(user(), candidates([[0, 1]]), 1).rows.tolist() == [[1]]


def test_of_a_group_no_more_win_than_may_and_the_next_best_take_their_places():
    brands = pa.table({"brand": [1, 1, 1, 2, None, None]})
    model = scorer(a=[6.0, 5.0, 4.0, 3.0, 2.0, 1.0], diversity=Diversity.build({"brand": DiversityRule(2)}, brands))
    asked = candidates([[5, 4, 3, 2, 1, 0]], [[True, True, True, True, False, True]])
    assert model(user(), candidates([[5, 4, 3, 2, 1, 0]]), 9).rows.tolist() == [[0, 1, 3, 4, 5, -1, -1, -1, -1]]
    assert model(user(), asked, 3).rows.tolist() == [[0, 2, 3]]
    assert "diversity.codes" in model.state_dict()


def test_what_is_below_the_reserve_or_a_floor_never_wins_takes_no_place_and_is_counted():
    reserve = Reserve(("click", "like"), Rules(reserve_micros=0.9, floor={"like": 0.25}))
    one = Diversity.build({"brand": DiversityRule(1)}, pa.table({"brand": [1, 1, 2, 3, 4, 5]}))
    # item 0 is the best and liked too little, 3 is worth too little, 4 is not valid, 5 is worth nothing finite
    rules = {"reserve": reserve}
    model = scorer(a=[9.0, 8.0, 7.0, 1.0, 0.0, np.nan], b=[-3.0, 0.0, 0.0, 0.0, -3.0, 0.0], diversity=one, rules=rules)
    top = model(user(), candidates([[0, 1, 2, 3, 4, 5]], [[True, True, True, True, False, True]]), 6)
    assert top.rows[top.valid].tolist() == [1, 2]
    assert top.num_below.tolist() == [2]
    assert top.num_nonfinite.tolist() == [1]
    assert scorer(a=[1.0])(user(), candidates([[0]]), 1).num_below.tolist() == [0]


class Halved(Rule):
    """Items that are `worn` are worth half."""

    why = "worn"

    def __init__(self, num_rows):
        super().__init__()
        self.register_buffer("worn", torch.zeros(num_rows, dtype=torch.bool))

    @classmethod
    def build(cls, tasks, rules, num_rows):
        return cls(num_rows)

    def adjust(self, probs, utility, rows):
        return torch.where(self.worn[rows], utility / 2, utility)

    def put(self, rows, items):
        self.worn[rows] = torch.from_numpy(items["worn"].to_numpy().copy())


def halved(*worn):
    rule = Halved(len(worn))
    rule.put(torch.arange(len(worn)), pa.table({"worn": list(worn)}))
    return rule


def test_a_rule_changes_the_utility_and_every_rule_judges_what_all_of_them_left():
    # probabilities of one half: the utility is half the bid
    bid = [8, 6, 4, 2]
    reserve = Reserve(("click", "like"), Rules(reserve_micros=2.5))
    for rules in ({"reserve": reserve, "halved": halved(True, False, True, False)},
                  {"halved": halved(True, False, True, False), "reserve": reserve}):  # fmt: skip
        model = scorer([0.0] * 4, bid=bid, rules=rules)
        top = model(user(0.0), candidates([[0, 1, 2, 3]]), 4)
        assert top.rows[top.valid].tolist() == [1]
        assert top.utility[top.valid].tolist() == [3.0]
        assert top.num_below.tolist() == [3]
    top = scorer([0.0] * 4, bid=bid, rules={"halved": halved(True, False, False, False)})(
        user(0.0), candidates([[0, 1, 2, 3]]), 4
    )
    assert top.rows.tolist() == [[1, 0, 2, 3]]
    assert top.num_below.tolist() == [0]


def test_what_a_rule_keeps_of_the_items_is_in_the_state_and_rows_of_it_are_put_anew():
    new, old = (scorer([0.0] * 3, bid=[8, 6, 4], rules={"halved": halved(*worn)}) for worn in ([False] * 3, [True] * 3))
    assert "halved.worn" in new.state_dict()
    new.load_state_dict(old.state_dict())
    assert new(user(0.0), candidates([[0, 1, 2]]), 3).utility.tolist() == [[2.0, 1.5, 1.0]]
    with torch.inference_mode():
        new.rules["halved"].put(torch.tensor([2, 0]), pa.table({"worn": [False, False]}))
    assert new(user(0.0), candidates([[0, 1, 2]]), 3).utility.tolist() == [[4.0, 2.0, 1.5]]


def test_what_a_rule_makes_not_finite_cannot_win():
    class Broken(Halved):
        def adjust(self, probs, utility, rows):
            return utility.masked_fill(rows == 0, torch.nan)

    top = scorer([0.0] * 2, rules={"broken": Broken(2)})(user(0.0), candidates([[0, 1]]), 2)
    assert top.rows.tolist() == [[1, -1]]
    assert (top.num_nonfinite.tolist(), top.num_below.tolist()) == ([1], [0])


def test_each_rule_says_why_what_it_keeps_out_cannot_win():
    rules = {"reserve": Reserve((), Rules(reserve_micros=1.0)), "halved": Halved(1)}
    assert scorer([0.0], rules=rules).why_below == "below the reserve or a floor or worn"


def test_a_rule_of_the_name_of_a_part_of_the_scorer_is_a_mistake():
    for name in ("items", "live", "item_side"):
        with pytest.raises(AssertionError, match=f"a rule cannot be called '{name}'"):
            scorer([0.0], rules={name: Halved(1)})


def test_groups_of_other_items_are_refused():
    brands = Diversity.build({"brand": DiversityRule(2)}, pa.table({"brand": [1, 1, 2]}))
    with pytest.raises(SchemaMismatch, match="diversity has the groups of 3 items, expected 2"):
        scorer(a=[1.0, 2.0], diversity=brands)


def test_the_compiler_sees_the_whole_of_it_in_one_graph():
    brands = Diversity.build({"brand": DiversityRule(1)}, pa.table({"brand": [1, 1, 2, None]}))
    rules = {
        "reserve": Reserve(("click", "like"), Rules(reserve_micros=0.1)),
        "halved": halved(False, True, False, True),
    }
    model = scorer(a=[1.0, 2.0, 3.0, 4.0], diversity=brands, rules=rules)
    compiled = torch.compile(model.forward, backend="eager", fullgraph=True)
    asked = candidates([[3, 2, 1, 0]])
    for k in (2, 3, 6):
        found, expected = compiled(user(), asked, k), model(user(), asked, k)
        assert all(torch.equal(getattr(found, f.name), getattr(expected, f.name)) for f in fields(expected))


def test_a_utility_of_a_value_the_items_lack_is_refused():
    with pytest.raises(SchemaMismatch, match=r"the utility reads 'price', and the items have \['a', 'b', 'bid'\]"):
        scorer(a=[1.0], terms={"click": "price"})


def test_the_values_of_candidates_are_worth_in_place_of_the_items_own():
    model = scorer(a=[0.0, 0.0, 0.0], bid=[1, 2, 3])
    asked = candidates([[0, 1, 2], [0, 1, 2]])
    bids = torch.tensor([[30.0, 20.0, 10.0], [1.0, float("nan"), 5.0]])
    top = model(user(0.0, 0.0), replace(asked, values={"bid": bids}), 3)
    assert top.item_ids.tolist() == [[0, 10, 20], [20, 0, -1]]
    assert top.utility[top.valid].tolist() == [15.0, 10.0, 5.0, 2.5, 0.5]
    assert top.num_nonfinite.tolist() == [0, 1]
    model.live.change([0], [ItemChange(0, pacing=0.1)])
    assert model(user(), replace(candidates([[0, 1, 2]]), values={"bid": bids[:1]}), 1).item_ids.tolist() == [[10]]
    assert model(user(), candidates([[0, 1, 2]]), 1).item_ids.tolist() == [[20]]
