"""Does a roll-out over index hosts lose a request, mix two spaces, or find less than the worse of its two versions?

A server and its index hosts, every shard twice, are processes on this machine; clients ask all the while. Hosts have
room for one version, and take the new one shard by shard, so that shards are of two versions for a while; in the middle
the pointer moves and a host is killed. Then all goes back. Which items each version finds for a user is known, so what
is of neither is seen (benchmarks/rollout_world.py). And what a round trip costs, over Flight and over gRPC.
"""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from benchmarks.machine import REPOSITORY, say
from benchmarks.result import Row
from benchmarks.rollout_wire import wire_rows
from benchmarks.rollout_world import KEEP, MOST, SEED, World
from benchmarks.run import Measured, Options, run
from benchmarks.server import ask, free_port, is_ready
from prerank.bundle.registry import Registry
from prerank.serve.index_flight import FlightHost

REPLICAS, CLIENTS, HOSTS_MS = 2, 2, 2000.0
SHARDS, QUICK_SHARDS = 4, 2
ITEMS, QUICK_ITEMS = 200_000, 20_000
USERS, QUICK_USERS = 2_000, 300
PAUSE_S, QUICK_PAUSE_S = 3.0, 0.5
STEADY_S, QUICK_STEADY_S = 20.0, 3.0
_BAR = 0.999
"""Of the worse version's: another order of summing moves an item in or out at the last place."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured."""

    shards: int
    items: int
    users: int
    pause_s: float
    steady_s: float


@dataclass(slots=True)
class Phase:
    """What was answered in one phase: times; of each answer its recall and its user; and how many were not as wanted.

    Mixed is one of which some shard's items are those of neither version.
    """

    name: str
    ms: list[float] = field(default_factory=list)
    recall: list[float] = field(default_factory=list)
    users: list[int] = field(default_factory=list)
    num_failed: int = 0
    num_degraded: int = 0
    num_mixed: int = 0


def measure(options: Options, ceilings: Mapping[str, float]) -> Measured:
    quick = Sizes(QUICK_SHARDS, QUICK_ITEMS, QUICK_USERS, QUICK_PAUSE_S, QUICK_STEADY_S)
    sizes = quick if options.quick else Sizes(SHARDS, ITEMS, USERS, PAUSE_S, STEADY_S)
    with TemporaryDirectory() as folder:
        say("rollout: publishing two versions")
        world = World.build(Path(folder) / "rollout", sizes.items, sizes.users, HOSTS_MS)
        rows = list(_rolled(world, sizes))
    rows += wire_rows(options.quick)
    kept = {"items": sizes.items, "shards": sizes.shards, "replicas": REPLICAS, "clients": CLIENTS, "keep": KEEP}
    return Measured(rows, kept)


def _rolled(world: World, sizes: Sizes) -> Iterator[Row]:
    ports = [[free_port() for _ in range(REPLICAS)] for _ in range(sizes.shards)]
    port, processes = free_port(), dict[int, subprocess.Popen[bytes]]()
    try:
        for shard, own in enumerate(ports):
            for one in own:
                processes[one] = _host(world, shard, sizes.shards, one)
        for one in processes:
            _hold(one, world.versions[0])
        listed = ",".join(f"{n}=" + "|".join(f"127.0.0.1:{one}" for one in own) for n, own in enumerate(ports))
        processes[port] = _process("serve", world, "--port", port, "--index-hosts", listed, "--traces", 0)
        _until(lambda: is_ready(port), "the server is ready")
        yield from _rows(world, sizes, ports, port, processes)
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


def _rows(
    world: World, sizes: Sizes, ports: list[list[int]], port: int, processes: dict[int, subprocess.Popen[bytes]]
) -> Iterator[Row]:
    registry, (first, second) = Registry(world.store), world.versions
    steady_first, out = Phase("steady, the first version"), Phase("rolling out")
    steady_second, back = Phase("steady, the second version"), Phase("rolling back")
    with _Load(world, sizes, port) as load:
        load.phase = Phase("warm-up")
        time.sleep(1.0)
        say("rollout: steady, then shard by shard")
        load.phase = steady_first
        time.sleep(sizes.steady_s)
        load.phase = out
        for shard, own in enumerate(ports):
            for one in own:
                _hold(one, second)
                time.sleep(sizes.pause_s)
            if shard == len(ports) // 2 - 1:
                registry.promote(second, "a benchmark", "the second")
                processes[own[0]].kill()
                processes[own[0]].wait()
                time.sleep(sizes.pause_s)
                processes[own[0]] = _host(world, shard, sizes.shards, own[0])
                _hold(own[0], second)
        _until(lambda: _version(port) == second, "the server serves the second")
        load.phase = steady_second
        time.sleep(sizes.steady_s)
        load.phase = back
        registry.rollback(first, "a benchmark", "")
        for own in ports:
            for one in own:
                _hold(one, first)
                time.sleep(sizes.pause_s)
        _until(lambda: _version(port) == first, "the server serves the first again")
        load.phase = Phase("over")
        asked = _metric(port, "prerank_index_several_versions_total")
    phases = (steady_first, out, steady_second, back)
    total = sum(len(phase.ms) for phase in phases)
    for what in ("failed", "mixed"):
        num = sum(getattr(phase, f"num_{what}") for phase in phases)
        yield replace(Row.of(f"requests {what}", num, "requests", total), bar=0, holds=num == 0)
    made = [world.num_of_no_version(user, world.crossed[user], sizes.shards) > 0 for user in range(sizes.users)]
    yield replace(
        Row.of("of mixes made on purpose, seen", float(np.mean(made)), "", len(made)), bar=1.0, holds=all(made)
    )
    yield Row.of("requests degraded", sum(phase.num_degraded for phase in phases), "requests", total)
    yield Row.of(
        "requests whose shards were asked in two versions, each by a vector of its own", asked, "requests", total
    )
    for phase in phases:
        yield Row.timed(f"request, {phase.name}", phase.ms, len(phase.ms))
    for phase in phases:
        # of the same users in the same numbers, so that what is compared is the versions and not the users
        worse = min(float(np.mean(recall[phase.users])) for recall in world.recall)
        found = float(np.mean(phase.recall))
        what = f"share of the true best {KEEP} among the candidates, {phase.name}"
        row = Row.of(what, found, "", len(phase.users), "the worse version", found / worse)
        yield replace(row, bar=_BAR, holds=found >= _BAR * worse)


class _Load:
    """Clients that ask one after another until this ends, and what came of it in the `phase` there is."""

    def __init__(self, world: World, sizes: Sizes, port: int) -> None:
        self.phase = Phase("")
        self._world, self._sizes, self._port = world, sizes, port
        self._over, self._lock = threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(CLIENTS)]

    def __enter__(self) -> _Load:
        for one in self._threads:
            one.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for one in self._threads:
            one.join()

    def _ask(self, number: int) -> None:
        draw = np.random.default_rng([SEED, number])
        with closing(http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)) as connection:
            while not self._over.is_set():
                phase, user = self.phase, int(draw.integers(self._sizes.users))
                body = json.dumps({"user_id": user, "k": MOST, "context": {}})
                start = time.perf_counter()
                connection.request("POST", "/v1/recommend", body)
                response = connection.getresponse()
                content = response.read()
                ms = (time.perf_counter() - start) * 1000
                with self._lock:
                    self._note(phase, user, ms, response.status, content)

    def _note(self, phase: Phase, user: int, ms: float, status: int, content: bytes) -> None:
        phase.ms.append(ms)
        if status != 200:
            phase.num_failed += 1
            return
        answer = json.loads(content)
        winners = np.array([one["item_id"] for one in answer["winners"]], np.int64)
        phase.users.append(user)
        phase.recall.append(float(np.isin(self._world.truth[user], winners).mean()))
        phase.num_degraded += answer["degraded"]
        phase.num_mixed += bool(self._world.num_of_no_version(user, winners, self._sizes.shards))


def _host(world: World, shard: int, of: int, port: int) -> subprocess.Popen[bytes]:
    return _process("index-host", world, "--shard", shard, "--of", of, "--port", port, "--versions", 1, "--no-follow")


def _process(verb: str, world: World, *options: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "prerank", verb, "--store", str(world.store.parent), *map(str, options)]
    return subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.DEVNULL)


def _hold(port: int, version: str) -> None:
    """Let a host hold a version, once it listens."""

    def is_held() -> bool:
        with closing(FlightHost(f"127.0.0.1:{port}")) as host:
            return version in host.load(version, 60.0).versions

    _until(is_held, f"the host at {port} holds {version}")


def _until(is_so: Callable[[], bool], what: str) -> None:
    end, why = time.monotonic() + 120, ""
    while time.monotonic() < end:
        try:
            if is_so():
                return
        except Exception as error:
            why = str(error)
        time.sleep(0.1)
    raise RuntimeError(f"not after two minutes: {what}; {why}")


def _version(port: int) -> str:
    return str(json.loads(ask(port, "/readyz")[1])["version"])


def _metric(port: int, name: str) -> float:
    lines = ask(port, "/metrics")[1].decode().splitlines()
    return next(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


if __name__ == "__main__":
    torch.set_num_threads(1)
    run("rollout", __doc__ or "", measure)
