"""Batches made ahead are those made when asked, and nothing of the making outlives its reader."""

import threading
import time
import traceback

import pytest
import torch

from prerank.train.prefetch import ahead


def running() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "prefetch"]


@pytest.mark.parametrize("depth", [0, 1, 3, 50])
def test_every_batch_comes_once_and_in_order(depth):
    with ahead(lambda key: key * key, range(20), depth) as made:
        assert list(made) == [key * key for key in range(20)]
    assert not running()


def test_the_thread_that_makes_batches_has_no_threads_of_its_own_and_leaves_others_theirs():
    before = torch.get_num_threads()
    with ahead(lambda key: torch.get_num_threads(), range(4), 2) as made:
        assert list(made) == [1] * 4
        assert torch.get_num_threads() == before
    with ahead(lambda key: torch.get_num_threads(), range(4), 0) as made:
        assert list(made) == [before] * 4


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_an_error_comes_in_the_place_of_its_batch_with_its_own_traceback(depth):
    def make_batch(key: int) -> int:
        if key == 4:
            raise ValueError("no such row")
        return key

    with ahead(make_batch, range(9), depth) as made:
        assert [next(made) for _ in range(4)] == [0, 1, 2, 3]
        with pytest.raises(ValueError, match="no such row") as caught:
            next(made)
    assert "make_batch" in "".join(traceback.format_tb(caught.tb))
    assert not running()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("taken", [0, 5])
def test_the_thread_has_ended_however_the_block_is_left(error, taken):
    def read() -> None:
        with ahead(lambda key: key, range(1000), 3) as made:
            for _ in range(taken):
                next(made)
            raise error

    with pytest.raises(error):
        read()
    assert not running()


def test_no_more_than_depth_batches_are_made_and_not_taken():
    count = 0

    def make(key: int) -> int:
        nonlocal count
        count += 1
        return key

    with ahead(make, range(100), 3) as made:
        for taken in range(1, 20):
            next(made)
            deadline = time.monotonic() + 5
            while count < taken + 3 and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.005)
            assert count == taken + 3


def test_batches_are_made_in_another_thread_while_the_reader_computes():
    names = []
    with ahead(lambda _: names.append(threading.current_thread().name), range(5), 2) as made:
        list(made)
    assert set(names) == {"prefetch"}
