"""Index hosts as processes: a roll-out under load, with kill -9 of one in the middle."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import torch

from prerank.bundle.registry import Registry
from prerank.serve.hosts import IndexHosts, Replica
from prerank.serve.index_flight import FlightHost
from prerank.serve.index_host import Found, Search
from prerank.serve.user_towers import UserTowers
from prerank.serve.watch import VersionWatch
from prerank.types import Request
from tests.serve import spaces, world
from tests.serve.host_processes import HostProcess

SHARDS, REPLICAS = 2, 2
CONFIG = spaces.config(serve={"hosts_ms": 10_000.0})


class Looked(FlightHost):
    """The wire, with an eye on what goes over it."""

    def __init__(self, address: str, versions: list[str], seen: Counter[str], mixed: list[str]) -> None:
        super().__init__(address)
        self._versions, self._seen, self._mixed = versions, seen, mixed

    def search(self, search: Search, timeout_s: float | None = None) -> Found:
        found = super().search(search, timeout_s)
        self._seen[found.version] += 1
        own = self._versions.index(found.version)
        if spaces.space_of(search.query) != {own} or bool((found.similarity == 0).any()) or not len(found.item_ids):
            self._mixed.append(f"{spaces.space_of(search.query)} answered by {own}: {found.similarity}")
        return found


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    store = tmp_path_factory.mktemp("processes") / "tiny"
    return store, [spaces.publish_space(store, number, CONFIG) for number in range(3)]


@pytest.fixture
def processes(published: tuple[Path, list[str]]) -> Iterator[list[HostProcess]]:
    hosts = [HostProcess(published[0], shard, SHARDS) for shard in range(SHARDS) for _ in range(REPLICAS)]
    try:
        yield [host.listening() for host in hosts]
    finally:
        for host in hosts:
            if host.process.poll() is None:
                host.end(kill=True)


@pytest.mark.slow  # in one process tests/serve/test_version_sync.py holds the same
def test_a_roll_out_under_load_with_a_host_killed_in_the_middle_fails_and_mixes_nothing(
    published: tuple[Path, list[str]], processes: list[HostProcess]
) -> None:
    store, versions = published
    registry, seen, mixed = Registry(store), Counter[str](), list[str]()
    ports = [[host.port for host in processes if host.shard == shard] for shard in range(SHARDS)]
    hosts = IndexHosts(
        [
            [
                Replica(f"{port}", shard, SHARDS, Looked(f"127.0.0.1:{port}", versions, seen, mixed))
                for port in ports[shard]
            ]
            for shard in range(SHARDS)
        ],
        UserTowers(store),
    )
    hosts.refresh(60.0)
    hosts.start()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    over, answers, wrong = threading.Event(), Counter[str](), list[str]()
    killed = processes[0]
    with closing(hosts), closing(VersionWatch.open(store, poll_s=0.02, hosts=hosts)) as watch:
        watch.start()

        def ask(number: int) -> None:
            at = 0
            while not over.is_set():
                at += 1
                request = Request(1 + (number + at) % 3, 12, world.UNTIL + 1, {"hour": at % 3, "surface": "feed"})
                answer = watch.live.recommend(request)
                answers[answer.version] += 1
                if answer.degraded or not answer.winners:
                    wrong.append(f"{answer.version}: {answer.notes}")

        def until(is_so: Callable[[], bool], what: str) -> None:
            end = time.monotonic() + 90
            while not is_so():
                for one in asking:
                    assert not one.done(), one.result()
                assert time.monotonic() < end, (what, hosts.holdings(), answers)
                time.sleep(0.01)

        def asked_in(version: str) -> None:
            """All that live hold it, the server serves it, and some were answered since."""
            up = [str(host.port) for host in processes if host.process.poll() is None]
            until(lambda: all(version in hosts.holdings()[name] for name in up), "hosts hold it")
            until(lambda: watch.live.version == version, "it serves")
            goal, goal_of_hosts = answers[version] + 20, seen[version] + 20
            until(lambda: answers[version] >= goal and seen[version] >= goal_of_hosts, "it answers")

        with ThreadPoolExecutor(3) as pool:
            asking = [pool.submit(ask, number) for number in range(3)]
            try:
                asked_in(versions[0])
                registry.promote(versions[1], "a test", "")
                time.sleep(0.3)  # while some have it and some do not
                assert killed.end(kill=True) == -9
                asked_in(versions[1])
                processes[0] = HostProcess(store, killed.shard, SHARDS, killed.port).listening()
                until(lambda: bool(hosts.holdings()[str(killed.port)]), "it is back")
                registry.promote(versions[2], "a test", "")
                asked_in(versions[2])
                registry.rollback(versions[1], "a test", "")
                asked_in(versions[1])
            finally:
                over.set()
        for one in asking:
            one.result()
        torch.set_num_threads(threads)
    assert not mixed
    assert not wrong
    assert set(seen) == set(versions)
    assert processes[0].end() == 0
    assert "index host ends" in processes[0].said
