"""A version goes to index hosts one by one before the pointer moves, or goes again; over the wire, and by a retrain."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from prerank.bundle.registry import Gate, Registry
from prerank.bundle.shard import Place
from prerank.bundle.toml import to_toml
from prerank.cli.app import app
from prerank.config import Config
from prerank.errors import GateFailed, RegistryError
from prerank.lifecycle.retrain import Asked, retrain
from prerank.lifecycle.runs import opened
from prerank.lifecycle.shard_rollout import ShardByShard
from prerank.serve.index_flight import FlightHost, FlightServer
from prerank.serve.index_host import Found, HostFailed, IndexHost, Search
from tests.lifecycle.server import Server
from tests.serve import spaces

SHARDS, REPLICAS = 2, 2
PAUSE = 7.0


class Hosts:
    """SHARDS x REPLICAS hosts behind servers, which hold the live version and follow nothing."""

    def __init__(self, store: Path, most: int = 2) -> None:
        self.registry = Registry(store)
        self.hosts = [[IndexHost(store, Place(n, SHARDS), most) for _ in range(REPLICAS)] for n in range(SHARDS)]
        self.servers = [[FlightServer(one) for one in shard] for shard in self.hosts]
        self.wires = [[FlightHost(f"127.0.0.1:{one.port}") for one in shard] for shard in self.servers]
        self.pauses: list[tuple[float, list[int], str | None]] = []
        for host in self.all:
            host.follow()

    @property
    def all(self) -> list[IndexHost]:
        return [one for shard in self.hosts for one in shard]

    @property
    def said(self) -> str:
        return ",".join(f"{n}=" + "|".join(one.address for one in shard) for n, shard in enumerate(self.wires))

    def held(self, version: str) -> list[int]:
        """Which of `all` hold a version."""
        return [n for n, one in enumerate(self.all) if version in one.holding().versions]

    def rollout(self, version: str, meanwhile: Callable[[], object] = lambda: None) -> ShardByShard:
        """`meanwhile` is what happens in each pause, after who holds `version` and what is live was written down."""

        def sleep(seconds: float) -> None:
            self.pauses.append((seconds, self.held(version), self.registry.live()))
            meanwhile()

        return ShardByShard(self.registry, self.wires, PAUSE, sleep)

    def close(self) -> None:
        for wire in (one for shard in self.wires for one in shard):
            wire.close()
        for server in (one for shard in self.servers for one in shard):
            server.shutdown()


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    store = tmp_path_factory.mktemp("shards") / "tiny"
    return store, [spaces.publish_space(store, number) for number in range(3)]


@pytest.fixture
def versions(published: tuple[Path, list[str]]) -> list[str]:
    return published[1]


@pytest.fixture
def store(published: tuple[Path, list[str]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(published[0], tmp_path / "tiny"))


@pytest.fixture
def hosts(store: Path) -> Iterator[Hosts]:
    made = Hosts(store)
    yield made
    made.close()


def test_shards_load_in_turn_with_a_pause_after_each_and_the_pointer_moves_last(
    hosts: Hosts, versions: list[str]
) -> None:
    hosts.rollout(versions[1]).roll_out(versions[1], "a test", "why")
    assert hosts.pauses == [(PAUSE, [0, 1], versions[0]), (PAUSE, [0, 1, 2, 3], versions[0])]
    last = hosts.registry.history()[-1]
    assert (last.to, last.by, last.why) == (versions[1], "a test", "why")
    hosts.rollout(versions[1]).roll_out(versions[1], "a test", "again")
    assert hosts.registry.history()[-1] == last, "it is live already"


@pytest.mark.parametrize("most", [1, 2])
def test_a_host_that_cannot_load_stops_it_and_the_others_let_it_go(
    store: Path, versions: list[str], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = Hosts(store, most)

    def no_room(version: str) -> None:
        raise RegistryError("no memory left")

    monkeypatch.setattr(hosts.all[3], "load", no_room)
    with pytest.raises(HostFailed) as failed:
        hosts.rollout(versions[1]).roll_out(versions[1], "a test", "why")
    assert (
        str(failed.value) == f"{versions[1]} stays unpointed: shard 1 of 2, {hosts.wires[1][1].address}: no memory left"
    )
    assert [held for _, held, _ in hosts.pauses] == [[0, 1]]
    assert (hosts.registry.live(), hosts.held(versions[1])) == (versions[0], [])
    assert hosts.held(versions[0]) == [0, 1, 2, 3], "also where it had made room"
    hosts.close()


def test_a_host_that_dies_in_the_pause_stops_it(hosts: Hosts, versions: list[str]) -> None:
    def die() -> None:
        hosts.servers[0][1].shutdown()

    with pytest.raises(HostFailed, match=f"stays unpointed: shard 0 of 2, {hosts.wires[0][1].address}: "):
        hosts.rollout(versions[1], die).roll_out(versions[1], "a test", "why")
    assert hosts.registry.live() == versions[0]
    assert hosts.held(versions[1]) == [1], "nobody reaches it there"


def _other_models(host: IndexHost, version: str) -> None:
    host._shards = {**host._shards, version: replace(host._shards[version], models={"retrieval": "another"})}


def _finds_nothing(host: IndexHost, version: str) -> None:
    real = host.search

    def search(search: Search, timeout_s: float | None = None) -> Found:
        found = real(search)
        return replace(found, item_ids=found.item_ids[:0], similarity=found.similarity[:0])

    host.search = search  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("spoil", "why"),
    [(_other_models, "expected an index of {'retrieval': '.*holds one of {'retrieval': 'another'}"),
     (_finds_nothing, r"a search of \d+ eligible items: expected 10 items"),
     (IndexHost.unload, "it does not hold .* any more")],
)  # fmt: skip
def test_a_host_that_is_ill_after_the_pause_stops_it(
    hosts: Hosts, versions: list[str], spoil: Callable[[IndexHost, str], None], why: str
) -> None:
    with pytest.raises(HostFailed, match=why):
        hosts.rollout(versions[1], lambda: spoil(hosts.all[0], versions[1])).roll_out(versions[1], "a test", "why")
    assert (hosts.registry.live(), hosts.held(versions[1])) == (versions[0], [])


def test_no_host_is_told_of_a_version_that_would_be_refused(hosts: Hosts, versions: list[str]) -> None:
    hosts.registry.write_validation(versions[1], [Gate("golden", "at_least 1.0", 0.0, False)])
    with pytest.raises(GateFailed, match="gate golden expected at_least"):
        hosts.rollout(versions[1]).roll_out(versions[1], "a test", "why")
    assert (hosts.pauses, hosts.held(versions[1])) == ([], [])


def test_a_list_that_does_not_fit_stops_it_before_anything_is_loaded(hosts: Hosts, versions: list[str]) -> None:
    swapped = ShardByShard(hosts.registry, hosts.wires[::-1], PAUSE)
    for begin in (swapped.ready, lambda: swapped.roll_out(versions[1], "a test", "why")):
        with pytest.raises(HostFailed, match=r"shard 0 of 2, .*it says that it is shard 1 of 2; mend the list"):
            begin()
    hosts.servers[1][1].shutdown()
    with pytest.raises(HostFailed, match=f"nothing can be rolled out: shard 1 of 2, {hosts.wires[1][1].address}"):
        hosts.rollout(versions[1]).roll_out(versions[1], "a test", "why")
    assert (hosts.pauses, hosts.held(versions[1])) == ([], [])


def _stop() -> None:
    raise KeyboardInterrupt


def test_one_that_was_stopped_is_begun_again_and_loads_nothing_twice(
    hosts: Hosts, versions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        hosts.rollout(versions[1], _stop).roll_out(versions[1], "a test", "why")
    assert (hosts.registry.live(), hosts.held(versions[1])) == (versions[0], [0, 1])

    def twice(version: str) -> None:
        raise RegistryError("it was loaded before")

    for host in hosts.all[:2]:
        monkeypatch.setattr(host, "load", twice)
    hosts.pauses.clear()
    hosts.rollout(versions[1]).roll_out(versions[1], "a test", "why")
    assert hosts.pauses == [(PAUSE, [0, 1, 2, 3], versions[0])]
    assert hosts.registry.live() == versions[1]


def test_what_a_stopped_one_loaded_goes_too_where_the_next_cannot(hosts: Hosts, versions: list[str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        hosts.rollout(versions[1], _stop).roll_out(versions[1], "a test", "why")
    rollout = hosts.rollout(versions[1], lambda: hosts.all[3].unload(versions[1]))
    with pytest.raises(HostFailed, match=r"shard 1 of 2.*it does not hold"):
        rollout.roll_out(versions[1], "a test", "why")
    assert (hosts.registry.live(), hosts.held(versions[1])) == (versions[0], [])


def test_a_pointer_that_somebody_else_moved_meanwhile_is_left_alone(hosts: Hosts, versions: list[str]) -> None:
    def moved() -> None:
        if hosts.registry.live() != versions[2]:
            hosts.registry.promote(versions[2], "somebody", "else")

    with pytest.raises(RegistryError, match=f"{versions[1]} stays unpointed: {versions[2]} was made live meanwhile"):
        hosts.rollout(versions[1], moved).roll_out(versions[1], "a test", "why")
    assert (hosts.registry.live(), hosts.held(versions[1])) == (versions[2], [])


def test_back_the_pointer_goes_first_and_hosts_that_cannot_follow_do_not_hold_it_up(
    hosts: Hosts, versions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rollout = hosts.rollout(versions[1])
    rollout.roll_out(versions[1], "a test", "why")
    for host in hosts.all[1:]:
        host.unload(versions[0])
    live_then: list[str | None] = []
    real = hosts.all[1].load

    def load(version: str) -> None:
        live_then.append(hosts.registry.live())
        real(version)

    monkeypatch.setattr(hosts.all[1], "load", load)
    hosts.servers[1][0].shutdown()
    rollout.roll_back(versions[0], "a test", "broken")
    last = hosts.registry.history()[-1]
    assert (last.action, last.to, last.why) == ("rollback", versions[0], "broken")
    assert live_then == [versions[0]]
    assert hosts.held(versions[0]) == [0, 1, 3]
    hosts.all[3].unload(versions[0])
    rollout.roll_back(versions[0], "a test", "stopped after the pointer moved, and begun again")
    assert (hosts.held(versions[0]), hosts.registry.history()[-1]) == ([0, 1, 3], last)


def test_a_retrain_goes_by_the_hosts_and_back_or_fails_and_says_which(
    small: tuple[Config, Path], retrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = Hosts(retrained)
    old = str(hosts.registry.live())
    held: list[Mapping[str, object]] = []
    rollout = ShardByShard(hosts.registry, hosts.wires, PAUSE, lambda _: held.append(hosts.all[0].holding().versions))
    real = hosts.all[2].load

    def no_room(version: str) -> None:
        raise RegistryError("no memory left")

    monkeypatch.setattr(hosts.all[2], "load", no_room)
    with pytest.raises(HostFailed, match=r"shard 1 of 2, .*: no memory left"):
        retrain(Asked(*small, retrained), rollout)
    with opened(retrained) as runs:
        assert runs.latest()[0].outcome == "failed"
        assert "no memory left" in runs.latest()[0].why
    assert (hosts.registry.live(), hosts.held(old)) == (old, [0, 1, 2, 3])

    monkeypatch.setattr(hosts.all[2], "load", real)
    made = retrain(Asked(*small, retrained, watch=Server(retrained, bad=5.0).watch()), rollout)
    assert made.run.outcome == "rolled back"
    assert [made.run.version in one for one in held] == [True, True, True]
    assert (hosts.registry.live(), hosts.held(old)) == (old, [0, 1, 2, 3])

    hosts.servers[1][1].shutdown()
    with pytest.raises(HostFailed, match="nothing can be rolled out: shard 1 of 2"):
        retrain(Asked(*small, retrained, again=True), rollout)
    with opened(retrained) as runs:
        run = runs.latest()[0]
        assert (run.outcome, runs.steps(run)) == ("failed", []), "before anything is trained"
    hosts.close()


def test_the_command_takes_a_list_and_refuses_one_that_is_none_before_anything_is_done(
    small: tuple[Config, Path], retrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prerank.cli.retrain.signal.signal", lambda *_: None)
    config = retrained.parent / "funnel.toml"
    config.write_text(to_toml(small[0].to_dict()))
    where = ["--config", str(config), "--data", str(small[1]), "--store", str(retrained.parent)]
    done = CliRunner().invoke(app, ["retrain", *where, "--index-hosts", "1=a:1"], env={"COLUMNS": "200"})
    assert "from 0 without a gap; got the shards [1]" in str(done.exception)
    hosts = Hosts(retrained)
    done = CliRunner().invoke(
        app, ["retrain", *where, "--index-hosts", hosts.said, "--pause", "0.1s"], env={"COLUMNS": "200"}
    )
    assert done.exit_code == 0, done.output
    live = str(hosts.registry.live())
    assert live in done.output
    assert hosts.held(live) == [0, 1, 2, 3]
    hosts.close()
