"""Target attention against a softmax written out, and what it must not feel: padding, order of candidates, others."""

import numpy as np
import pytest
import torch

from prerank.models.attention import TargetAttention

LENGTH, WIDTH, HEADS, DIM, ITEMS = 5, 6, 2, 3, 9


@pytest.fixture
def attention():
    """With every weight drawn: the learned nothing is zeros when new."""
    torch.manual_seed(0)
    made = TargetAttention(LENGTH, WIDTH, HEADS, DIM, 0.0).eval()
    with torch.no_grad():
        for weights in made.parameters():
            weights.normal_()
    return made


@pytest.fixture
def table():
    return torch.randn(ITEMS, WIDTH, generator=torch.Generator().manual_seed(1))


def attended(attention, table, rows, candidates):
    """Histories of rows [B, L] for candidates [B, N], each rows of the table -> [B, N, heads * dim]."""
    rows, candidates = torch.tensor(rows), torch.tensor(candidates)
    key, value, bias = attention.keys(rows, table)
    return attention(attention.queries(table)[candidates], key, value, bias)


def by_hand(attention, table, rows, candidate):
    """One candidate over one history: a softmax a head over its events and the learned nothing, then each head's log
    of what its weights were divided by."""
    weights = {name: one.detach().numpy() for name, one in attention.named_parameters()}
    vectors, out, sums = table.numpy(), [], []
    places = [place for place, row in enumerate(rows) if row >= 0]
    present = [rows[place] for place in places]
    for head in range(HEADS):
        of_head = slice(head * DIM, (head + 1) * DIM)
        query, keys, values = (
            vectors[which] @ weights[f"{name}.weight"][of_head].T
            for name, which in (("query", candidate), ("key", present), ("value", present))
        )
        keys = np.concatenate([weights["nothing"][0, head], keys])
        values = np.concatenate([weights["nothing"][1, head], values])
        logits = keys @ query / np.sqrt(DIM) + np.concatenate([[0], weights["position"][head, places]])
        weights_of = np.exp(logits)
        out.append(weights_of / weights_of.sum() @ values)
        sums.append([np.log(weights_of.sum())])
    return np.concatenate([*out, *sums])


ROWS = [[-1, -1, 3, 7, 3], [0, 1, 2, 3, 4], [-1, -1, -1, -1, 8]]


def test_it_is_a_softmax_over_the_history_and_a_learned_nothing(attention, table):
    candidates = [[3, 0, 8, 3], [5, 6, 7, 8], [1, 1, 2, 3]]
    found = attended(attention, table, ROWS, candidates)
    assert found.shape == (3, 4, attention.width)
    assert attention.width == HEADS * DIM + HEADS
    for rows, wanted, out in zip(ROWS, candidates, found.detach().numpy(), strict=True):
        for candidate, one in zip(wanted, out, strict=True):
            np.testing.assert_allclose(one, by_hand(attention, table, rows, candidate), rtol=1e-4, atol=1e-5)


def test_what_pads_a_history_has_no_effect(attention, table):
    """Row 0 stands in where there is none."""
    before = attended(attention, table, [[-1, -1, 3, 7, 3]], [[3, 8]])
    table[0] = 1e6
    torch.testing.assert_close(attended(attention, table, [[-1, -1, 3, 7, 3]], [[3, 8]]), before)
    with torch.no_grad():
        attention.position[:, :2] = 1e6
    torch.testing.assert_close(attended(attention, table, [[-1, -1, 3, 7, 3]], [[3, 8]]), before)


def test_a_long_table_and_a_short_one_are_read_alike(attention, table):
    """Rows are mapped before they are looked up where that is less work, and after it where not."""
    longer = torch.cat([table, torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(2))])
    candidates = [[3, 0, 8], [5, 6, 7], [1, 4, 2]]
    assert len(table) < 3 * LENGTH < len(longer)
    expected = attended(attention, table, ROWS, candidates)
    torch.testing.assert_close(attended(attention, longer, ROWS, candidates), expected)


def test_no_history_gives_the_learned_nothing_to_every_candidate(attention, table):
    found = attended(attention, table, [[-1] * LENGTH, [-1, -1, -1, -1, 2]], [[3, 0, 8]] * 2)
    torch.testing.assert_close(found[0, :, : HEADS * DIM], attention.nothing[1].flatten().expand(3, -1))
    assert not torch.allclose(found[1], found[0])


def test_candidates_in_another_order_are_answered_in_that_order(attention, table):
    order = [2, 0, 3, 1]
    candidates = torch.tensor([[3, 0, 8, 5], [5, 6, 7, 8], [1, 4, 2, 3]])
    found = attended(attention, table, ROWS, candidates.tolist())
    torch.testing.assert_close(attended(attention, table, ROWS, candidates[:, order].tolist()), found[:, order])


def test_a_candidate_does_not_feel_the_others_and_a_request_not_the_others(attention, table):
    together = attended(attention, table, ROWS, [[3, 0], [5, 6], [1, 4]])
    for row, (rows, candidates) in enumerate(zip(ROWS, [[3, 0], [5, 6], [1, 4]], strict=True)):
        for place, candidate in enumerate(candidates):
            alone = attended(attention, table, [rows], [[candidate]])
            torch.testing.assert_close(alone[0, 0], together[row, place])


def test_the_newest_event_counts_most_when_all_are_alike_and_nothing_is_learned_yet(table):
    made = TargetAttention(LENGTH, WIDTH, HEADS, DIM, 0.0)
    rows = torch.tensor([[2, 2, 2, 2, 2]])
    _, _, bias = made.keys(rows, table)
    assert (bias[0, :, 0, 1:].diff(dim=-1) > 0).all()
    assert (bias[0, :, 0, 0] == bias[0, :, 0, -1]).all(), "nothing weighs as the newest does"


def test_events_are_hidden_in_training_alone_at_the_dropout_rate(table):
    torch.manual_seed(0)
    made = TargetAttention(LENGTH, WIDTH, HEADS, DIM, 0.25)
    rows = torch.zeros(2000, LENGTH, dtype=torch.int64)
    _, _, bias = made.train().keys(rows, table)
    hidden = bias.isinf()[..., 1:]
    assert hidden.float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert (hidden == hidden[:, :1]).all(), "an event is hidden from all heads"
    assert not bias[..., 0].isinf().any(), "the learned nothing never is"
    assert not made.eval().keys(rows, table)[2].isinf().any()


def test_every_weight_learns_beside_an_empty_history(attention, table):
    rows = torch.tensor([*ROWS, [-1] * LENGTH])
    sides = attention.keys(rows, table)
    attention(attention.queries(table)[:4].expand(4, -1, -1), *sides).square().sum().backward()
    for name, weights in attention.named_parameters():
        assert weights.grad.isfinite().all(), name
        assert weights.grad.any(), name
