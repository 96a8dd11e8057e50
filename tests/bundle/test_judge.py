from dataclasses import fields, replace

import numpy as np
import pyarrow as pa
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prerank.bundle.judge import Judged, Ranked, joined
from prerank.business.diversity import Diversity
from prerank.business.reserve import Reserve
from prerank.config import DiversityRule, Rules
from prerank.types import CandidateSet, ItemChange
from tests.bundle.test_scorer import candidates, scorer, user

NUM_ITEMS = 12


@st.composite
def worlds(draw):
    """A scorer with few values and few groups, some items off, and two requests of up to 40 of its candidates."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = rng.choice([-np.inf, np.nan, 0.0, 1.0, -1.0], (2, NUM_ITEMS), p=[0.05, 0.05, 0.3, 0.3, 0.3])
    brands = pa.table({"brand": rng.integers(0, 3, NUM_ITEMS), "maker": rng.integers(0, 5, NUM_ITEMS)})
    capped = draw(st.sampled_from([[], ["brand"], ["brand", "maker"]]))
    bounds = {name: DiversityRule(draw(st.integers(1, 3))) for name in capped}
    model = scorer(
        *logits.astype(np.float32),
        bid=rng.integers(0, 3, NUM_ITEMS),
        diversity=Diversity.build(bounds, brands) if bounds else None,
        rules={"reserve": Reserve(("click", "like"), Rules(0.6, {"like": 0.4}))} if draw(st.booleans()) else {},
    )
    off = [ItemChange(10 * row, on=False) for row in range(NUM_ITEMS) if rng.random() < 0.2]
    model.live.change([one.item_id // 10 for one in off], off)
    num = draw(st.integers(1, 40))
    rows, valid = rng.integers(0, NUM_ITEMS, (2, num)), rng.random((2, num)) < 0.8
    slots = torch.from_numpy(np.where(rng.random((2, num)) < 0.1, -1, rows)) if draw(st.booleans()) else None
    own = {"bid": torch.from_numpy(rng.integers(0, 4, (2, num))).float()} if draw(st.booleans()) else {}
    asked = replace(candidates(rows.tolist(), valid.tolist()), slots=slots, values=own)
    return model, asked


def piece(asked: CandidateSet, start: int, end: int) -> CandidateSet:
    part = (slice(None), slice(start, end))
    return CandidateSet(
        asked.rows[part],
        asked.similarity[part],
        asked.valid[part],
        None if asked.slots is None else asked.slots[part],
        values={name: column[part] for name, column in asked.values.items()},
    )


def assert_same(one, other, kind):
    for field in fields(kind):
        torch.testing.assert_close(getattr(one, field.name), getattr(other, field.name), rtol=0, atol=0, equal_nan=True)


@settings(max_examples=150, deadline=None)
@given(worlds(), st.lists(st.integers(1, 40), max_size=4), st.integers(0, 50))
def test_candidates_judged_in_pieces_have_the_winners_of_those_judged_at_once(world, cuts, k):
    model, asked = world
    num = asked.rows.shape[1]
    ends = sorted({*(cut for cut in cuts if cut < num), num})
    pieces = [piece(asked, start, end) for start, end in zip([0, *ends], ends, strict=False)]
    whole = joined([model.judge(user(0.0, 0.5), one) for one in pieces])
    assert_same(whole, model.judge(user(0.0, 0.5), asked), Judged)
    assert_same(model.winners(whole, k), model.rank(user(0.0, 0.5), asked, k), Ranked)


def test_an_item_that_took_another_row_keeps_its_place_among_equals():
    model = scorer([0.0] * 3)
    model.items.item_ids[0] = 25
    model.items.move(torch.tensor([0, 25]), torch.tensor([-1, 0]))
    top = model.winners(model.judge(user(), candidates([[0, 1, 2]])), 3)
    assert top.item_ids.tolist() == [[10, 20, 25]]


def test_what_cannot_win_is_counted_once_whatever_the_pieces():
    model = scorer([np.nan, 5.0, 0.0, 1.0], rules={"reserve": Reserve(("click", "like"), Rules(reserve_micros=0.6))})
    parts = [candidates([[0, 1]], [[True, False]]), replace(candidates([[2, 3]]), slots=torch.tensor([[2, -1]]))]
    top = model.winners(joined([model.judge(user(), one) for one in parts]), 2)
    assert top.valid.tolist() == [[False, False]]
    counts = top.num_nonfinite.tolist(), top.num_below.tolist(), top.num_absent.tolist()
    assert counts == ([1], [1], [1])
