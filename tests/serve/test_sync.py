"""Which version each shard is asked in, and how what they find becomes one list."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from prerank.serve.sync import Part, choose, merge

versions = st.sampled_from("abcde")


@given(st.lists(st.frozensets(versions), max_size=6), st.lists(versions, unique=True))
def test_a_shard_is_asked_in_a_version_it_holds_and_in_one_with_the_others_where_that_can_be(held, usable):
    chosen = choose(held, usable)
    for version, has in zip(chosen, held, strict=True):
        assert (version in has and version in usable) if version is not None else not (has & set(usable))
    common = [version for version in usable if held and all(version in has for has in held)]
    if common:
        assert chosen == [common[0]] * len(held), "of several that all hold, the preferred"


def test_as_few_versions_as_can_be_and_of_as_good_ones_the_preferred():
    assert choose(["ab", "a", "ab"], ["b", "a"]) == ["a", "a", "a"]
    assert choose(["b", "a", "ab", "c", ""], ["b", "a"]) == ["b", "a", "b", None, None]


def part(version: str, rows: list[int], similarity: list[float], num: int) -> Part:
    return Part(version, torch.tensor(rows), torch.tensor(similarity), num)


def test_of_one_version_the_most_similar_of_all_shards():
    rows, similarity = merge([part("a", [5, 9], [3.0, 1.0], 10), part("a", [2, 4], [2.0, 1.0], 10)], 3)
    assert rows.tolist() == [5, 2, 4], "of equals the smaller row"
    assert similarity.tolist() == [3.0, 2.0, 1.0]


def test_a_row_that_two_found_is_there_once_at_its_best():
    rows, similarity = merge([part("a", [5, 9], [3.0, 1.0], 10), part("a", [9], [2.0], 1)], 5)
    assert (rows.tolist(), similarity.tolist()) == ([5, 9], [3.0, 2.0])


def test_nothing_is_merged_to_nothing():
    assert [len(one) for one in merge([], 5)] == [0, 0]
    assert [len(one) for one in merge([part("a", [], [], 0), part("b", [], [], 0)], 5)] == [0, 0]


@given(st.floats(1e-3, 1e3), st.integers(1, 40))
def test_between_versions_what_similarities_are_changes_nothing(factor, k):
    first = part("a", list(range(40)), [-float(n) for n in range(40)], 300)
    second = part("b", list(range(40, 60)), [-float(n) for n in range(20)], 100)
    louder = Part("b", second.rows, second.similarity * factor + factor, 100)
    rows, similarity = merge([first, second], k)
    assert torch.equal(rows, merge([first, louder], k)[0])
    assert bool(similarity.isnan().all())


def test_between_versions_each_has_the_share_of_the_candidates_that_it_has_of_the_items():
    first = part("a", list(range(1000)), [-float(n) for n in range(1000)], 3000)
    second = part("b", list(range(1000, 2000)), [-float(n) for n in range(1000)], 1000)
    rows, _ = merge([first, second], 400)
    best = rows[:400]
    assert int((best < 1000).sum()) == 300
    assert best.tolist()[:4] == [0, 1, 1000, 2]
    few_more = 2 * math.ceil(3 * math.sqrt(400 * 0.75 * 0.25)) + 2
    assert 400 < len(rows) <= 400 + few_more
    assert rows[rows < 1000].tolist() == sorted(rows[rows < 1000].tolist()), "the order of each version is kept"


def test_the_best_of_one_version_are_among_what_two_shards_of_different_versions_give():
    """That is what the few more than k are for: the best 400 are not just half and half in the two shards."""
    torch.manual_seed(0)
    for _ in range(20):
        similarity = torch.randn(10_000)
        in_first = torch.rand(10_000) < 0.5
        parts = []
        for name, mine in (("a", in_first), ("b", ~in_first)):
            rows = mine.nonzero().squeeze(1)
            order = similarity[rows].argsort(descending=True)[:400]
            parts.append(Part(name, rows[order], similarity[rows[order]], len(rows)))
        best = set(similarity.topk(400).indices.tolist())
        assert len(best & set(merge(parts, 400)[0].tolist())) >= 399
