"""How long torch's threads stay awake between two operations; it has to be said before torch loads its OpenMP."""

import os


def wait_briefly() -> None:
    """Stay awake for a fraction of a millisecond, then sleep; nothing is changed where a variable says otherwise.

    Waking a thread takes longer than most operations of a training step, and one that never sleeps takes the core of
    whoever computes beside it (docs/decisions/0002). LLVM's OpenMP counts in whole milliseconds, so there it is none.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
        os.environ.setdefault("KMP_BLOCKTIME", "0")
