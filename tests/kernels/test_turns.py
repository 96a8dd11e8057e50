"""What a thread says of its turns, the system knows of it, and of no other."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from prerank.kernels import native
from prerank.kernels.engine import Engine
from prerank.kernels.turns import take_turns

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"needs native kernels: {native.fault()}")


def in_a_thread(ask: Callable[[], object]) -> object:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(ask).result()


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def test_a_thread_is_nicer_than_it_was_and_no_other_is():
    before = niceness()

    def ask() -> tuple[bool, int]:
        return take_turns(nicer=3), niceness()

    assert in_a_thread(ask) == (True, min(19, before + 3))
    assert niceness() == before


def test_niceness_ends_at_the_most_there_is():
    assert in_a_thread(lambda: (take_turns(nicer=100), niceness())) == (True, 19)


def test_turns_alone_leave_the_niceness_as_it_was():
    before = niceness()
    assert in_a_thread(lambda: (take_turns(slice_ms=0.3), niceness())) == (True, before)


def test_the_system_is_told_how_long_a_turn_is():
    def ask() -> str:
        take_turns(slice_ms=0.3)
        where = Path(f"/proc/self/task/{threading.get_native_id()}/sched")
        lines = where.read_text().splitlines() if where.exists() else []
        return next((line.split(":")[1].strip() for line in lines if line.startswith("se.slice")), "")

    told = in_a_thread(ask)
    if not told:
        pytest.skip("this system does not say how long turns are")
    assert told == "300000"


def test_a_thread_of_another_policy_keeps_it():
    def ask() -> tuple[bool, int]:
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        return take_turns(nicer=1), os.sched_getscheduler(0)

    assert in_a_thread(ask) == (False, os.SCHED_BATCH)


def test_without_native_kernels_nothing_changes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(native, "library", lambda: None)
    before = niceness()
    assert in_a_thread(lambda: (take_turns(nicer=3), niceness())) == (False, before)


@pytest.mark.parametrize("nicer", [0, 4])
def test_an_engines_threads_are_as_nice_as_they_are_told(nicer: int):
    before = set(os.listdir("/proc/self/task"))
    engine = Engine(2, nicer=nicer)
    try:
        own = set(os.listdir("/proc/self/task")) - before
        assert len(own) == 2
        expected, waited = min(19, niceness() + nicer), threading.Event()
        for _ in range(200):  # a thread says so as it begins
            if all(os.getpriority(os.PRIO_PROCESS, int(one)) == expected for one in own):
                break
            waited.wait(0.01)
        assert {os.getpriority(os.PRIO_PROCESS, int(one)) for one in own} == {expected}
    finally:
        engine.close()
