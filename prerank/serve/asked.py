"""What a version answers when it is asked again: plain arrays, for whoever compares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prerank.types import Array


@dataclass(frozen=True, slots=True)
class Asked:
    """Winners, best first: item_ids int64 [K], utility float32 [K], NaN where it was not computed.

    `digest` is `stores.requests.digest_of` the features of the user, `ms` what the answer took.
    """

    item_ids: Array
    utility: Array
    digest: int
    degraded: bool
    ms: float


@dataclass(frozen=True, slots=True)
class Standing:
    """How items stand in a version: bool [n] is_known, and of those that are known bool [n] is_on, float32 [n] pacing.

    `values` float32 [n] by name are what the utility reads, such as bids.
    """

    is_known: Array
    is_on: Array
    pacing: Array
    values: Mapping[str, Array]
