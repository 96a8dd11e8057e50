"""One shard of the index: what it finds, which versions it holds, what it refuses; in a process and over the wire."""

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.flight as flight
import pytest
import structlog
import torch

from prerank.bundle.index_files import shards_of
from prerank.bundle.load import Bundle, load
from prerank.bundle.registry import Registry
from prerank.bundle.shard import Place, load_shard
from prerank.bundle.user_side import load_user_side
from prerank.errors import BundleError, ConfigError, PrerankError, RegistryError, RequestError
from prerank.index import plan
from prerank.serve.expand import ExpandUser
from prerank.serve.exposure import LOCAL, Exposure
from prerank.serve.index_flight import FlightHost, FlightServer
from prerank.serve.index_host import AsksHost, HostFailed, IndexHost, NotHeld, Search, follow_live, hold_live
from prerank.stores.live import LiveUsers
from prerank.types import Request
from tests.serve import spaces, world
from tests.serve.conftest import golden

TARGETED = spaces.config(targeting={"genres": {"item": "genre", "context": "surface"}})


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    store = tmp_path_factory.mktemp("three") / "tiny"
    return store, [spaces.publish_space(store, number) for number in range(3)]


@pytest.fixture
def store(three: tuple[Path, list[str]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(three[0], tmp_path / "store"))


@contextmanager
def over_the_wire(host: IndexHost, exposure: Exposure = LOCAL, token: str | None = None) -> Iterator[FlightHost]:
    server = FlightServer(host, exposure=exposure)
    client = FlightHost(f"127.0.0.1:{server.port}", token)
    try:
        yield client
    finally:
        client.close()
        server.shutdown()


@contextmanager
def in_process(host: IndexHost) -> Iterator[AsksHost]:
    yield host


WAYS = pytest.mark.parametrize("way", [in_process, over_the_wire])


def asked(store: Path, version: str, k: int = 5, **said: object) -> Search:
    """A search by a user vector that version's tower could have made."""
    bundle = load(Registry(store).path(version))
    query = bundle.towers.user_side(load_golden(bundle)).detach()[0]
    return Search(version, bundle.index.models, query, k, **said)  # type: ignore[arg-type]


def load_golden(bundle: Bundle) -> dict[str, torch.Tensor]:
    features = golden(bundle.transforms, bundle.config)
    return {name: torch.from_numpy(column[:1]) for name, column in features.items()}


@WAYS
def test_all_shards_together_find_what_the_whole_index_does(way: object, three: tuple[Path, list[str]]) -> None:
    store, versions = three
    search = asked(store, versions[0], k=40)
    expected = spaces.vectors_of(load(Registry(store).path(versions[0])))
    found: dict[int, float] = {}
    for number in range(3):
        host = IndexHost(store, Place(number, 3))
        host.load(versions[0])
        with way(host) as asker:  # type: ignore[operator]
            got = asker.search(search, 5.0)
        assert got.version == versions[0]
        assert got.num_eligible == len(got.item_ids)
        assert got.similarity.tolist() == sorted(got.similarity.tolist(), reverse=True)
        assert not set(got.item_ids.tolist()) & set(found), "no item is in two shards"
        found |= dict(zip(got.item_ids.tolist(), got.similarity.tolist(), strict=True))
    assert found == pytest.approx({one: float(vector @ search.query) for one, vector in expected.items()}, abs=1e-6)


@WAYS
def test_a_host_says_what_each_index_was_built_with(way: object, three: tuple[Path, list[str]]) -> None:
    store, versions = three
    host = IndexHost(store, Place(1, 2))
    host.load(versions[0])
    host.load(versions[1])
    with way(host) as asker:  # type: ignore[operator]
        holding = asker.holding(5.0)
    assert (holding.number, holding.of, list(holding.versions)) == (1, 2, versions[:2])
    for version in versions[:2]:
        side = load_user_side(Registry(store).path(version))
        assert holding.versions[version].models == side.models


@WAYS
def test_a_version_that_is_not_held_is_refused_with_what_is(way: object, three: tuple[Path, list[str]]) -> None:
    store, versions = three
    host = IndexHost(store, Place(0, 2))
    host.load(versions[1])
    with way(host) as asker:  # type: ignore[operator]
        with pytest.raises(NotHeld, match=f"expected a version of .*{versions[1]}.*got {versions[0]}") as refused:
            asker.search(asked(store, versions[0]), 5.0)
        assert list(refused.value.holding.versions) == [versions[1]]
        other = asked(store, versions[0])
        claimed = Search(versions[1], other.models, other.query, 5)
        with pytest.raises(NotHeld):
            asker.search(claimed, 5.0)


@WAYS
def test_an_index_that_cannot_be_cut_is_searched_among_the_shards_rows(
    way: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "tiny"
    version = spaces.publish_space(store, 0, TARGETED)
    said = {"context": {"surface": "genre 1"}, "exclude": (104, 107), "values": ("bid_micros",)}
    search = asked(store, version, k=4, **said)
    for number in range(2):
        cut, whole = IndexHost(store, Place(number, 2)), IndexHost(store, Place(number, 2))
        cut.load(version)
        with monkeypatch.context() as patch:
            patch.setattr("prerank.bundle.shard.ExactIndex", type("Another", (), {}))
            whole.load(version)
        assert whole._shards[version].rows is not None
        with way(cut) as one, way(whole) as other:  # type: ignore[operator]
            for asks in (search, asked(store, version, k=99, context={"surface": "genre 2"})):
                expected, found = one.search(asks, 5.0), other.search(asks, 5.0)
                assert found.item_ids.tolist() == expected.item_ids.tolist()
                assert torch.equal(found.similarity, expected.similarity)
                assert found.num_eligible == expected.num_eligible
                for name in asks.values:
                    assert torch.equal(found.values[name], expected.values[name])


def test_a_graph_is_searched_among_the_shards_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_pace", lambda tried, truth: 0.5)  # of so few rows it is never faster
    plain = spaces.config().to_dict()["retrieval"]
    assert isinstance(plain, dict)
    store = tmp_path / "tiny"
    version = spaces.publish_space(store, 0, spaces.config(retrieval=plain | {"index": {"kind": "hnsw"}}))
    query = spaces.vectors_of(load(Registry(store).path(version)), "_exact")[101].clone()
    query[-1] = 1.0
    for number in range(2):
        shard = load_shard(Registry(store).path(version), Place(number, 2))
        assert shard.rows is not None
        host = IndexHost(store, Place(number, 2))
        host.load(version)
        found = host.search(Search(version, shard.models, query, 6))
        vectors = spaces.vectors_of(load(Registry(store).path(version)), "_exact")
        similarity = {one: float(vectors[one] @ query) for one in shard.item_ids.tolist()}
        assert set(found.item_ids.tolist()) == set(sorted(similarity, key=lambda one: -similarity[one])[:6])


@WAYS
def test_bids_come_beside_where_they_are_asked_for(way: object, three: tuple[Path, list[str]]) -> None:
    store, versions = three
    host = IndexHost(store, Place(1, 2))
    host.load(versions[2])
    bids = dict(zip(*(spaces.items(2)[name].to_pylist() for name in ("item_id", "bid_micros")), strict=True))
    with way(host) as asker:  # type: ignore[operator]
        found = asker.search(asked(store, versions[2], k=7, values=("bid_micros",)), 5.0)
        without = asker.search(asked(store, versions[2], k=7), 5.0)
    assert found.values["bid_micros"].tolist() == [bids[one] for one in found.item_ids.tolist()]
    assert (without.item_ids.tolist(), dict(without.values)) == (found.item_ids.tolist(), {})


@WAYS
@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"values": ("bid",)}, r"values: expected some of \['bid_micros'\], got 'bid'"),
        ({"query": torch.zeros(3)}, r"query: expected float32 \[16\], got float32 \[3\]"),
        ({"k": 0}, "k: expected 1 or more, got 0"),
    ],
)
def test_a_search_that_is_wrong_is_refused(
    way: object, said: dict[str, object], why: str, three: tuple[Path, list[str]]
) -> None:
    store, versions = three
    host = IndexHost(store, Place(0, 2))
    host.load(versions[0])
    good = asked(store, versions[0])
    plain = {"query": good.query, "k": 5} | said
    with way(host) as asker, pytest.raises(RequestError, match=why):  # type: ignore[operator]
        asker.search(Search(versions[0], good.models, **plain), 5.0)  # type: ignore[arg-type]


@WAYS
def test_who_may_not_see_an_item_is_not_told_of_it_and_k_are_found_all_the_same(way: object, tmp_path: Path) -> None:
    store = tmp_path / "tiny"
    version = spaces.publish_space(store, 0, TARGETED)
    genres = dict(zip(*(spaces.items(0)[name].to_pylist() for name in ("item_id", "genre")), strict=True))
    search = asked(store, version, k=3, context={"surface": "genre 1"}, exclude=(101, 104, 1))
    for number in range(2):
        host = IndexHost(store, Place(number, 2))
        host.load(version)
        assert host.holding().versions[version].context == ("surface",)
        mine = shards_of(torch.tensor(list(genres)).numpy(), 2) == number
        may = {one for one, is_mine in zip(genres, mine, strict=True) if is_mine and genres[one] == "genre 1"}
        may -= {101, 104}
        with way(host) as asker:  # type: ignore[operator]
            found = asker.search(search, 5.0)
        assert set(found.item_ids.tolist()) <= may
        assert (len(found.item_ids), found.num_eligible) == (3, len(may))
        nobody = Search(version, search.models, search.query, 3, context={"surface": "no genre"})
        with way(host) as asker:  # type: ignore[operator]
            assert asker.search(nobody, 5.0).num_eligible == 0


def test_over_the_wire_a_context_that_targeting_cannot_read_is_the_callers_mistake(tmp_path: Path) -> None:
    store = tmp_path / "tiny"
    version = spaces.publish_space(store, 0, TARGETED)
    host = IndexHost(store, Place(0, 1))
    host.load(version)
    with over_the_wire(host) as asker, pytest.raises(RequestError, match=r"context\.surface: missing"):
        asker.search(asked(store, version), 5.0)


def test_an_item_is_in_the_same_shard_in_every_version_and_shards_are_of_a_size(three: tuple[Path, list[str]]) -> None:
    store, versions = three
    at = [
        {one: n for n in range(3) for one in load_shard(Registry(store).path(version), Place(n, 3)).item_ids.tolist()}
        for version in versions
    ]
    both = set(at[0]) & set(at[1])
    assert both
    assert all(at[0][one] == at[1][one] for one in both)
    sizes = torch.bincount(torch.from_numpy(shards_of(torch.arange(100_000).numpy(), 4)))
    assert (sizes - 25_000).abs().max() < 500


def test_with_a_column_its_values_stay_together(tmp_path: Path) -> None:
    store = tmp_path / "tiny"
    plain = spaces.config().to_dict()["retrieval"]
    assert isinstance(plain, dict)
    version = spaces.publish_space(store, 0, spaces.config(retrieval=plain | {"index": {"by": "genre"}}))
    genres = dict(zip(*(spaces.items(0)[name].to_pylist() for name in ("item_id", "genre")), strict=True))
    seen: list[str] = []
    for number in range(2):
        ids = load_shard(Registry(store).path(version), Place(number, 2)).item_ids.tolist()
        seen += {genres[one] for one in ids}
    assert sorted(seen) == ["genre 0", "genre 1", "genre 2"]


def test_by_names_a_column_that_is_shown() -> None:
    plain = spaces.config().to_dict()["retrieval"]
    assert isinstance(plain, dict)
    with pytest.raises(ConfigError, match=r"retrieval\.index\.by.*genr"):
        spaces.config(retrieval=plain | {"index": {"by": "genr"}})


def test_the_version_loaded_first_goes_but_never_the_live_one(store: Path, three: tuple[Path, list[str]]) -> None:
    versions = three[1]
    host = IndexHost(store, Place(0, 2), most=2)
    assert host.follow()
    assert not host.follow()
    host.load(versions[1])
    host.load(versions[2])
    assert list(host.holding().versions) == [versions[0], versions[2]]
    host.unload(versions[2])
    with pytest.raises(RegistryError, match="expected one that is held"):
        host.unload(versions[2])
    one = IndexHost(store, Place(0, 2), most=1)
    one.load(versions[1])
    assert one.follow()
    assert list(one.holding().versions) == [versions[0]]


def test_a_search_that_runs_is_not_disturbed_by_an_unload(store: Path, three: tuple[Path, list[str]]) -> None:
    host = IndexHost(store, Place(0, 1))
    host.load(three[1][0])
    search = asked(store, three[1][0])
    before = host.search(search)
    shard = host._shards[three[1][0]]
    host.unload(three[1][0])
    assert shard.index.search(search.query[None], 5, None).rows.tolist()[0]
    host.load(three[1][0])
    assert host.search(search).item_ids.tolist() == before.item_ids.tolist()


def test_what_is_damaged_is_refused_by_name_and_what_was_held_stays(store: Path, three: tuple[Path, list[str]]) -> None:
    versions = three[1]
    host = IndexHost(store, Place(0, 2))
    host.load(versions[0])
    where = Registry(store).path(versions[1]) / "index" / "shard-0.safetensors"
    where.write_bytes(where.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"shard-0\.safetensors: expected \d+ bytes"):
        host.load(versions[1])
    assert list(host.holding().versions) == [versions[0]]


@pytest.mark.parametrize(("number", "of"), [(2, 2), (-1, 2), (0, 0)])
def test_a_shard_there_is_not_is_refused(number: int, of: int) -> None:
    with pytest.raises(ConfigError, match=f"shard {number} of {of}"):
        Place(number, of)


def test_a_shard_of_nothing_is_refused(three: tuple[Path, list[str]]) -> None:
    store, versions = three
    ids = torch.arange(100, 100 + spaces.NUM_ITEMS).numpy()
    empty = next(n for n in range(997) if n not in shards_of(ids, 997))
    with pytest.raises(BundleError, match="none of 37 items is in shard"):
        load_shard(Registry(store).path(versions[1]), Place(empty, 997))


def test_a_host_follows_the_pointer_and_says_once_what_it_cannot_hold(
    store: Path, three: tuple[Path, list[str]]
) -> None:
    versions = three[1]
    host, ended = IndexHost(store, Place(0, 2)), threading.Event()
    assert hold_live(host)
    thread = threading.Thread(target=follow_live, args=(host, ended, 0.01))
    with structlog.testing.capture_logs() as logs:
        thread.start()
        (Registry(store).path(versions[2]) / "index" / "shard-0.safetensors").unlink()
        registry = Registry(store)
        (store / "live").write_text(versions[2] + "\n")
        time.sleep(0.3)
        registry.promote(versions[1], "a test", "")
        until = time.monotonic() + 30
        while versions[1] not in host.holding().versions:
            assert time.monotonic() < until
            time.sleep(0.01)
        ended.set()
        thread.join()
    failed = [log for log in logs if log["log_level"] == "error"]
    assert len(failed) == 1
    assert "no such file" in failed[0]["error"]


def test_versions_are_loaded_and_let_go_over_the_wire_by_who_shows_the_token(
    store: Path, three: tuple[Path, list[str]]
) -> None:
    versions, token = three[1], "a-token-of-sixteen"
    host = IndexHost(store, Place(0, 2))
    with over_the_wire(host, Exposure(token, False), token) as client:
        assert list(client.load(versions[1]).versions) == [versions[1]]
        assert list(client.load(versions[0]).versions) == versions[1::-1]
        assert list(client.unload(versions[1]).versions) == [versions[0]]
        with pytest.raises(RequestError, match="expected one that is held"):
            client.unload(versions[1])
        with pytest.raises(RequestError, match="expected one of the versions"):
            client.load("20000101T0000-000000000000")
    with over_the_wire(host, Exposure(token, False)) as stranger:
        with pytest.raises(RequestError, match="expected `Bearer` and the admin token, got none"):
            stranger.unload(versions[0])
        assert list(stranger.holding(5.0).versions) == [versions[0]], "reading needs none"


@pytest.mark.parametrize("is_compressed", [True, False])
def test_candidates_are_the_same_compressed_or_not(three: tuple[Path, list[str]], is_compressed: bool) -> None:
    store, versions = three
    host = IndexHost(store, Place(0, 2))
    host.load(versions[0])
    search = asked(store, versions[0])
    server = FlightServer(host, is_compressed=is_compressed)
    client = FlightHost(f"127.0.0.1:{server.port}")
    try:
        found, plain = client.search(search), host.search(search)
        assert len(plain.item_ids)
        assert torch.equal(found.item_ids, plain.item_ids)
        assert torch.equal(found.similarity, plain.similarity)
    finally:
        client.close()
        server.shutdown()


def test_what_is_no_search_is_refused(three: tuple[Path, list[str]]) -> None:
    server = FlightServer(IndexHost(three[0], Place(0, 2)))
    client = flight.FlightClient(f"grpc://127.0.0.1:{server.port}")
    try:
        with pytest.raises(flight.FlightError, match="malformed"):
            client.do_get(flight.Ticket(b"what")).read_all()
        with pytest.raises(flight.FlightError, match="action: expected one of"):
            list(client.do_action(flight.Action("reset", b"")))
        assert dict(client.list_actions())["load"]
    finally:
        client.close()
        server.shutdown()


def test_a_port_that_is_taken_is_said() -> None:
    server = FlightServer(IndexHost(Path("nowhere"), Place(0, 1)))
    try:
        with pytest.raises(ConfigError, match="a port that is free"):
            FlightServer(IndexHost(Path("nowhere"), Place(0, 1)), port=server.port)
    finally:
        server.shutdown()


def test_nobody_there_and_nobody_in_time_are_failures_of_the_host(
    store: Path, three: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    host = IndexHost(store, Place(0, 2))
    host.load(three[1][0])
    search = asked(store, three[1][0])
    with over_the_wire(host) as client:
        go_on = threading.Event()
        monkeypatch.setattr(host, "search", lambda _: go_on.wait(10))
        with pytest.raises(HostFailed, match="timeout"):
            client.search(search, 0.05)
        go_on.set()
        monkeypatch.undo()
        assert len(client.search(search, 5.0).item_ids) == 5
    with over_the_wire(host) as client:
        pass
    gone = FlightHost("127.0.0.1:1")
    with pytest.raises(HostFailed):
        gone.search(search, 1.0)
    with pytest.raises(PrerankError):
        gone.holding(1.0)
    gone.close()


def test_a_user_side_makes_the_same_vector_as_the_whole_version(three: tuple[Path, list[str]]) -> None:
    store, versions = three
    request = Request(1, 5, world.UNTIL + 1, spaces.CONTEXT)
    with LiveUsers.open(store / "users.lmdb", store / "events.lmdb") as users:
        for number, version in enumerate(versions):
            path = Registry(store).path(version)
            bundle, side = load(path), load_user_side(path)
            made = [
                one.towers.user_side(ExpandUser(users, one.transforms, items).expand(users.get(1), request)[0])
                for one, items in ((bundle, bundle.scorer.items), (side, side.items))
            ]
            assert torch.equal(made[0], made[1])
            assert spaces.space_of(made[0]) == {number}
            assert spaces.space_of(torch.stack(list(spaces.vectors_of(bundle).values()))) == {number}
