"""One shard of the index, of one or more versions at once: who asks says which version, and is told what answered.

The same object answers within a process and, through `serve.index_flight`, from another one. A query of one version's
user tower is in that version's space: it is answered by that version's vectors or not at all.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import structlog
import torch
from torch import Tensor

from prerank.bundle.registry import Registry
from prerank.bundle.shard import Place, Shard, load_shard
from prerank.errors import PrerankError, RegistryError, RequestError
from prerank.types import Features, Given

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Held:
    """One version as a host holds it: `models` its index was built with, `num_items`, and what its targeting reads.

    `user` are columns of a profile and `context` fields of a request.
    """

    models: Mapping[str, str]
    num_items: int
    user: tuple[str, ...] = ()
    context: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Holding:
    """What a host is, shard `number` of `of`, and what it holds, by version."""

    number: int
    of: int
    versions: Mapping[str, Held]


@dataclass(frozen=True, slots=True)
class Search:
    """The `k` items of largest dot product with `query` float32 [D], of a version whose `models` made the query.

    Those that the version's targeting lets a user of `profile` and `context` see at `time_ms`, none of `exclude`.
    `values` are wanted of each: names of item values that the version's utility reads, such as bids, as published.
    """

    version: str
    models: Mapping[str, str]
    query: Tensor
    k: int
    time_ms: int = 0
    profile: Mapping[str, Given] = field(default_factory=dict)
    context: Mapping[str, Given] = field(default_factory=dict)
    exclude: tuple[int, ...] = ()
    values: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Found:
    """item_ids int64 [n] and similarity float32 [n], best first, of this version, of `num_eligible` that could be.

    `values` [n], by name, are those asked for.
    """

    version: str
    item_ids: Tensor
    similarity: Tensor
    num_eligible: int
    values: Features = field(default_factory=dict)


class NotHeld(PrerankError):
    """A host was asked for a version it does not hold; `holding` is what it holds."""

    def __init__(self, message: str, holding: Holding) -> None:
        super().__init__(message)
        self.holding = holding


class HostFailed(PrerankError):
    """A host did not answer, or not in time."""


class AsksHost(Protocol):
    """What asks one index host: `IndexHost` itself, or the wire to one."""

    def holding(self, timeout_s: float | None = None) -> Holding:
        """What it is and holds. Raises HostFailed."""
        ...

    def search(self, search: Search, timeout_s: float | None = None) -> Found:
        """See `IndexHost.search`. Raises HostFailed too."""
        ...

    def close(self) -> None:
        """Let go of the connection."""
        ...


class IndexHost:
    """Shard `place` of the versions in a funnel's `store`, at most `most` at once. Threads may share one.

    It holds nothing until `load` or `follow`. A search that runs keeps what it reads until it ends.
    """

    def __init__(self, store: Path, place: Place, most: int = 2) -> None:
        assert most >= 1
        self.place = place
        self._registry, self._most = Registry(store), most
        self._changing = threading.Lock()
        self._shards: dict[str, Shard] = {}  # replaced, never changed: readers take no lock

    def holding(self, timeout_s: float | None = None) -> Holding:
        """What this is and holds; what was loaded last comes last."""
        versions = {}
        for version, shard in self._shards.items():
            reads = [() if shard.targeting is None else tuple(shard.targeting.columns(o)) for o in ("user", "context")]
            versions[version] = Held(shard.models, len(shard.item_ids), *reads)
        return Holding(self.place.number, self.place.of, versions)

    def search(self, search: Search, timeout_s: float | None = None) -> Found:
        """The most similar eligible items of this shard, in the version that is asked for.

        Raises NotHeld where that is not here, or was built with other models than made the query; RequestError for
        a query or a `k` that is not as it must be, or a context that its targeting cannot read.
        """
        shard = self._shards.get(search.version)
        if shard is None or dict(search.models) != dict(shard.models):
            holding = self.holding()
            held = {version: dict(one.models) for version, one in holding.versions.items()}
            raise NotHeld(
                f"shard {self.place.number} of {self.place.of}: expected a version of {held}, got {search.version} "
                f"with {dict(search.models)}",
                holding,
            )
        if search.query.dtype != torch.float32 or search.query.shape != (shard.width,):
            kind = str(search.query.dtype).removeprefix("torch.")
            raise RequestError(f"query: expected float32 [{shard.width}], got {kind} {list(search.query.shape)}")
        for name in search.values:
            if name not in shard.values:
                raise RequestError(f"values: expected some of {list(shard.values)}, got {name!r}")
        if search.k < 1:
            raise RequestError(f"k: expected 1 or more, got {search.k}")
        with torch.inference_mode():
            return _searched(shard, search)

    def load(self, version: str) -> None:
        """Hold `version` too; if that is one too many, of those that are not live the one loaded first goes.

        Raises RegistryError for one that is not in the store, BundleError for one that is damaged.
        """
        with self._changing:
            if version in self._shards:
                return
            shards = {**self._shards, version: load_shard(self._registry.path(version), self.place)}
            live = self._registry.live()
            while len(shards) > self._most:
                del shards[next(one for one in shards if one not in (version, live) or len(shards) == 2)]
            self._shards = shards
        _log.info("a version is held", version=version, shard=self.place.number, held=list(shards))

    def unload(self, version: str) -> None:
        """Hold `version` no more. Raises RegistryError where it is not held."""
        with self._changing:
            if version not in self._shards:
                raise RegistryError(f"{version}: expected one that is held, {list(self._shards)}")
            self._shards = {name: shard for name, shard in self._shards.items() if name != version}
        _log.info("a version is let go", version=version, shard=self.place.number, held=list(self._shards))

    def follow(self) -> bool:
        """Hold the version that is live, if it is not held; whether it was loaded. Raises as `load`."""
        live = self._registry.live()
        if live is None or live in self._shards:
            return False
        self.load(live)
        return True

    def live(self) -> str | None:
        """The version that the store says is live; None where there is none or that cannot be read."""
        try:
            return self._registry.live()
        except (RegistryError, OSError, UnicodeDecodeError):
            return None

    def close(self) -> None:
        """Hold nothing."""
        self._shards = {}


def _searched(shard: Shard, search: Search) -> Found:
    """The eligible of the shard, by their place in it, and of those the best."""
    eligible = None
    if shard.targeting is not None:
        eligible = shard.targeting.rows(search.profile, search.context, search.time_ms)
    if search.exclude:
        ids = shard.item_ids.numpy()
        given = np.array(search.exclude, np.int64)
        at = np.searchsorted(ids, given).clip(max=len(ids) - 1)
        kept = torch.ones(len(ids), dtype=torch.bool)
        kept[at[ids[at] == given]] = False
        eligible = kept.nonzero().squeeze(1) if eligible is None else eligible[kept[eligible]]
    num = len(shard.item_ids) if eligible is None else len(eligible)
    if not num:
        rows = torch.zeros(0, dtype=torch.int64)
        return Found(
            search.version, rows, torch.zeros(0), 0, {name: shard.values[name][rows] for name in search.values}
        )
    places = None
    if shard.rows is not None:  # an index of all items, of which the shard's are some
        places = shard.rows if eligible is None else shard.rows[eligible]
    found = shard.index.search(search.query.unsqueeze(0), min(search.k, num), eligible if places is None else places)
    rows = found.rows[0][found.valid[0]]
    if shard.rows is not None:
        rows = torch.searchsorted(shard.rows, rows)
    values = {name: shard.values[name][rows] for name in search.values}
    return Found(search.version, shard.item_ids[rows], found.similarity[0][found.valid[0]], num, values)


AGAIN_S = 60.0
"""Seconds until a version that could not be loaded is tried again; at once where another is live."""


def hold_live(host: IndexHost) -> bool:
    """Let `host` hold the live version; False where there is none or it cannot be loaded, which is logged."""
    try:
        return host.follow() or bool(host.holding().versions)
    except (PrerankError, OSError, UnicodeDecodeError) as error:
        _log.error("the live version cannot be held", shard=host.place.number, error=f"{type(error).__name__}: {error}")
        return False


def follow_live(host: IndexHost, ended: threading.Event, poll_s: float = 1.0) -> None:
    """Look at the pointer each `poll_s` seconds, and hold what is live, until `ended`."""
    failed_at: tuple[str | None, float] | None = None
    while not ended.wait(poll_s):
        live = host.live()
        if failed_at is not None and failed_at[0] == live and time.monotonic() < failed_at[1]:
            continue
        failed_at = None if hold_live(host) else (live, time.monotonic() + AGAIN_S)
