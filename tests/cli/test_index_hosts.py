"""The commands of index hosts."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from prerank.bundle.shard import Place
from prerank.serve.host_tls import HostTls
from prerank.serve.index_flight import FlightServer
from prerank.serve.index_host import IndexHost
from tests.cli.test_cli import run, run_alone
from tests.serve import certificates, spaces


@pytest.fixture
def two(tmp_path: Path) -> Iterator[tuple[str, list[IndexHost], list[str]]]:
    """Two hosts of a store, which hold its live version, and the versions there are."""
    store = tmp_path / "tiny"
    versions = [spaces.publish_space(store, number) for number in range(2)]
    hosts = [IndexHost(store, Place(number, 2)) for number in range(2)]
    for host in hosts:
        host.follow()
    servers = [FlightServer(host) for host in hosts]
    yield ",".join(f"{n}=127.0.0.1:{one.port}" for n, one in enumerate(servers)), hosts, versions
    for one in servers:
        one.shutdown()


def test_what_hosts_hold_is_listed_and_changed_one_after_another(two: tuple[str, list[IndexHost], list[str]]) -> None:
    said, hosts, versions = two
    told = run_alone("index-hosts", said)
    assert told.count(versions[0]) == 2
    assert "0 of 2" in told
    assert "retrieval " in told
    told = run("index-hosts", said, "--load", versions[1], "--unload", versions[0], "--shard", 1)
    assert versions[1] in told
    assert versions[0] not in told
    assert [list(host.holding().versions) for host in hosts] == [[versions[0]], [versions[1]]]


def test_a_roll_out_stops_at_the_first_host_that_cannot(two: tuple[str, list[IndexHost], list[str]]) -> None:
    said, hosts, versions = two
    told = run("index-hosts", f"0=127.0.0.1:1,1={said.rpartition('=')[2]}", "--load", versions[1], code=1)
    assert "error: 127.0.0.1:1" in told
    assert list(hosts[1].holding().versions) == [versions[0]]
    assert "expected a shard from 0 to 1" in run("index-hosts", said, "--shard", 2, code=1)


def test_a_host_that_cannot_begin_says_why(two: tuple[str, list[IndexHost], list[str]], tmp_path: Path) -> None:
    port = two[0].rpartition(":")[2]
    told = run_alone("index-host", "--store", tmp_path, "--shard", 0, "--of", 2, "--port", port, code=1)
    assert "a port that is free" in told
    assert "expected a number from 0 to 1" in run("index-host", "--store", tmp_path, "--shard", 2, "--of", 2, code=1)


def test_hosts_that_speak_tls_are_asked_with_the_files_named(
    two: tuple[str, list[IndexHost], list[str]], tmp_path: Path
) -> None:
    _, hosts, versions = two
    made = certificates.make(tmp_path)
    server = FlightServer(hosts[0], tls=HostTls.read(made.host.cert, made.host.key, made.ca))
    said, ours = f"0=grpc+tls://127.0.0.1:{server.port}", ("--hosts-ca", made.ca)
    ours += ("--hosts-cert", made.caller.cert, "--hosts-key", made.caller.key)
    try:
        assert "its certificate is" in run("index-hosts", said, code=1)
        assert versions[0] in run("index-hosts", said, *ours)
        # each host is of 2 shards, and one is listed: nothing is deleted
        told = run("clean", "--store", tmp_path, "--index-hosts", said, *ours, code=1)
        assert "it says that it is shard 0 of 2; mend the list of hosts" in told
    finally:
        server.shutdown()
    told = run("index-host", "--store", tmp_path, "--shard", 0, "--of", 2, "--tls-cert", made.host.cert, code=1)
    assert "--tls-cert and --tls-key belong together, and --tls-key is missing" in told
    told = run("serve", "--store", tmp_path, "--index-hosts", said, "--hosts-ca", tmp_path / "none", code=1)
    assert "expected a file of PEM: No such file" in " ".join(told.split()), "in lines as wide as a terminal"
