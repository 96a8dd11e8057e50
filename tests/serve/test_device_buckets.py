from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prerank.serve.device_buckets import COMMON, Buckets, Shape, best_sizes


def padded(sizes, seen):
    return sum(count * (min(size for size in sizes if size >= num) - num) for num, count in seen.items())


@given(st.dictionaries(st.integers(1, 40), st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 5))
def test_no_sizes_pad_less_and_of_equally_good_ones_there_are_none_fewer(seen, at_most):
    found = best_sizes(seen, at_most, granule=4)
    possible = range(4, 44, 4)
    every = [one for num in range(1, at_most + 1) for one in combinations(possible, num) if one[-1] >= max(seen)]
    least = min(padded(one, seen) for one in every)
    assert padded(found, seen) == least
    assert len(found) == min(len(one) for one in every if padded(one, seen) == least)
    assert list(found) == sorted(set(found))
    assert all(size % 4 == 0 for size in found)


def test_where_nobody_asked_yet_the_sizes_are_the_common_ones():
    assert Buckets.fit({}).sizes == COMMON
    assert Buckets.fit({0: 5}, largest=5000).sizes == (1024, 4096, 5000)


def test_what_is_cut_wants_the_largest_size_there_may_be():
    assert Buckets.fit({300: 5, 900: 1, 5000: 1}, at_most=3, largest=2048).sizes == (512, 1024, 2048)
    assert Buckets.fit({300: 5, 900: 1, 5000: 1}, at_most=1, largest=2048).sizes == (2048,)
    assert Buckets.fit({300: 5, 900: 1}, at_most=3, largest=2048).sizes == (512, 1024)
    assert Buckets.fit({900: 1}, largest=1000).sizes == (1000,)


sizes = st.lists(st.integers(1, 50), min_size=1, max_size=4, unique=True).map(lambda found: tuple(sorted(found)))
buckets = st.builds(Buckets, sizes, st.integers(1, 200), st.integers(1, 20))


@given(buckets, st.integers(0, 300))
def test_the_pieces_are_all_candidates_once_and_each_fits(those, num):
    pieces = those.pieces(num)
    assert [at for start, end in pieces for at in range(start, end)] == list(range(num))
    assert all(end - start <= those.size_of(end - start) for start, end in pieces)
    assert (len(pieces) == 1) == (num <= those.largest)


@given(buckets, st.data())
def test_a_batch_has_a_shape_that_was_captured_and_it_holds_every_request(those, data):
    size = data.draw(st.sampled_from(those.sizes))
    smaller = max((one for one in those.sizes if one < size), default=-1)
    nums = data.draw(st.lists(st.integers(smaller + 1, size), min_size=1, max_size=those.most_of(size)))
    shape = those.shape_of(nums)
    assert shape in those.shapes()
    assert (shape.candidates, len(nums) <= shape.requests < 2 * len(nums)) == (size, True)
    assert shape.requests == 1 or shape.requests * shape.candidates <= those.together


@given(buckets)
def test_the_first_shape_is_the_largest_and_each_is_there_once(those):
    shapes = those.shapes()
    cells = [one.requests * one.candidates for one in shapes]
    assert cells == sorted(cells, reverse=True)
    assert len(set(shapes)) == len(shapes)


def test_small_requests_share_and_large_ones_are_alone():
    those = Buckets((1024, 4096, 32768), together=16384, most_requests=8)
    assert [those.most_of(size) for size in those.sizes] == [8, 4, 1]
    assert those.shape_of([1000, 3, 1024]) == Shape(4, 1024)
    assert those.shape_of([1025]) == Shape(1, 4096)


@pytest.mark.parametrize("wrong", [(), (0,), (5, 3), (4, 4)])
def test_sizes_that_are_none_are_refused(wrong):
    with pytest.raises(ValueError, match="expected sizes of 1 or more, ascending"):
        Buckets(wrong)
    with pytest.raises(ValueError, match="expected one request a batch or more"):
        Buckets((1,), most_requests=0)
