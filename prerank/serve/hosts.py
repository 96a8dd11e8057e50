"""The index hosts that a server asks: where they are, what each holds, how long it takes, whether it is left alone."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import structlog

from prerank.errors import ConfigError, PrerankError, RequestError
from prerank.serve.host_tls import SCHEME, CallerTls
from prerank.serve.index_host import AsksHost, Found, Holding, HostFailed, NotHeld, Search
from prerank.serve.user_towers import UserTowers
from prerank.stores.breaker import Breaker

_log = structlog.get_logger(__name__)
POLL_S = 1.0
"""Seconds between two looks at what hosts hold, where no request finds that it changed."""
_REST_S = 0.05  # between two looks in any case
OUTCOMES = ("answered", "failed", "refused", "hedged", "left_out", "late", "no_version", "no_tower")
"""What came of asking a shard: a replica answered; one failed, or did not hold the version any more; another was asked
because the first took long. Or the shard was left out, of these because none answered in time, because none answers or
holds a version at all, or none whose user tower is loaded."""
_AT_ONCE = 8  # searches of one replica; one that hangs takes no more threads than these
_HEDGE_S = 0.01  # until enough is known of a replica
_FEW = 20


class Replica:
    """One host of shard `number` of `of`. Threads may share one."""

    def __init__(self, name: str, number: int, of: int, asker: AsksHost) -> None:
        self.name, self.number, self.of, self.asker = name, number, of, asker
        self.holding: Holding | None = None
        self._breaker = Breaker(name, failures=3, rest_s=1.0)
        self._took: deque[float] = deque(maxlen=200)
        self._turns = threading.BoundedSemaphore(_AT_ONCE)
        self._said_wrong = self._is_failing = False

    def holds(self, version: str) -> bool:
        """Whether it did when it was last heard of."""
        return self.holding is not None and version in self.holding.versions

    @property
    def is_resting(self) -> bool:
        """Whether it failed so often that it is left alone for now."""
        return self._breaker.is_open

    @property
    def hedge_s(self) -> float:
        """After how many seconds without an answer another replica is worth asking: what 1 of 20 searches takes."""
        took = sorted(self._took.copy())
        return took[int(0.95 * len(took))] if len(took) >= _FEW else _HEDGE_S

    def search(self, search: Search, timeout_s: float) -> Found:
        """See `IndexHost.search`. Raises HostFailed too, and CircuitOpen where it is left alone.

        The first failure after an answer is logged.
        """
        if not self._turns.acquire(blocking=False):
            raise HostFailed(f"{self.name}: {_AT_ONCE} searches run there already")
        try:
            start = time.monotonic()
            refused: PrerankError | None = None
            with self._breaker:
                try:
                    found = self.asker.search(search, timeout_s)
                except (NotHeld, RequestError) as error:  # it is well, and says so
                    refused = error
                except Exception as error:
                    self._failed(error)
                    raise
            self._is_failing = False
            if refused is not None:
                raise refused
            self._took.append(time.monotonic() - start)
            return found
        finally:
            self._turns.release()

    def look(self, timeout_s: float) -> None:
        """Ask what it holds; nothing, where it does not answer or is another shard's."""
        try:
            holding = self.asker.holding(timeout_s)
        except PrerankError as error:
            self.holding = None
            self._failed(error)
            return
        self._is_failing = False
        self.heard(holding)

    def _failed(self, error: Exception) -> None:
        if not self._is_failing:
            _log.warning("an index host failed", host=self.name, shard=self.number, error=str(error))
        self._is_failing = True

    def heard(self, holding: Holding) -> None:
        """What it says that it is and holds."""
        if (holding.number, holding.of) == (self.number, self.of):
            self.holding, self._said_wrong = holding, False
            return
        self.holding = None
        if not self._said_wrong:
            _log.error(
                "an index host is of another shard than it is listed for, and is not asked",
                host=self.name,
                listed=f"{self.number} of {self.of}",
                says=f"{holding.number} of {holding.of}",
            )
        self._said_wrong = True


class IndexHosts:
    """The replicas of each shard, and the user `towers` for what they hold. Threads may share one.

    `refresh` looks at all of them; from `start` to `close` a thread does each second, and when `look_soon` says so.
    A server that asks them is ready while at least `least` shards are not `missing`.
    """

    def __init__(self, shards: Sequence[Sequence[Replica]], towers: UserTowers, least: int = 1) -> None:
        self.shards, self.towers, self.least = [list(replicas) for replicas in shards], towers, least
        replicas = [one for shard in self.shards for one in shard]
        self._replicas = replicas
        self.pool = ThreadPoolExecutor(_AT_ONCE * len(replicas), thread_name_prefix="index-host")
        self._looking = ThreadPoolExecutor(len(replicas), thread_name_prefix="index-host-look")
        self._lock = threading.Lock()
        self._counts: Counter[tuple[int, str]] = Counter()
        self._dropped = self._mixed = 0
        self._turn = itertools.count()
        self._ended, self._is_stale = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="index-hosts", daemon=True)

    @classmethod
    def open(cls, said: str, store: Path, least: int = 1, tls: CallerTls | None = None) -> IndexHosts:
        """Of a list as `parse_hosts` reads it, for the funnel in `store`; looked at once. Raises ConfigError."""
        from prerank.serve.index_flight import open_hosts  # Flight is only needed here

        shards = open_hosts(said, tls=tls)
        if not 0 <= least <= len(shards):
            raise ConfigError(f"--least-shards {least}: expected a number from 0 to {len(shards)}, the shards listed")
        hosts = cls(
            [
                [Replica(one.address, number, len(shards), one) for one in replicas]
                for number, replicas in enumerate(shards)
            ],
            UserTowers(store),
            least,
        )
        hosts.refresh()
        return hosts

    def start(self) -> None:
        """Look at the hosts from here on."""
        self._thread.start()

    def refresh(self, timeout_s: float = 1.0) -> None:
        """What every host holds, and the towers for it."""
        list(self._looking.map(lambda one: one.look(timeout_s), self._replicas))
        held: Counter[str] = Counter()
        for shard in self.shards:
            held.update({version for one in shard if one.holding is not None for version in one.holding.versions})
        self.towers.refresh(held)

    def look_soon(self) -> None:
        """What is known of the hosts is not so any more."""
        self._is_stale.set()

    def replicas(self, number: int, version: str) -> list[Replica]:
        """Those of a shard that hold a version, in the order to ask them in: in turn, those left alone last."""
        holding = [one for one in self.shards[number] if one.holds(version)]
        turn = next(self._turn) % max(len(holding), 1)
        return sorted(holding[turn:] + holding[:turn], key=lambda one: one.is_resting)

    def count(self, number: int, outcome: str) -> None:
        """One of OUTCOMES, of a shard."""
        with self._lock:
            self._counts[number, outcome] += 1

    def note(self, num_dropped: int, is_mixed: bool) -> None:
        """Of one request: how many candidates the serving version did not have, and whether it was of two versions."""
        with self._lock:
            self._dropped += num_dropped
            self._mixed += is_mixed

    def counts(self) -> dict[tuple[int, str], int]:
        """How often a shard had each of OUTCOMES."""
        with self._lock:
            return {(n, outcome): self._counts[n, outcome] for n in range(len(self.shards)) for outcome in OUTCOMES}

    @property
    def num_dropped(self) -> int:
        """Candidates of hosts that the serving version does not have."""
        return self._dropped

    @property
    def num_of_several(self) -> int:
        """Requests for which shards were asked in several versions, each by a vector of its own."""
        return self._mixed

    def holdings(self) -> dict[str, tuple[str, ...]]:
        """The versions that each host holds, by its address; none where it does not answer."""
        return {one.name: () if one.holding is None else tuple(one.holding.versions) for one in self._replicas}

    def missing(self) -> list[int]:
        """The numbers of the shards of which no replica answers and holds a version, when they were last heard of."""
        return [
            n for n, shard in enumerate(self.shards) if not any(one.holding and one.holding.versions for one in shard)
        ]

    def close(self) -> None:
        """Look no more, and let the connections go."""
        self._ended.set()
        self._is_stale.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)
        self.pool.shutdown(wait=False, cancel_futures=True)
        self._looking.shutdown(wait=False, cancel_futures=True)
        for one in self._replicas:
            one.asker.close()

    def _watch(self) -> None:
        while not self._ended.wait(_REST_S):
            self._is_stale.wait(POLL_S)
            self._is_stale.clear()
            try:
                self.refresh()
            except Exception:
                _log.exception("the index hosts could not be looked at")


_EXPECTED = "expected 0=host:port|host:port,1=host:port and so on, a shard each, or a file with a shard a line"


def parse_hosts(said: str) -> list[list[str]]:
    """The replicas' addresses of each shard, of "0=host:port|grpc+tls://host:port,1=..." or a file, a shard a line.

    Raises ConfigError naming what is wrong.
    """
    where, text = "--index-hosts", said
    if "=" not in said:
        try:
            where, text = said, Path(said).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--index-hosts {said!r}: {_EXPECTED}: {error}") from None
    shards: dict[int, list[str]] = {}
    lines = [line.partition("#")[0] for line in text.splitlines()]
    for entry in (one.strip() for line in lines for one in line.split(",")):
        if not entry:
            continue
        number, equals, addresses = entry.partition("=")
        replicas = [one.strip() for one in addresses.split("|")]
        if not equals or not number.strip().isdecimal() or not all(_is_address(one) for one in replicas):
            raise ConfigError(f"{where}: {_EXPECTED}, got {entry!r}")
        if int(number) in shards:
            raise ConfigError(f"{where}: shard {int(number)} is listed twice; put its replicas together with |")
        shards[int(number)] = replicas
    if not shards or sorted(shards) != list(range(len(shards))):
        raise ConfigError(f"{where}: {_EXPECTED}, from 0 without a gap; got the shards {sorted(shards)}")
    return [shards[n] for n in range(len(shards))]


def _is_address(said: str) -> bool:
    host, colon, port = said.removeprefix(SCHEME).rpartition(":")
    return bool(host and colon) and port.isdecimal() and 0 < int(port) < 65536 and "://" not in host
