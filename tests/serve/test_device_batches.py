import threading
import time

import pytest
import torch

from prerank.errors import DeadlineExceeded, DeviceFailed
from prerank.serve.device_batches import Job, Lines
from prerank.serve.graph import Deadline
from prerank.types import CandidateSet


def job(line, most=3, deadline=None, num=1):
    rows = torch.zeros(1, num, dtype=torch.int64)
    return Job({}, CandidateSet(rows, rows.float(), rows == 0), 1, line, most, deadline)


def put(lines, *jobs):
    for one in jobs:
        lines.put(one)
    return list(jobs)


def test_a_line_that_is_full_leaves_at_once_and_what_is_over_waits_for_more():
    lines = Lines(60.0)
    jobs = put(lines, *(job("a") for _ in range(4)))
    assert lines.take() == jobs[:3]
    assert len(lines) == 1


def test_one_that_is_alone_leaves_at_once():
    lines = Lines(60.0)
    waiting, alone = put(lines, job("a"), job("b", most=1))
    assert lines.take() == [alone]
    assert len(lines) == 1
    assert not waiting.future.done()


def test_after_the_bound_a_batch_leaves_as_it_is():
    lines = Lines(0.05)
    start = time.perf_counter()
    jobs = put(lines, job("a"), job("a"))
    assert lines.take() == jobs
    assert 0.05 <= time.perf_counter() - start < 5.0


def test_of_batches_that_may_leave_the_one_that_waits_longest_does_and_lines_never_mix():
    lines = Lines(0.0)
    jobs = put(lines, job("a"), job("b"), job("a"), job("c"))
    assert [lines.take() for _ in range(3)] == [[jobs[0], jobs[2]], [jobs[1]], [jobs[3]]]


def test_many_threads_take_every_job_once():
    lines, taken, lock = Lines(0.001), [], threading.Lock()

    def take():
        while (batch := lines.take()) is not None:
            with lock:
                taken.extend(batch)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    jobs = put(lines, *(job(n % 7, most=1 + n % 3) for n in range(500)))
    lines.close()
    for thread in threads:
        thread.join(30)
    assert sorted(map(id, taken)) == sorted(map(id, jobs))


def test_a_batch_that_leaves_does_not_leave_the_rest_unwatched():
    lines, taken = Lines(0.05), []
    threads = [threading.Thread(target=lambda: taken.append(lines.take())) for _ in range(2)]
    for thread in threads:
        thread.start()
    first, second = put(lines, job("a"), job("b"))
    for thread in threads:
        thread.join(30)
    assert sorted(taken, key=lambda batch: batch[0].line) == [[first], [second]]


def test_once_closed_it_gives_what_waits_and_takes_nothing_new():
    lines = Lines(60.0)
    jobs = put(lines, job("a"), job("b"))
    lines.close()
    assert [lines.take(), lines.take(), lines.take()] == [[jobs[0]], [jobs[1]], None]
    with pytest.raises(DeviceFailed, match="closed, and takes nothing new"):
        lines.put(job("a"))


def test_nobody_computes_what_was_cancelled_or_is_late():
    ended = []
    lines = Lines(0.0, ended.append)
    cancelled, late, wanted = put(lines, job("a"), job("a", deadline=Deadline(time.perf_counter(), 0.0)), job("a"))
    assert cancelled.future.cancel()
    assert lines.take() == [wanted]
    assert ended == [cancelled, late]
    with pytest.raises(DeadlineExceeded, match="passed while it waited for the device"):
        late.future.result(0)
    assert not wanted.future.cancel()
