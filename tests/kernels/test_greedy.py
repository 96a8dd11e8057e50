import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prerank.kernels import greedy, native
from prerank.kernels.greedy import by_triton, greedy_top_k, reference
from tests.kernels.ways import ways

WAYS = ways(greedy_top_k, reference, by_triton, operation=torch.ops.prerank.greedy_top_k.default)
BEST, WORST = np.finfo(np.float32).max, np.finfo(np.float32).min


@pytest.fixture(params=WAYS)
def top_k(request):
    return request.param


def expected(utility, rows, valid, groups, at_most, k):
    """What greedy is: one request, plain Python."""
    won, held = [], {}
    order = [n for n in range(len(rows)) if valid[n] and math.isfinite(utility[n])]
    for n in sorted(order, key=lambda n: (-utility[n], rows[n], n)):
        own = [(rule, codes[n]) for rule, codes in enumerate(groups) if codes[n] >= 0]
        if len(won) < k and all(held.get(group, 0) < at_most[group[0]] for group in own):
            won.append(n)
            held.update({group: held.get(group, 0) + 1 for group in own})
    return won + [-1] * (k - len(won))


def holds(top_k, utility, rows, valid, groups, at_most, k):
    """Every request is answered as by plain Python."""
    given = (
        torch.as_tensor(np.asarray(utility, np.float32)),
        torch.as_tensor(np.asarray(rows, np.int64)),
        torch.as_tensor(np.asarray(valid, bool)),
        torch.as_tensor(np.asarray(groups, np.int32)),
        torch.as_tensor(np.asarray(at_most, np.int64)),
    )
    found = top_k(*given, k)
    assert found.dtype == torch.int64
    for b in range(len(found)):
        one = [tensor[b].tolist() for tensor in given[:4]]
        assert found[b].tolist() == expected(*one, at_most, k)


@st.composite
def requests(draw):
    """Few values, few rows and few groups, so that everything ties and every group fills."""
    seed, num, rules = draw(st.integers(0, 2**32 - 1)), draw(st.integers(0, 60)), draw(st.integers(0, 4))
    rng = np.random.default_rng(seed)
    values = np.array([0.0, -0.0, 1.0, -1.0, 1e-45, np.nan, np.inf, -np.inf, BEST, WORST, 2.5, 2.5000002], np.float32)
    return (
        rng.choice(values[: draw(st.integers(1, len(values)))], (2, num)),
        rng.integers(-3, 2**40 if draw(st.booleans()) else 3, (2, num)),
        rng.random((2, num)) < draw(st.sampled_from([0.0, 0.5, 1.0])),
        rng.integers(-2, draw(st.sampled_from([1, 3, 2**31 - 1])), (2, rules, num)),
        rng.integers(0, 4, rules),
        draw(st.integers(0, 70)),
    )


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=200, deadline=None)
@given(requests())
def test_it_is_plain_greedy_whatever_ties(way, asked):
    holds(way, *asked)


def test_without_the_library_torch_answers_the_same(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(native, "library", lambda: None)
    holds(greedy_top_k, [[3.0, 2.0, 1.0]], [[0, 1, 2]], [[True] * 3], [[[0, 0, 1], [0, 1, 1]]], [1, 1], 3)


@pytest.mark.parametrize("spread", ["wide", "narrow", "one value", "few values"])
@pytest.mark.parametrize("at_most", [[1, 1], [3, 1000], [10**9, 10**9], [1, 0]])
def test_when_the_best_thousands_do_not_make_k_more_of_them_follow(top_k, spread, at_most):
    # interpreted, tens of blocks stand for hundreds
    rng, num = np.random.default_rng(len(at_most)), 3_000 if top_k is by_triton else 30_000
    utility = {
        "wide": rng.lognormal(0, 20, (1, num)),
        "narrow": 1 + rng.random((1, num)) * 1e-3,
        "one value": np.full((1, num), 7.0),
        "few values": rng.integers(-2, 3, (1, num)),
    }[spread].astype(np.float32)
    # the best ones are nearly all of one group
    first = np.where(utility >= np.quantile(utility, 0.3), 0, rng.integers(0, 50, (1, num)))
    groups = np.stack([first, rng.integers(-1, 400, (1, num))], axis=1)
    rows = rng.permutation(num)[None] // 2
    holds(top_k, utility, rows, rng.random((1, num)) < 0.9, groups, at_most, 700)


def test_without_rules_it_is_the_exact_top_k(top_k):
    rng = np.random.default_rng(0)
    utility, rows = rng.integers(0, 50, (3, 9000)).astype(np.float32), rng.integers(0, 10**6, (3, 9000))
    for k in (0, 1, 500, 9000, 9100):
        holds(top_k, utility, rows, np.ones((3, 9000), bool), np.zeros((3, 0, 9000)), [], k)


def test_two_rules_are_not_their_masks_one_after_the_other(top_k):
    # the second is turned away by the first rule, so its creative is still free for the third
    holds(top_k, [[3.0, 2.0, 1.0]], [[0, 1, 2]], [[True] * 3], [[[0, 0, 1], [0, 1, 1]]], [1, 1], 3)
    found = greedy_top_k(*case(), 3)
    assert found.tolist() == [[0, 2, -1]]


def case():
    return (
        torch.tensor([[3.0, 2.0, 1.0]]),
        torch.tensor([[0, 1, 2]]),
        torch.ones(1, 3, dtype=torch.bool),
        torch.tensor([[[0, 0, 1], [0, 1, 1]]], dtype=torch.int32),
        torch.tensor([1, 1]),
    )


def test_groups_may_have_any_strides(top_k):
    rng = np.random.default_rng(5)
    codes = torch.as_tensor(rng.integers(-1, 4, (200, 3)).astype(np.int32))
    rows = torch.as_tensor(rng.integers(0, 200, (2, 64)))
    utility, valid, at_most = torch.rand(2, 64), torch.rand(2, 64) < 0.8, torch.tensor([2, 3, 4])
    strided = codes[rows].permute(0, 2, 1)
    assert not strided.is_contiguous()
    found = top_k(utility, rows, valid, strided, at_most, 20)
    assert torch.equal(found, top_k(utility, rows, valid, strided.contiguous(), at_most, 20))
    holds(top_k, utility, rows, valid, strided, at_most.tolist(), 20)


def test_other_tensors_may_have_any_strides_too(top_k):
    utility, rows = torch.rand(64, 2), torch.randint(0, 9, (64, 2))
    valid = torch.rand(64, 2) < 0.5
    none, never = torch.zeros(2, 0, 64, dtype=torch.int32), torch.zeros(0, dtype=torch.int64)
    found = top_k(utility.T, rows.T, valid.T, none, never, 9)
    holds(lambda *_: found, utility.T, rows.T, valid.T, none, [], 9)


@pytest.mark.parametrize(
    ("place", "wrong", "said"),
    [
        (
            0,
            torch.zeros(1, 3, dtype=torch.float64),
            "expected utility float32 [B, N] on cpu, got float64 [1, 3] on cpu",
        ),
        (1, torch.zeros(1, 4, dtype=torch.int64), "expected rows int64 [B=1, N=3] on cpu, got int64 [1, 4] on cpu"),
        (2, torch.ones(3, dtype=torch.bool), "expected valid bool [B=1, N=3] on cpu, got bool [3] on cpu"),
        (3, torch.zeros(1, 2, 3), "expected groups int32 [B=1, G, N=3] on cpu, got float32 [1, 2, 3] on cpu"),
        (4, torch.ones(3, dtype=torch.int64), "expected at_most int64 [G=2] on cpu, got int64 [3] on cpu"),
        (5, -1, "expected k of 0 or more, got -1"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_kernel_sees_it(place, wrong, said):
    asked = [*case(), 2]
    asked[place] = wrong
    with pytest.raises(ValueError, match=re.escape(said)):
        greedy_top_k(*asked)


def test_the_compiler_sees_through_it():
    def doubled(utility, rows, valid, groups, at_most, k):
        return greedy.greedy_top_k(utility * 2, rows, valid, groups, at_most, k) + 1

    compiled = torch.compile(doubled, backend="eager", fullgraph=True)
    assert compiled(*case(), 3).tolist() == [[1, 3, 0]]
    torch.library.opcheck(torch.ops.prerank.greedy_top_k.default, (*case(), 3))


def test_it_runs_in_inference_mode():
    with torch.inference_mode():
        assert greedy_top_k(*case(), 1).tolist() == [[0]]
