"""Index hosts over TLS: who is who is known by certificates, and what is wrong with them is said in a sentence."""

import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch

from prerank.bundle.registry import Registry
from prerank.bundle.shard import Place
from prerank.errors import ConfigError, RequestError
from prerank.lifecycle.shard_rollout import ShardByShard
from prerank.serve.exposure import LOCAL, Exposure
from prerank.serve.funnel import Funnel
from prerank.serve.host_tls import CallerTls, HostTls, why_not
from prerank.serve.hosts import IndexHosts, parse_hosts
from prerank.serve.index_flight import FlightHost, FlightServer, open_hosts
from prerank.serve.index_host import HostFailed, IndexHost, Search
from prerank.types import Request
from tests.serve import certificates, spaces, world
from tests.serve.certificates import Certificates

TOKEN = "a-token-of-sixteen"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return certificates.make(tmp_path_factory.mktemp("pem"))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    store = tmp_path_factory.mktemp("tls") / "tiny"
    return store, [spaces.publish_space(store, n, spaces.config(serve={"hosts_ms": 5000.0})) for n in range(2)]


@contextmanager
def serving(host: IndexHost, tls: HostTls | None, exposure: Exposure = LOCAL) -> Iterator[str]:
    """host:port of one that serves."""
    server = FlightServer(host, exposure=exposure, tls=tls)
    try:
        yield f"127.0.0.1:{server.port}"
    finally:
        server.shutdown()


def host_tls(made: Certificates, is_mutual: bool = False) -> HostTls:
    found = HostTls.read(made.host.cert, made.host.key, made.ca if is_mutual else None)
    assert found is not None
    return found


def asked(address: str, tls: CallerTls | None, token: str | None = None) -> list[str]:
    with closing(FlightHost(address, token, tls)) as host:
        return list(host.holding(20.0).versions)


def refused(address: str, tls: CallerTls | None) -> str:
    with pytest.raises(HostFailed) as raised:
        asked(address, tls)
    said = str(raised.value)
    assert said.startswith(f"{address}: ")
    return said.removeprefix(f"{address}: ")


def test_searches_and_changes_go_over_tls(made: Certificates, two: tuple[Path, list[str]]) -> None:
    store, versions = two
    host = IndexHost(store, Place(0, 1))
    host.load(versions[0])
    with (
        serving(host, host_tls(made), Exposure(TOKEN, False)) as at,
        closing(FlightHost(f"grpc+tls://{at}", TOKEN, CallerTls.read(made.ca, None, None))) as caller,
    ):
        shard = host._shards[versions[0]]
        found = caller.search(Search(versions[0], shard.models, torch.ones(shard.width), 3), 20.0)
        assert len(found.item_ids) == 3
        assert list(caller.load(versions[1], 20.0).versions) == versions
        assert list(caller.unload(versions[0], 20.0).versions) == versions[1:]


def test_tls_alone_lets_a_stranger_ask_but_change_nothing(made: Certificates, two: tuple[Path, list[str]]) -> None:
    with (
        serving(IndexHost(two[0], Place(0, 1)), host_tls(made), Exposure(TOKEN, False)) as at,
        closing(FlightHost(f"grpc+tls://{at}", None, CallerTls.read(made.ca, None, None))) as stranger,
        pytest.raises(RequestError, match="expected `Bearer` and the admin token, got none"),
    ):
        stranger.load(two[1][0], 20.0)


def test_with_a_ca_of_callers_a_certificate_is_needed_and_no_token(
    made: Certificates, two: tuple[Path, list[str]]
) -> None:
    host = IndexHost(two[0], Place(0, 1))
    exposure = Exposure.of("0.0.0.0", None, {}, are_known=True)
    with serving(host, host_tls(made, is_mutual=True), exposure) as at:
        known = CallerTls.read(made.ca, made.caller.cert, made.caller.key)
        with closing(FlightHost(f"grpc+tls://{at}", None, known)) as caller:
            assert list(caller.load(two[1][0], 20.0).versions) == two[1][:1]
        for nobody in (
            CallerTls.read(made.ca, None, None),
            CallerTls.read(made.ca, made.stranger.cert, made.stranger.key),
        ):
            assert "name a certificate that this CA signed with --hosts-cert" in refused(f"grpc+tls://{at}", nobody)
    assert list(host.holding().versions) == two[1][:1]


def test_who_speaks_another_way_than_a_host_is_told_so(made: Certificates, two: tuple[Path, list[str]]) -> None:
    trusts = CallerTls.read(made.ca, None, None)
    with serving(IndexHost(two[0], Place(0, 1)), host_tls(made)) as at:
        assert refused(at, None) == f"it closed the connection; if it speaks TLS, list it as grpc+tls://{at}"
    with serving(IndexHost(two[0], Place(0, 1)), None) as at:
        assert refused(f"grpc+tls://{at}", trusts).startswith("it does not speak TLS; start it with --tls-cert")
        assert asked(at, trusts) == [], "certificates are shown to hosts of grpc+tls:// alone"


def test_a_host_that_is_not_who_it_should_be_is_not_asked(made: Certificates, two: tuple[Path, list[str]]) -> None:
    with serving(IndexHost(two[0], Place(0, 1)), host_tls(made)) as at:
        for other in (CallerTls.read(made.stranger.cert, None, None), None):
            assert refused(f"grpc+tls://{at}", other).startswith("its certificate is signed by none that is trusted")
    elsewhere = HostTls.read(made.elsewhere.cert, made.elsewhere.key, None)
    with serving(IndexHost(two[0], Place(0, 1)), elsewhere) as at:
        said = refused(f"grpc+tls://{at}", CallerTls.read(made.ca, None, None))
        assert said == "its certificate names other hosts; list it by a name that is among them"


def test_a_server_and_a_roll_out_ask_hosts_over_tls(made: Certificates, two: tuple[Path, list[str]]) -> None:
    store, versions = two
    tls = CallerTls.read(made.ca, made.caller.cert, made.caller.key)
    hosts = [IndexHost(store, Place(n, 2)) for n in range(2)]
    with (
        serving(hosts[0], host_tls(made, is_mutual=True)) as first,
        serving(hosts[1], host_tls(made, is_mutual=True)) as second,
    ):
        said = f"0=grpc+tls://{first},1=grpc+tls://{second}"
        rollout = ShardByShard(Registry(store), open_hosts(said, None, tls), 0.0)
        rollout.roll_out(versions[1], "a test", "")
        assert [list(host.holding().versions) for host in hosts] == [versions[1:], versions[1:]]
        with closing(IndexHosts.open(said, store, 2, tls)) as asks, Funnel.open(store, hosts=asks) as funnel:
            assert asks.missing() == []
            request = Request(2, 5, world.UNTIL + 1, spaces.CONTEXT, deadline_ms=20_000)
            answer = funnel.recommend(request)
            assert (answer.version, answer.degraded, len(answer.winners)) == (versions[1], False, 5)


def test_what_is_wrong_with_a_file_is_said_before_anything_listens(made: Certificates, tmp_path: Path) -> None:
    nowhere, text = tmp_path / "nowhere.pem", tmp_path / "text"
    text.write_text("nothing of PEM")
    host, other = made.host, made.caller
    for read, why in (
        (lambda: HostTls.read(nowhere, host.key, None), rf"--tls-cert {nowhere}: expected a file of PEM: No such file"),
        (lambda: HostTls.read(host.cert, nowhere, None), rf"--tls-key {nowhere}: expected a file of PEM: No such file"),
        (lambda: HostTls.read(host.cert, other.key, None), r"--tls-key .*: this key does not fit the certificate in"),
        (lambda: HostTls.read(host.cert, text, None), r"--tls-key .*: expected a private key as PEM, without a pass"),
        (lambda: HostTls.read(text, host.key, None), r"--tls-cert .*: expected certificates as PEM"),
        (lambda: HostTls.read(host.cert, None, None), r"--tls-cert and --tls-key belong together, and --tls-key is mi"),
        (lambda: HostTls.read(None, host.key, None), r"--tls-key and --tls-cert belong together, and --tls-cert is m"),
        (lambda: HostTls.read(None, None, made.ca), r"--tls-client-ca: callers show certificates over TLS alone"),
        (lambda: HostTls.read(host.cert, host.key, text), r"--tls-client-ca .*: expected certificates as PEM"),
        (lambda: CallerTls.read(text, None, None), r"--hosts-ca .*: expected certificates as PEM"),
        (lambda: CallerTls.read(None, host.cert, other.key), r"--hosts-key .*: this key does not fit"),
        (lambda: CallerTls.read(None, None, host.key), r"--hosts-cert is missing"),
    ):
        with pytest.raises(ConfigError, match=why):
            read()
    assert HostTls.read(None, None, None) is None
    assert CallerTls.read(None, None, None) is None


def test_a_key_with_a_password_is_refused_and_not_asked_for(made: Certificates, tmp_path: Path) -> None:
    locked = tmp_path / "locked.key"
    certificates._openssl("ec", "-aes256", "-passout", "pass:secret", "-in", made.host.key, "-out", locked)
    with pytest.raises(ConfigError, match="expected a private key as PEM, without a password"):
        HostTls.read(made.host.cert, locked, None)


def test_keys_are_not_shown_where_options_are_printed(made: Certificates) -> None:
    both = (host_tls(made), CallerTls.read(made.ca, made.caller.cert, made.caller.key))
    assert "PRIVATE KEY" not in repr(both)


def test_addresses_say_who_speaks_tls(made: Certificates) -> None:
    said = "0=grpc+tls://a:1|b:2,1=grpc+tls://[::1]:3"
    assert parse_hosts(said) == [["grpc+tls://a:1", "b:2"], ["grpc+tls://[::1]:3"]]
    for wrong in ("0=https://a:1", "0=grpc+tls://a", "0=grpc+tls://:1"):
        with pytest.raises(ConfigError, match="expected 0=host:port"):
            parse_hosts(wrong)
    with pytest.raises(ConfigError, match=r"0=a:1: no host is listed as grpc\+tls://host:port"):
        open_hosts("0=a:1", None, CallerTls.read(made.ca, None, None))


def test_an_address_that_others_reach_needs_a_token_or_certificates_of_callers() -> None:
    with pytest.raises(ConfigError, match="needs an admin token"):
        Exposure.of("0.0.0.0", None, {})
    assert Exposure.of("0.0.0.0", None, {}, are_known=True) == Exposure(None, False)


def test_a_host_that_is_down_is_no_question_of_tls(made: Certificates) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
    said = refused(f"grpc+tls://127.0.0.1:{port}", CallerTls.read(made.ca, None, None))
    assert "Connection refused" in said
    assert why_not("a:1", "Deadline Exceeded") == "Deadline Exceeded"
