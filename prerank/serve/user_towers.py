"""The user towers that stay loaded: of the versions that index hosts hold, and of those that were live last.

So a host that is one version behind, or was rolled back, still gets user vectors of its own space.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import structlog

from prerank.bundle.registry import Registry
from prerank.bundle.user_side import UserSide, load_user_side
from prerank.errors import PrerankError

_log = structlog.get_logger(__name__)
AGAIN_S = 60.0
"""Seconds until a tower that could not be loaded is tried again."""


class UserTowers:
    """At most `most` versions' user sides, of the funnel in `store`. Threads may `get`; one calls `refresh`."""

    def __init__(self, store: Path, most: int = 3, clock: Callable[[], float] = time.monotonic) -> None:
        self.most = most
        self._registry, self._clock = Registry(store), clock
        self._sides: dict[str, UserSide] = {}  # replaced, never changed: readers take no lock
        self._gave_up: dict[str, float] = {}
        self._said: set[str] = set()

    def get(self, version: str) -> UserSide | None:
        """That version's, None where it is not loaded."""
        return self._sides.get(version)

    def failed(self, version: str, error: PrerankError) -> None:
        """A user could not be embedded in that version; logged once, for the next request is likely to fail too."""
        if version not in self._said:
            self._said.add(version)
            _log.warning("a user cannot be embedded", version=version, error=str(error))

    @property
    def loaded(self) -> tuple[str, ...]:
        """The versions that can be embedded for, the most wanted first."""
        return tuple(self._sides)

    def refresh(self, held: Mapping[str, int]) -> None:
        """Load what is wanted and let the rest go: first the versions `held` by most shards, then the last live ones.

        One that cannot be loaded is logged, and tried again later.
        """
        wanted = self._wanted(held)
        sides: dict[str, UserSide] = {}
        for version in wanted:
            if len(sides) == self.most:
                break
            side = self._sides.get(version) or self._loaded(version)
            if side is not None:
                sides[version] = side
        self._sides = sides

    def _wanted(self, held: Mapping[str, int]) -> list[str]:
        by_shards = sorted(held, key=lambda version: (held[version], version), reverse=True)
        try:
            there = set(self._registry.names())  # of those that were live, some may be removed
            were_live = [event.to for event in reversed(self._registry.history()) if event.to in there]
        except (PrerankError, OSError, UnicodeDecodeError) as error:
            _log.error("which versions were live cannot be read", error=f"{type(error).__name__}: {error}")
            were_live = list(self._sides)
        return list(dict.fromkeys([*by_shards, *were_live]))

    def _loaded(self, version: str) -> UserSide | None:
        if self._clock() < self._gave_up.get(version, 0.0):
            return None
        try:
            side = load_user_side(self._registry.path(version))
        except (PrerankError, OSError, UnicodeDecodeError) as error:
            self._gave_up[version] = self._clock() + AGAIN_S
            _log.error("a user tower cannot be loaded", version=version, error=f"{type(error).__name__}: {error}")
            return None
        self._gave_up.pop(version, None)
        return side
