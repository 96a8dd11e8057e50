"""A serving process lets the event loop go first."""

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from prerank.kernels import native
from prerank.serve import turns
from prerank.serve.admission import Door, Lane
from prerank.serve.funnel import engine_of

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"needs native kernels: {native.fault()}")


def test_the_loop_gets_python_within_a_part_of_a_millisecond(monkeypatch: pytest.MonkeyPatch):
    usual, told = sys.getswitchinterval(), []
    monkeypatch.setattr(turns, "take_turns", lambda **said: told.append(said))
    try:
        turns.loop_first()
        assert sys.getswitchinterval() < 0.001 < usual
    finally:
        sys.setswitchinterval(usual)
    turns.stages_next()
    loop, stage = told
    assert 0 < loop["slice_ms"] < stage["slice_ms"]


def test_threads_of_a_lane_say_that_they_run_stages(monkeypatch: pytest.MonkeyPatch):
    told = []
    monkeypatch.setattr("prerank.serve.admission.stages_next", lambda: told.append(threading.current_thread().name))
    lane = Lane("recommend", 2, 4, lambda num: None, Door(), lambda why: None)
    assert lane.pool.submit(threading.get_native_id).result() != threading.get_native_id()
    lane.pool.shutdown()
    assert told
    assert all(name.startswith("recommend") for name in told)


def test_who_ranks_is_nicer_than_who_serves():
    def ask() -> set[int]:
        before = set(os.listdir("/proc/self/task"))
        engine = engine_of(1)
        assert engine is not None
        try:
            own = int(*(set(os.listdir("/proc/self/task")) - before))
            done = threading.Event()
            for _ in range(200):
                found = os.getpriority(os.PRIO_PROCESS, own) - os.getpriority(os.PRIO_PROCESS, 0)
                if found == turns.RANKING_NICER:
                    break
                done.wait(0.01)
            return {found}
        finally:
            engine.close()

    if native.level() == "portable":
        pytest.skip("torch ranks here")
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(ask).result() == {turns.RANKING_NICER}
