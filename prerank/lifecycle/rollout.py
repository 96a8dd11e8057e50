"""How a version comes to serve, and how it leaves again: one interface, whatever serves."""

from __future__ import annotations

from typing import Protocol

from prerank.bundle.registry import Registry


class Rollout(Protocol):
    """Makes a version live wherever it is to serve.

    Both may be called again after a crash, whatever was done before it: what is live already stays so.
    """

    def ready(self) -> None:
        """Raises where it is known already that nothing could be rolled out, before anything is trained."""

    def roll_out(self, version: str, by: str, why: str) -> None:
        """Let `version` serve. Raises GateFailed unless its gates hold, and what keeps it from serving."""

    def roll_back(self, to: str, by: str, why: str) -> None:
        """Let `to`, which was live before, serve again."""

    def in_use(self) -> set[str]:
        """Versions that are loaded where no lock of this machine says so. Raises where that cannot be known."""


class SinglePointer:
    """One store whose pointer every server follows; each loads the version beside the one it has, and switches."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry

    def ready(self) -> None:
        """It always is."""

    def roll_out(self, version: str, by: str, why: str) -> None:
        """Move the pointer; see `Registry.promote`."""
        if self.registry.live() != version:
            self.registry.promote(version, by, why)

    def roll_back(self, to: str, by: str, why: str) -> None:
        """Move it back; see `Registry.rollback`."""
        if self.registry.live() != to:
            self.registry.rollback(to, by, why)

    def in_use(self) -> set[str]:
        """None: who has a version holds its lock."""
        return set()
