"""One request's way over the shards: each asked in one version, again where that fails, and as long as there is time.

A refusal says what a host holds now, so what was stale is mended by the request that met it. A replica that takes
longer than it mostly does is not waited for alone: another is asked beside it, and whoever answers first counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field

from prerank.errors import RequestError
from prerank.serve.hosts import IndexHosts, Replica
from prerank.serve.index_host import Found, Held, HostFailed, NotHeld, Search
from prerank.serve.sync import choose

_GRACE_S = 0.02  # a call lasts a little longer than it is waited for, so that late is told from failed


@dataclass(frozen=True, slots=True)
class Gathered:
    """What the shards found, and of each that was left out why, by its number."""

    found: Sequence[Found]
    left_out: dict[int, str]


@dataclass(slots=True)
class _Ask:
    """One shard's way: the version it is asked in, whom it asked, who is at it, and when another is worth asking."""

    number: int
    version: str = ""
    tried: set[tuple[str, str]] = field(default_factory=set)  # of a replica and a version
    running: dict[Future[Found], tuple[Replica, str]] = field(default_factory=dict)
    hedge_at: float | None = None
    why: str = ""


class Scatter:
    """One request over `hosts`. `search_of` makes its search in a version, None where there is no user vector of it.

    `usable` are the versions there may be vectors of, the preferred first. It ends by `until`, on the clock.
    """

    def __init__(
        self,
        hosts: IndexHosts,
        search_of: Callable[[str, Held], Search | None],
        usable: Sequence[str],
        until: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._hosts, self._search_of, self._until, self._clock = hosts, search_of, until, clock
        self._usable = list(usable)
        self._searches: dict[str, Search | None] = {}
        self._found: dict[int, Found] = {}
        self._left_out: dict[int, str] = {}

    def gather(self) -> Gathered:
        """Ask every shard, and wait for those that answer in time."""
        asks = [_Ask(number) for number in range(len(self._hosts.shards))]
        chosen = choose([self._held(ask) for ask in asks], self._usable)
        for ask, version in zip(asks, chosen, strict=True):
            ask.version = version or ""
            self._go_on(ask)
        while open_asks := [ask for ask in asks if not self._is_settled(ask)]:
            now = self._clock()
            if now >= self._until:
                for ask in open_asks:
                    self._leave_out(ask, "late", "it did not answer in time")
                break
            hedges = [ask.hedge_at for ask in open_asks if ask.hedge_at is not None]
            futures = {future: ask for ask in open_asks for future in ask.running}
            done, _ = wait(futures, max(0.0, min([self._until, *hedges]) - now), FIRST_COMPLETED)
            for future in done:
                if not self._is_settled(futures[future]):
                    self._settle(futures[future], future)
            now = self._clock()
            for ask in open_asks:
                if not self._is_settled(ask) and ask.hedge_at is not None and now >= ask.hedge_at:
                    ask.hedge_at = None
                    if self._ask_next(ask):
                        self._hosts.count(ask.number, "hedged")
        return Gathered([self._found[n] for n in sorted(self._found)], dict(sorted(self._left_out.items())))

    def _is_settled(self, ask: _Ask) -> bool:
        return ask.number in self._found or ask.number in self._left_out

    def _held(self, ask: _Ask) -> set[str]:
        """Versions that a replica holds who was not asked in them yet."""
        return {
            version
            for one in self._hosts.shards[ask.number]
            if one.holding is not None
            for version in one.holding.versions
            if (one.name, version) not in ask.tried
        }

    def _go_on(self, ask: _Ask) -> None:
        """Ask the next replica, in another version where none has this one, or leave the shard out."""
        while not self._ask_next(ask):
            if ask.running:  # a replica that was asked beside may still answer
                return
            in_use = {found.version for found in self._found.values()}
            usable = sorted(self._usable, key=lambda version: version not in in_use)
            version = choose([self._held(ask)], usable)[0]
            if version is None:
                self._leave_out(ask, *self._why_not(ask))
                return
            ask.version = version

    def _ask_next(self, ask: _Ask) -> bool:
        """Whether there was a replica to ask in the ask's version, and it is being asked."""
        for one in self._hosts.replicas(ask.number, ask.version):
            holding = one.holding
            if (one.name, ask.version) in ask.tried or holding is None or ask.version not in holding.versions:
                continue
            search = self._search(ask.version, holding.versions[ask.version])
            if search is None:
                return False
            ask.tried.add((one.name, ask.version))
            now = self._clock()
            future = self._hosts.pool.submit(one.search, search, max(self._until - now, 0.0) + _GRACE_S)
            ask.running[future] = one, ask.version
            ask.hedge_at = now + one.hedge_s
            return True
        return False

    def _search(self, version: str, held: Held) -> Search | None:
        """The search in a version, made once; a version that there is no vector of is asked for no more."""
        if version not in self._searches:
            self._searches[version] = self._search_of(version, held)
            if self._searches[version] is None:
                self._usable.remove(version)
        return self._searches[version]

    def _settle(self, ask: _Ask, future: Future[Found]) -> None:
        """What came of asking one replica."""
        one, version = ask.running.pop(future)
        try:
            found = future.result()
            if found.version != version:
                raise HostFailed(f"{one.name}: asked in version {version}, it answered in {found.version}")
        except NotHeld as error:
            one.heard(error.holding)
            self._hosts.look_soon()  # there may be a tower to load
            outcome, ask.why = "refused", "its hosts took up other versions meanwhile"
        except RequestError as error:  # another replica would say the same
            self._leave_out(ask, None, f"it cannot be asked in version {version}: {error}")
            return
        except Exception:  # which `Replica` logs; whoever asked us is told no addresses
            outcome, ask.why = "failed", "its hosts failed"
        else:
            self._found[ask.number] = found
            self._hosts.count(ask.number, "answered")
            for other in ask.running:
                other.cancel()
            return
        self._hosts.count(ask.number, outcome)
        self._go_on(ask)

    def _why_not(self, ask: _Ask) -> tuple[str | None, str]:
        self._hosts.look_soon()
        held = sorted(self._held(ask))
        if held:
            return "no_tower", f"its hosts hold {held}, and no user tower of these is loaded"
        if ask.why:
            return None, ask.why
        return "no_version", "none of its hosts answers, or holds a version"

    def _leave_out(self, ask: _Ask, outcome: str | None, why: str) -> None:
        self._left_out[ask.number] = why
        for one in ("left_out", *([] if outcome is None else [outcome])):
            self._hosts.count(ask.number, one)
