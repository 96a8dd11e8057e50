import threading

import pytest
import torch

from prerank.business.live import LiveItems
from prerank.types import ItemChange


def live(num=5):
    return LiveItems(num, {"bid": torch.arange(num, dtype=torch.int16) * 100})


def test_items_begin_as_published():
    on, pacing, values = live().gather(torch.tensor([[0, 3]]))
    assert on.tolist() == [[True, True]]
    assert pacing.tolist() == [[1.0, 1.0]]
    assert values["bid"].tolist() == [[0.0, 300.0]]
    assert live().among(None) is None


def test_what_a_change_does_not_say_stays_as_it_is():
    items = live()
    items.change([3, 3, 1], [ItemChange(30, on=False), ItemChange(30, values={"bid": 1e9}), ItemChange(10, pacing=0.5)])
    on, pacing, values = items.gather(torch.tensor([[1, 3]]))
    assert on.tolist() == [[True, False]]
    assert pacing.tolist() == [[0.5, 1.0]]
    assert values["bid"].tolist() == [[100.0, 1e9]]


def test_an_item_that_is_not_here_changes_nobody():
    items = live()
    items.change([-1], [ItemChange(99, on=False, pacing=0.0)])
    assert items.on.all()
    assert items.pacing.tolist() == [1.0] * 5


@pytest.mark.parametrize(("rows", "expected"), [(None, [0, 2, 4]), ([1, 2, 3], [2]), ([1], [])])
def test_only_items_that_are_on_are_eligible(rows, expected):
    items = live()
    items.change([1, 3], [ItemChange(10, on=False), ItemChange(30, on=False)])
    found = items.among(None if rows is None else torch.tensor(rows))
    assert found is not None
    assert (found if rows else found.nonzero().squeeze(1)).tolist() == expected
    items.change([1, 3], [ItemChange(10, on=True), ItemChange(30, on=True)])
    assert items.among(None) is None


def test_what_is_live_is_no_part_of_a_version():
    assert not live().state_dict()


def test_a_reader_sees_all_of_a_calls_changes_or_none():
    items, rows, done = live(64), torch.arange(64)[None], threading.Event()
    torn = []

    def read() -> None:
        while not done.is_set():
            on, pacing, values = items.gather(rows)
            seen = {(bool(o), float(p), float(v)) for o, p, v in zip(on[0], pacing[0], values["bid"][0], strict=True)}
            if len(seen) > 1:
                torn.append(seen)

    def write(number: int) -> None:
        change = ItemChange(0, on=number % 2 == 0, pacing=float(number), values={"bid": float(number)})
        items.change(range(64), [change] * 64)

    write(0)
    reader = threading.Thread(target=read)
    reader.start()
    for number in range(1, 200):
        write(number)
    done.set()
    reader.join()
    assert not torn
