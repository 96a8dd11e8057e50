"""One file a question; the numbers in README.md and docs/ come from `results/` by `python -m benchmarks.readme`."""

from prerank.openmp import wait_briefly

wait_briefly()  # as `prerank` itself does
