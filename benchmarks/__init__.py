"""One file a question; the numbers in README.md and docs/ come from `results/` by `python -m benchmarks.readme`."""

import os

# as `prerank` itself does, before torch loads its OpenMP: docs/decisions/0002
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
