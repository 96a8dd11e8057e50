"""A version on index hosts, shard by shard and looked at each time, before the pointer moves; and back, pointer first.

    check gates ─▶ shard 0: load, look ─▶ pause, look ─▶ shard 1: load, look ─▶ pause, look ─▶ pointer
                        │ one cannot          │ one is ill
                        └──────▶ it goes again from wherever it was loaded; the pointer stays

What a host holds is asked and never remembered, so a roll-out that was stopped is begun again and loads nothing twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import structlog
import torch

from prerank.bundle.registry import Registry
from prerank.bundle.user_side import load_user_side
from prerank.errors import PrerankError, RegistryError
from prerank.serve.index_host import AsksHost, Holding, HostFailed, Search

_log = structlog.get_logger(__name__)
_ASK_S = 10.0  # for an answer that needs nothing to be read
_LOAD_S = 600.0
_K = 10  # of the search that a host is looked at with


class ChangesHost(AsksHost, Protocol):
    """What tells one index host, at `address`, what to hold: the wire to one."""

    @property
    def address(self) -> str:
        """Where it is, for messages."""
        ...

    def load(self, version: str, timeout_s: float | None = None) -> Holding:
        """Hold `version` too; what it holds then. Raises what keeps it from that."""
        ...

    def unload(self, version: str, timeout_s: float | None = None) -> Holding:
        """Hold `version` no more; what it holds then. Raises RequestError where it is not held."""
        ...


@dataclass(frozen=True, slots=True)
class _Replica:
    """One host of shard `number` of `of`."""

    number: int
    of: int
    host: ChangesHost

    @property
    def name(self) -> str:
        return f"shard {self.number} of {self.of}, {self.host.address}"

    def holding(self) -> Holding:
        """What it holds. Raises HostFailed too where it is another shard than it is listed for."""
        found = self.host.holding(_ASK_S)
        if (found.number, found.of) != (self.number, self.of):
            raise HostFailed(f"it says that it is shard {found.number} of {found.of}; mend the list of hosts")
        return found

    def look(self, probe: Search) -> None:
        """Raises unless it holds what `probe` is of, of the same models, and finds as much as is eligible."""
        held = self.holding().versions.get(probe.version)
        if held is None:
            raise HostFailed(f"it does not hold {probe.version} any more")
        if dict(held.models) != dict(probe.models):
            raise HostFailed(f"expected an index of {dict(probe.models)}, and it holds one of {dict(held.models)}")
        nobody = Search(
            probe.version, probe.models, probe.query, probe.k, context=dict.fromkeys(held.context), profile={}
        )
        found = self.host.search(nobody, _ASK_S)
        expected = min(probe.k, found.num_eligible)
        if len(found.item_ids) != expected or not bool(torch.isfinite(found.similarity).all()):
            raise HostFailed(
                f"a search of {found.num_eligible} eligible items: expected {expected} items of finite similarity, "
                f"got {len(found.item_ids)}, {found.similarity.tolist()}"
            )


class ShardByShard:
    """The pointer of `registry`, and `shards`, the replicas of each; every host is told before the pointer moves.

    After each shard on which anything was loaded, `pause_s` seconds pass, and all that hold the version are looked at
    again. Hosts may follow the pointer or not.
    """

    def __init__(
        self,
        registry: Registry,
        shards: Sequence[Sequence[ChangesHost]],
        pause_s: float,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.registry, self.pause_s, self._sleep = registry, pause_s, sleep
        self._shards = [[_Replica(n, len(shards), host) for host in shard] for n, shard in enumerate(shards)]
        self._all = [one for shard in self._shards for one in shard]

    def ready(self) -> None:
        """Raises HostFailed unless every host answers, as the shard that it is listed for."""
        self._holdings()

    def roll_out(self, version: str, by: str, why: str) -> None:
        """Load `version` on one host after another, then move the pointer.

        Raises GateFailed, and whatever else `Registry.check` raises, before any host is told anything; HostFailed where
        a host cannot load it or is ill, and what keeps the pointer from moving. Then whoever loaded it lets it go.
        """
        live = self.registry.live()
        if live == version:
            return
        self.registry.check(version)
        before = self._holdings()
        was_live = any(event.to == version for event in self.registry.history())
        # hosts may keep what was live; what never was is there only since a roll-out was stopped
        told = [one for one in self._all if not was_live and version in before[one.name].versions]
        try:
            self._load_all(version, before, told)
            if self.registry.live() != live:
                raise RegistryError(f"{version} stays unpointed: {self.registry.live()} was made live meanwhile")
            self.registry.promote(version, by, why)
        except PrerankError:
            for one in told if self.registry.live() != version else []:
                _undo(one, version, live if live in before[one.name].versions else None)
            raise

    def roll_back(self, to: str, by: str, why: str) -> None:
        """Move the pointer back; then let every host that does not hold `to` load it.

        The pointer goes first: until a host holds `to` it is asked in what it holds. One that cannot load is logged.
        """
        if self.registry.live() != to:
            self.registry.rollback(to, by, why)
        with ThreadPoolExecutor(len(self._all)) as pool:
            list(pool.map(lambda one: _load_back(one, to), self._all))

    def in_use(self) -> set[str]:
        """What any host holds. Raises HostFailed unless every host answers."""
        return {version for one in self._holdings("is deleted").values() for version in one.versions}

    def _holdings(self, what: str = "can be rolled out") -> dict[str, Holding]:
        found = {}
        for one in self._all:
            try:
                found[one.name] = one.holding()
            except PrerankError as error:
                raise HostFailed(f"nothing {what}: {one.name}: {error}") from error
        return found

    def _load_all(self, version: str, before: dict[str, Holding], told: list[_Replica]) -> None:
        side = load_user_side(self.registry.path(version))
        probe = Search(version, side.models, torch.ones(side.towers.width), _K)
        done: list[_Replica] = []
        for shard in self._shards:
            is_new = False
            for one in shard:
                if version not in before[one.name].versions:
                    told.append(one)  # first: one that answers too late may hold it all the same
                    is_new = True
                    _told(one, version, partial(one.host.load, version, _LOAD_S))
                _told(one, version, partial(one.look, probe))
                done.append(one)
            if is_new:
                _log.info("a shard holds the version", version=version, shard=shard[0].number, pause_s=self.pause_s)
                self._sleep(self.pause_s)
                for one in done:
                    _told(one, version, partial(one.look, probe))


def _told(one: _Replica, version: str, step: Callable[[], object]) -> None:
    """One step at a host; what it raises says which host, and that the pointer did not move."""
    try:
        step()
    except PrerankError as error:
        raise HostFailed(f"{version} stays unpointed: {one.name}: {error}") from error


def _undo(one: _Replica, version: str, back: str | None) -> None:
    """Let `version` go; `back` is loaded again where it had to make room."""
    try:
        holding = one.holding()
        if version in holding.versions:
            holding = one.host.unload(version, _ASK_S)
        if back is not None and back not in holding.versions:
            one.host.load(back, _LOAD_S)
    except PrerankError as error:
        _log.warning("a host may still hold a version", host=one.host.address, version=version, error=str(error))


def _load_back(one: _Replica, to: str) -> None:
    try:
        if to not in one.holding().versions:
            one.host.load(to, _LOAD_S)
    except PrerankError as error:
        _log.warning("a host did not go back", host=one.host.address, shard=one.number, version=to, error=str(error))
