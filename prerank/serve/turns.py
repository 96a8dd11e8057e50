"""Who of a serving process has a processor first: the event loop, then what runs stages, then what ranks.

The loop lets in, refuses and answers within microseconds, and everybody waits for it; ranking takes milliseconds on
every core. Left to themselves all have turns alike, and a request that is refused hears so after somebody else's turn
is over, at the processor and then at Python.
"""

from __future__ import annotations

import sys

from prerank.kernels.turns import take_turns

RANKING_NICER = 15
"""Steps of niceness: beside anybody else on a core it has 36 parts of 1,060 (`sched_prio_to_weight` of Linux)."""
_LOOP_MS, _STAGE_MS = 0.1, 0.3
_SWITCH_S = 0.0005  # after so long a thread that runs Python lets another that waits


def loop_first() -> None:
    """To be called by the thread of the event loop, before it begins."""
    sys.setswitchinterval(_SWITCH_S)
    take_turns(slice_ms=_LOOP_MS)


def stages_next() -> None:
    """To be called by each thread that runs stages."""
    take_turns(slice_ms=_STAGE_MS)
