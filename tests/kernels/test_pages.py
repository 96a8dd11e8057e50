import re
import sys
from pathlib import Path

import numpy as np
import pytest

from prerank.kernels.pages import in_large_pages


def large_bytes(numbers: np.ndarray) -> int:
    """Of the mapping that the numbers are in, as the system counts."""
    at, size = numbers.ctypes.data, 0
    is_inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        found = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if found:
            first, last = (int(end, 16) for end in found.groups())
            is_inside = first < at + numbers.nbytes and at < last
        elif is_inside and line.startswith("AnonHugePages:"):
            size += int(line.split()[1]) << 10
    return size


@pytest.mark.skipif(sys.platform != "linux", reason="large pages are asked for on Linux alone")
def test_what_is_in_the_memory_stays_and_the_system_says_that_it_is_in_large_pages():
    numbers = np.arange(4 << 20, dtype=np.int64)  # 32 MiB
    before = large_bytes(numbers)
    moved = in_large_pages(numbers.ctypes.data, numbers.nbytes)
    assert (numbers == np.arange(len(numbers))).all()
    if not moved:
        pytest.skip("this system has no large pages to give")
    assert large_bytes(numbers) >= max(before, numbers.nbytes - (4 << 20))


def test_memory_without_a_whole_large_page_is_left_alone():
    numbers = np.arange(1000)
    assert not in_large_pages(numbers.ctypes.data, numbers.nbytes)
    assert not in_large_pages(numbers.ctypes.data, 0)


def test_a_system_that_refuses_is_no_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("prerank.kernels.pages._COLLAPSE", 9_999)
    numbers = np.arange(4 << 20, dtype=np.int64)
    assert not in_large_pages(numbers.ctypes.data, numbers.nbytes)
    assert (numbers == np.arange(len(numbers))).all()
