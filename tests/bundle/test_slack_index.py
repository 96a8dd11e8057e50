"""An index of the rows of slack alone finds what the whole one would where nothing that was published is found."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from prerank.bundle.slack_index import SlackIndex
from prerank.index.exact import ExactIndex
from prerank.index.storage import STORAGES

FIRST, NUM, WIDTH = 7, 5, 3


@given(
    st.sampled_from(list(STORAGES)),
    st.lists(st.tuples(st.integers(0, FIRST + NUM - 1), st.booleans()), max_size=12),
    st.sampled_from([None, "rows", "mask"]),
    st.integers(0, 2**16),
)
def test_it_finds_what_came_by_its_row_and_nothing_that_was_published(storage, puts, given_as, seed):
    draw = torch.Generator().manual_seed(seed)
    whole = ExactIndex(torch.full((FIRST + NUM, WIDTH), torch.nan), storage)
    slack = SlackIndex(FIRST, NUM, WIDTH, storage)
    for row, is_new in puts:
        vectors = torch.randn(1, WIDTH, generator=draw) if is_new else None
        slack.put(torch.tensor([row]), vectors)
        if row >= FIRST:
            whole.put(torch.tensor([row]), vectors)
    query, eligible = torch.randn(2, WIDTH, generator=draw), None
    if given_as is not None:
        mask = torch.rand(FIRST + NUM, generator=draw) < 0.7
        eligible = mask if given_as == "mask" else mask.nonzero().squeeze(1)
    expected, found = whole.search(query, 4, eligible), slack.search(query, 4, eligible)
    assert torch.equal(found.rows, expected.rows)
    assert torch.equal(found.similarity, expected.similarity)
    assert torch.equal(found.valid, expected.valid)


def test_without_slack_nothing_is_found_and_what_leaves_is_let_be():
    index = SlackIndex(FIRST, 0, WIDTH, "float32")
    index.put(torch.tensor([2, 6]), None)
    index.own()
    assert not index.search(torch.ones(1, WIDTH), 2, None).valid.any()
