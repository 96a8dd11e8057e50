"""Places of ids: natively and by bisection, against a dictionary."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prerank.kernels import native
from prerank.kernels.lookup import Lookup, bisected

LEAST, MOST = np.iinfo(np.int64).min, np.iinfo(np.int64).max
WAYS = {"bisected": lambda ids, wanted: bisected(ids, wanted), "lookup": lambda ids, wanted: Lookup(ids).find(wanted)}


@pytest.fixture(params=WAYS)
def find(request):
    return WAYS[request.param]


def holds(find, ids, wanted):
    places = {int(one): place for place, one in enumerate(ids)}
    found = find(ids, wanted)
    assert found.dtype == np.int64
    assert found.shape == wanted.shape
    assert found.ravel().tolist() == [places.get(int(one), -1) for one in wanted.ravel()]


@st.composite
def questions(draw):
    """Ids that are close, far apart, or end in the same bits, and some that are not there."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num, step = draw(st.integers(1, 300)), draw(st.sampled_from([1, 3, 1 << 20, 1 << 40, 11400714819323198485 >> 8]))
    first = draw(st.sampled_from([0, -150, LEAST, 7]))
    drawn = np.unique(rng.choice(2 * num, num)).astype(object) * step + first
    ids = np.array(sorted({((int(one) - LEAST) % 2**64) + LEAST for one in drawn}), np.int64)
    absent = np.concatenate([ids[ids > LEAST] - 1, [LEAST, MOST, 0]])
    return ids, rng.choice(np.concatenate([ids, absent]), draw(st.integers(0, 200)))


@given(questions())
@settings(max_examples=100)
def test_places_are_a_dictionarys(question):
    for find in WAYS.values():
        holds(find, *question)


def test_as_many_as_fill_the_table_most(find):
    for num in (1, 2, 3, 6, 12, 96, 97, 12_288, 12_289):  # three quarters of a power of two, and one more
        ids = np.arange(num) * 5
        holds(find, ids, np.arange(-3, min(5 * num + 3, 2_000)))


def test_any_shape_and_any_strides(find):
    ids = np.arange(0, 100, 2)
    holds(find, ids, np.arange(12).reshape(3, 4))
    holds(find, ids, np.arange(24).reshape(4, 6)[::2, ::3])
    holds(find, np.arange(0, 400)[::2], np.arange(30))
    holds(find, ids, np.zeros((0, 5), np.int64))
    holds(find, ids, np.array(4))


def test_no_ids_have_no_places(find):
    holds(find, np.zeros(0, np.int64), np.arange(3))


def test_without_native_kernels_it_bisects(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    lookup = Lookup(np.array([3, 5]))
    assert lookup._places is None
    assert lookup.find(np.array([5, 4])).tolist() == [1, -1]


def test_other_integers_are_taken_for_what_they_are(find):
    assert find(np.array([3, 5]), np.array([5, 4], np.int32)).tolist() == [1, -1]
