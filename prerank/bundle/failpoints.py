"""Places at which a process may be told to die, as if the machine stopped there: for tests, and for nobody else.

PRERANK_FAILPOINT names one of NAMES; whoever reaches it kills itself by SIGKILL, which no code of ours can catch.
"""

from __future__ import annotations

import os
import signal

VARIABLE = "PRERANK_FAILPOINT"
PUBLISH = ("publish-half-written", "publish-written", "publish-renamed")
PROMOTE = ("promote-verified", "promote-noted", "promote-moved")
RETRAIN = (
    *("retrain-begun", "retrain-trained", "retrain-published", "retrain-validated", "retrain-promoting"),
    *("retrain-promoted", "retrain-watching", "retrain-rolling-back", "retrain-rolled-back"),
)
CLEAN = ("clean-noted", "clean-aside", "clean-half-deleted")
NAMES = (*PUBLISH, *PROMOTE, *RETRAIN, *CLEAN)


def reach(name: str) -> None:
    """Die here if PRERANK_FAILPOINT says so. Raises ValueError where it names no place there is."""
    assert name in NAMES, name
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return
    if wanted not in NAMES:
        raise ValueError(f"{VARIABLE}: expected one of {', '.join(NAMES)}, got {wanted!r}")
    if wanted == name:
        os.kill(os.getpid(), signal.SIGKILL)
