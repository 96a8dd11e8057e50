"""One command a verb."""

import os

# before torch loads its OpenMP: two pools that spin on the same cores wait for each other (docs/decisions/0002)
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from prerank.cli.app import main

__all__ = ["main"]
