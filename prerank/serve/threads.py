"""How many threads torch's products use on the threads that serve."""

from __future__ import annotations

import threading

import torch

_told = threading.local()


def settle() -> None:
    """Let torch use as many threads on this one as `torch.set_num_threads` said; to be called before it is used here.

    MKL keeps that number by thread: on one where nobody called `set_num_threads`, torch says the number that was set
    elsewhere, and a matrix product takes a thread a core all the same.
    """
    num = torch.get_num_threads()
    if getattr(_told, "num", 0) != num:
        torch.set_num_threads(num)
        _told.num = num
