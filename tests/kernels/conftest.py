"""Where the native kernels were left out there is nothing to hold them to."""

from prerank.kernels.native import library

if library() is None:
    collect_ignore = ["test_eligible.py", "test_engine.py", "test_greedy.py", "test_native.py", "test_scan.py"]
