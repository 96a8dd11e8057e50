"""Index hosts in this process that can be made to die, lag or hang; what is asked of them is looked at on the way."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prerank.bundle.shard import Place
from prerank.serve.hosts import IndexHosts, Replica
from prerank.serve.index_host import Found, Holding, HostFailed, IndexHost, Search
from prerank.serve.user_towers import UserTowers
from tests.serve import spaces


class Fragile:
    """One replica: `host` behind what may go wrong with it. `versions` are the spaces' numbers, by version."""

    def __init__(self, store: Path, place: Place, versions: list[str], most: int = 2) -> None:
        self._store, self.place, self._versions, self._most = store, place, versions, most
        self.host = IndexHost(store, place, most)
        self.is_dead = False
        self.hangs: threading.Event | None = None
        self.num_asked = 0
        self.mixed: list[str] = []

    def restart(self) -> None:
        """Back, with nothing in memory."""
        self.host, self.is_dead = IndexHost(self._store, self.place, self._most), False

    def holding(self, timeout_s: float | None = None) -> Holding:
        if self.is_dead:
            raise HostFailed("dead")
        return self.host.holding()

    def search(self, search: Search, timeout_s: float | None = None) -> Found:
        self.num_asked += 1
        if self.is_dead:
            raise HostFailed("dead")
        if self.hangs is not None and not self.hangs.wait(timeout_s):
            raise HostFailed("timeout")
        found = self.host.search(search)
        if spaces.space_of(search.query) != {self._versions.index(found.version)}:
            self.mixed.append(f"a query of {spaces.space_of(search.query)} answered by {found.version}")
        if bool((found.similarity == 0).any()):
            self.mixed.append(f"{found.version}: a similarity of 0")
        return found

    def close(self) -> None:
        self.host.close()


class Cluster:
    """`num_shards` x `num_replicas` of them, and what a server makes of them."""

    def __init__(self, store: Path, versions: list[str], num_shards: int, num_replicas: int, most: int = 2) -> None:
        self.versions = versions
        self.fragile = [
            [Fragile(store, Place(n, num_shards), versions, most) for _ in range(num_replicas)]
            for n in range(num_shards)
        ]
        self.hosts = IndexHosts(
            [
                [Replica(f"{n}.{r}", n, num_shards, one) for r, one in enumerate(replicas)]
                for n, replicas in enumerate(self.fragile)
            ],
            UserTowers(store),
        )

    @property
    def all(self) -> list[Fragile]:
        return [one for shard in self.fragile for one in shard]

    @property
    def mixed(self) -> list[str]:
        return [said for one in self.all for said in one.mixed]

    def load(self, version: str) -> None:
        """Everywhere, and known."""
        for one in self.all:
            one.host.load(version)
        self.hosts.refresh()


@contextmanager
def running(store: Path, versions: list[str], num_shards: int, num_replicas: int, most: int = 2) -> Iterator[Cluster]:
    cluster = Cluster(store, versions, num_shards, num_replicas, most)
    try:
        yield cluster
    finally:
        for one in cluster.all:
            if one.hangs is not None:
                one.hangs.set()
        cluster.hosts.close()
