"""How a version is loaded on a device, and what the versions of an engine share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from prerank.bundle.judge import Ranked
from prerank.serve.device_batches import Lines
from prerank.serve.device_buckets import Buckets
from prerank.serve.device_counts import Counts
from prerank.serve.device_retrieval import Retrieval
from prerank.serve.device_streams import Device, Stream
from prerank.serve.device_times import Backlog
from prerank.types import CandidateSet, Features

Fallback: TypeAlias = Callable[[Features, CandidateSet, int], Ranked]
"""As `Scorer.rank`: what ranks where the device cannot."""


@dataclass(frozen=True, slots=True)
class Options:
    """How a version is loaded.

    `most_k` winners at most; floats of the ranker and its tables as `dtype`, which is theirs unless given. `fallback`
    ranks where the device fails; without it such a request fails. After a device was lost it is tried again, and every
    `retry_s` seconds. With `retrieval` it takes requests whose candidates are still to be found too.

    With a `part` it has these rows only, called by their place in it, and judges candidates without saying who wins.
    """

    most_k: int
    buckets: Buckets = field(default_factory=Buckets)
    dtype: torch.dtype | None = None
    fallback: Fallback | None = None
    retry_s: float = 5.0
    retrieval: Retrieval | None = None
    part: slice | None = None


@dataclass(frozen=True, slots=True)
class Shared:
    """What the versions of an engine share; there are `num_workers`, each a thread.

    All that a version brings to the device comes through the stream `loading`, and what it leaves is taken by the next:
    an allocator keeps memory by streams.
    """

    device: Device
    loading: Stream
    lines: Lines
    counts: Counts
    backlog: Backlog
    num_workers: int
