"""What is known of one user, whichever stores it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from prerank.types import Array, Given

EXPOSED = np.uint32(1 << 31)
"""The bit of `flags` that says the event is an exposure of the item; the bits below it are labels'."""
MOST_LABELS = 31
BEFORE_ALL_MS = -(2**63)
"""The `until_ms` of a store without events."""


@dataclass(frozen=True, slots=True)
class UserRecord:
    """What is known of one user: the profile by column, the user_id's own included, and every event, oldest first.

    item_ids int64 [E]; time_ms int64 [E]; known_ms int64 [E], when the labels were known, at time_ms or later;
    flags uint32 [E], bit j set where label j of the store holds, EXPOSED where the item was shown. A label that came
    alone, after its exposure, is an event without EXPOSED. contexts int64 [E, C], the `stores.contexts.digest` of each
    context column of the store, 0 where it is not known. Read-only. The profile is empty of a user whose events came
    before he was in the users table.
    """

    profile: Mapping[str, Given]
    item_ids: Array
    time_ms: Array
    known_ms: Array
    flags: Array
    contexts: Array


class Users(Protocol):
    """What a request looks users up in; `stores.users.UserStore` is one and `stores.live.LiveUsers` another."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The profile's columns, the user_id's own first."""
        ...

    @property
    def is_near(self) -> bool:
        """Whether users are in files of this machine; if not, a look-up is a round trip that others can overlap."""
        ...

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels by bit of `UserRecord.flags`."""
        ...

    @property
    def contexts(self) -> tuple[str, ...]:
        """The context columns of `UserRecord.contexts`, in their order."""
        ...

    def profile(self, user_id: int) -> Mapping[str, Given] | None:
        """The user's profile alone, or None of one that is not in the users table. Raises DataError as `get`."""
        ...

    def get(self, user_id: int) -> UserRecord | None:
        """The user's record, or None of one nothing is known of. Raises DataError on a damaged record."""
        ...
