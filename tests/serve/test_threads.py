"""Torch uses as many threads as it was told on every thread that serves, not on the one alone that told it."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from prerank.serve.threads import settle

pytestmark = pytest.mark.alone


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def cores_of_a_product(begin: Callable[[], None]) -> float:
    """How many cores a thread keeps at work that multiplies matrices, after `begin`."""
    found: list[float] = []

    def work() -> None:
        begin()
        left = torch.rand(256, 256)
        left @ left
        start, spent = time.perf_counter(), time.process_time()
        while time.perf_counter() - start < 0.3:
            left @ left
        found.append((time.process_time() - spent) / (time.perf_counter() - start))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found[0]


def test_a_thread_that_settled_keeps_one_core_at_work() -> None:
    assert cores_of_a_product(settle) < 1.2


def test_a_number_that_changes_is_told_again() -> None:
    settle()
    torch.set_num_threads(2)
    settle()
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)

    def twice() -> None:
        settle()
        settle()

    assert cores_of_a_product(twice) < 1.2
