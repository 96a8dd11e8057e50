import threading
import time

import torch

from prerank.serve.device_replica import Replica
from prerank.serve.device_updates import Turns, Updates
from prerank.types import ItemChange
from tests.bundle.test_scorer import scorer
from tests.serve.late_device import LateDevice


def test_readers_are_there_at_once_and_a_writer_alone_and_before_those_who_come_later():
    device = LateDevice(threading.RLock())
    turns, order, both = Turns(), [], threading.Barrier(2, timeout=30)
    inside = threading.Event()

    def read(number):
        with turns.reading(number, device.stream()):
            both.wait()  # two readers are inside at once
            inside.set()
            time.sleep(0.05)
            order.append("read")

    def write():
        with turns.writing(device.stream()):
            order.append("write")

    def read_later():
        with turns.reading(2, device.stream()):
            order.append("later")

    threads = [threading.Thread(target=read, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    inside.wait(30)
    writer = threading.Thread(target=write)
    writer.start()
    while not turns._num_waiting and writer.is_alive():
        time.sleep(0.001)
    later = threading.Thread(target=read_later)
    later.start()
    for thread in [*threads, writer, later]:
        thread.join(30)
    assert order == ["read", "read", "write", "later"]


def test_what_a_reader_put_before_a_change_reads_what_was_before_it_though_the_device_does_both_later():
    device = LateDevice(threading.RLock())
    table, seen = torch.zeros(2), []
    turns, writing = Turns(), device.stream()
    readers = [device.stream() for _ in range(2)]

    def read(number):
        with turns.reading(number, readers[number]):
            readers[number].do(lambda: seen.append((number, table.tolist())))

    read(0)
    for value in (1.0, 2.0):
        with turns.writing(writing):
            writing.do(lambda value=value: table.fill_(value))
    read(1)
    assert seen == []
    readers[1].mark().wait()
    assert seen == [(0, [0.0, 0.0]), (1, [2.0, 2.0])]


def test_a_reader_that_fails_gives_its_turn_back():
    device, turns = LateDevice(threading.RLock()), Turns()
    stream, done = device.stream(), []
    try:
        with turns.reading(0, stream):
            stream.do(lambda: done.append("what it had put"))
            raise ValueError
    except ValueError:
        pass
    other = device.stream()
    with turns.writing(other):
        other.do(lambda: done.append("the change"))
    other.mark().wait()
    assert done == ["what it had put", "the change"]


def test_a_change_brings_what_the_scorer_has_of_these_rows_and_slots_and_of_no_others():
    device, model = LateDevice(threading.RLock()), scorer([0.0, 1.0, 2.0, 3.0], bid=[1, 2, 3, 4])
    updates = Updates(device, Replica(model, device))
    tables = updates.replica.staged(torch.arange(4), torch.arange(4))._pieces
    before = {id(table): table.clone() for table, _, _ in tables}
    model.live.change([0, 2], [ItemChange(0, on=False), ItemChange(20, pacing=0.5, values={"bid": 9.0})])
    model.put_side(torch.tensor([1, 3]), {"a": torch.tensor([7.0, 8.0]), "b": torch.ones(2, 1)})
    updates.put(torch.tensor([2]), torch.tensor([3]))
    updates._stream.mark().wait()
    after = {id(table): table for table, _, _ in tables}
    changed = {key for key, table in after.items() if not torch.equal(table, before[key])}
    assert len(changed) == 4  # pacing, bid, and both sides
    for key in changed:
        assert int((after[key] != before[key]).reshape(4, -1).any(1).sum()) == 1
