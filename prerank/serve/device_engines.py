"""What serving asks of who ranks on devices: of the engine of one (`serve.device`), or of several (`device_group`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from prerank.bundle.judge import Ranked
from prerank.bundle.scorer import Scorer
from prerank.serve.device_counts import Snapshot
from prerank.serve.device_options import Options
from prerank.serve.device_sought import Found, Sought
from prerank.types import CandidateSet, Features


class Finder(Protocol):
    """What finds candidates by itself."""

    def find(self, user_side: Features, sought: Sought, k: int) -> Found:
        """A request whose candidates are still to be found, to its winners; see `device_asking.find`."""
        ...


class Part(Finder, Protocol):
    """A version on one device, or on several that answer together."""

    @property
    def name(self) -> str:
        """Of its device, or devices."""
        ...

    def probs(self, user_side: Features, rows: Tensor) -> Tensor:
        """The ranker's side of users [B, ...] and rows int64 [B, N] -> each task's probability, float32 [B, N, T]."""
        ...


class LoadedVersion(Finder, Protocol):
    """A version that is loaded. Threads may share one."""

    @property
    def name(self) -> str:
        """Of its device, or devices."""
        ...

    @property
    def parts(self) -> Sequence[Part]:
        """What answers by itself, and is held against golden answers each."""
        ...

    def rank(self, user_side: Features, candidates: CandidateSet, k: int) -> Ranked:
        """As `Scorer.rank`; see `device_asking.rank_each`."""
        ...

    def put(self, rows: Tensor | None = None, slots: Tensor | None = None, taken: Tensor | None = None) -> None:
        """Let every request that begins after this know what the scorer has of rows and slots, int64 [n], by now.

        `taken` int64 [n] are rows that items newly have, whose vectors and bitmaps are others.
        """
        ...

    def close(self) -> None:
        """Take nothing new, wait for what runs, and leave the memory of devices."""
        ...


class Engine(Protocol):
    """What versions are loaded on. Threads may share one."""

    def load(self, scorer: Scorer, like: Features, options: Options) -> LoadedVersion:
        """A version beside those that are there; see `DeviceEngine.load`."""
        ...

    def snapshot(self) -> Snapshot:
        """What it did, and what there is now."""
        ...

    def snapshots(self) -> Mapping[str, Snapshot]:
        """The same of each device, by its name."""
        ...
