"""What a piece of work takes is its own, and not what the process that started it holds."""

import numpy as np

from benchmarks.machine import hardware, in_own_process, times_ms


def fill(mebibytes: int) -> int:
    return int(np.ones(mebibytes << 20, np.uint8).sum())


def test_peak_memory_is_of_the_work_and_not_of_who_started_it():
    held = np.ones(400 << 20, np.uint8)
    spent = in_own_process(fill, 100, repeats=2)
    assert spent.made == 100 << 20
    assert len(spent.times_s) == 2
    assert 95 < spent.above_imports_mib < 200 < len(held) >> 20


def test_calls_before_the_first_time_are_not_counted():
    calls = []
    assert len(times_ms(lambda: calls.append(1), 3, warm_up=2)) == 3
    assert len(calls) == 5


def test_this_machine_has_a_name_for_a_file():
    machine = hardware()
    assert machine.cores >= 1
    assert machine.memory_gib > 0
    assert set(machine.slug) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
