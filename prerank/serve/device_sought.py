"""A request whose candidates a device finds by itself, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from prerank.bundle.judge import Ranked
from prerank.types import CandidateSet


@dataclass(frozen=True, slots=True)
class Chosen:
    """Who asks, as `Targeting.choose` gives it: chosen int32 [C], starts int64 [G + 1], inverted bool [G]."""

    chosen: Tensor
    starts: Tensor
    inverted: Tensor


@dataclass(frozen=True, slots=True)
class Sought:
    """What candidates are sought by: a user's vector float32 [1, D], who asks, and rows int64 [E] that must not win.

    Its own `chosen` is None where there is no targeting. Candidates stay on the device unless they are asked for.
    """

    query: Tensor
    chosen: Chosen | None
    excluded: Tensor
    with_candidates: bool = False


@dataclass(frozen=True, slots=True)
class Found(Ranked):
    """The winners of candidates that were found on a device, among `num_eligible` items, and those, if asked for."""

    num_eligible: int
    candidates: CandidateSet | None


def num_of(candidates: CandidateSet | Sought) -> int | None:
    """How many candidates [1, N] came with a request; None where they are still to be found."""
    return None if isinstance(candidates, Sought) else candidates.rows.shape[1]
