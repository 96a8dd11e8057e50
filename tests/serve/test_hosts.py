"""A server whose index is on hosts of its own: what it answers, and what it does when they fail."""

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import structlog
import torch

from prerank.bundle.index_files import shards_of
from prerank.bundle.load import Bundle, load
from prerank.bundle.registry import Registry
from prerank.bundle.shard import Place
from prerank.errors import ConfigError
from prerank.serve.expand import ExpandUser
from prerank.serve.funnel import Funnel
from prerank.serve.hosts import IndexHosts, Replica, parse_hosts
from prerank.serve.http import create_app
from prerank.serve.index_host import HostFailed, IndexHost
from prerank.serve.live_version import LiveVersion
from prerank.serve.retrieve_hosts import RetrieveFromHosts
from prerank.serve.user_towers import UserTowers
from prerank.serve.watch import VersionWatch
from prerank.types import ItemChange, Request
from tests.serve import spaces, world
from tests.serve.client import Client
from tests.serve.cluster import Cluster, running

ASKED = Request(user_id=2, k=5, time_ms=world.UNTIL + 1, context=spaces.CONTEXT, deadline_ms=20_000)
CONFIG = spaces.config(inventory={"slack": 4}, serve={"hosts_ms": 5000.0})


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    store = tmp_path_factory.mktemp("four") / "tiny"
    return store, [spaces.publish_space(store, number, CONFIG) for number in range(4)]


@pytest.fixture
def store(four: tuple[Path, list[str]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(four[0], tmp_path / "store"))


@pytest.fixture
def cluster(store: Path, four: tuple[Path, list[str]]) -> Iterator[Cluster]:
    with running(store, four[1], 2, 2) as cluster:
        cluster.load(four[1][0])
        yield cluster


def candidates(funnel: Funnel, request: Request = ASKED) -> tuple[list[int], torch.Tensor, tuple[str, ...]]:
    """item_ids and similarities that the stage gives the ranker, and what it says was left out."""
    stages = {stage.name: stage for stage in funnel._graph.order}
    with torch.inference_mode(), funnel.inventory.readers.reading():
        values = {"request": request}
        values |= stages["target"].run(values)
        values |= stages["expand_user"].run(values)
        values |= stages["retrieve"].run(values)
    found = values["candidates"]
    rows = found.rows[0][found.valid[0]]
    return funnel._items.item_ids[rows].tolist(), found.similarity[0][found.valid[0]], values["left_out"]


def best(bundle: Bundle, user: torch.Tensor, among: set[int]) -> list[int]:
    similarity = {one: float(vector @ user) for one, vector in spaces.vectors_of(bundle).items() if one in among}
    return sorted(similarity, key=lambda one: (-similarity[one], one))


def ids_of(number: int) -> set[int]:
    return set(spaces.items(number)["item_id"].to_pylist())


def shard_of(ids: set[int], number: int, of: int = 2) -> set[int]:
    return {one for one in ids if shards_of(torch.tensor([one]).numpy(), of)[0] == number}


def test_answers_are_those_of_the_whole_index(store: Path, cluster: Cluster) -> None:
    requests = [Request(user, 12, ASKED.time_ms, {"hour": h, "surface": "feed"}) for user in (1, 2, 9) for h in (0, 1)]
    with Funnel.open(store) as whole, Funnel.open(store, hosts=cluster.hosts) as funnel:
        for request in requests:
            expected, got = whole.recommend(request), funnel.recommend(request)
            assert [(w.item_id, w.utility_micros) for w in got.winners] == [
                (w.item_id, w.utility_micros) for w in expected.winners
            ]
            assert not got.degraded
            assert got.notes == expected.notes
    assert not cluster.mixed


def test_a_shard_that_is_dead_is_left_out_and_the_answer_says_so(store: Path, cluster: Cluster) -> None:
    with Funnel.open(store, hosts=cluster.hosts) as funnel, Client(create_app(funnel, hosts=cluster.hosts)) as client:
        for one in cluster.fragile[1]:
            one.is_dead = True
        answer = funnel.recommend(ASKED)
        assert answer.degraded
        assert answer.winners
        assert {w.item_id for w in answer.winners} <= shard_of(ids_of(0), 0)
        assert [note for note in answer.notes if note == "shard 1 of 2 was left out: its hosts failed"]
        text = client.get("/metrics").text
        assert 'prerank_index_shards_total{outcome="left_out",shard="1"} 1.0' in text
        assert 'prerank_index_shards_total{outcome="left_out",shard="0"} 0.0' in text
        assert 'prerank_index_host_version{host="0.0",version="' in text
        assert "prerank_user_tower{version=" in text
        cluster.hosts.refresh()
        answer = funnel.recommend(ASKED)
        assert [note for note in answer.notes if "none of its hosts answers, or holds a version" in note]
        for one in cluster.all:
            one.is_dead = True
        nothing = funnel.recommend(ASKED)
        assert (nothing.winners, nothing.degraded) == ([], True)
        for one in cluster.all:
            one.is_dead = False
        cluster.hosts.refresh()
        time.sleep(1.1)  # what failed too often is left alone for a second
        assert not funnel.recommend(ASKED).degraded


def test_a_replica_answers_for_one_that_dies(store: Path, cluster: Cluster) -> None:
    with Funnel.open(store, hosts=cluster.hosts) as funnel:
        expected = candidates(funnel)
        for replicas in cluster.fragile:
            replicas[0].is_dead = True
        for _ in range(4):
            got = candidates(funnel)
            assert got[0] == expected[0]
            assert got[2] == ()
    assert sum(cluster.hosts.counts()[n, "failed"] for n in range(2)) > 0


def test_a_replica_that_takes_long_is_not_waited_for_alone(store: Path, cluster: Cluster) -> None:
    with Funnel.open(store, hosts=cluster.hosts) as funnel:
        expected = candidates(funnel)
        cluster.fragile[0][0].hangs = threading.Event()
        start = time.monotonic()
        for _ in range(2):  # one of two begins with it
            assert candidates(funnel)[0] == expected[0]
        assert time.monotonic() - start < 4
    assert cluster.hosts.counts()[0, "hedged"] >= 1


def test_a_shard_that_takes_too_long_is_left_out_in_time(store: Path, cluster: Cluster) -> None:
    with Funnel.open(store, hosts=cluster.hosts) as funnel:
        for one in cluster.fragile[0]:
            one.hangs = threading.Event()
        start = time.monotonic()
        answer = funnel.recommend(Request(2, 5, ASKED.time_ms, spaces.CONTEXT, deadline_ms=400))
        assert time.monotonic() - start < 0.4
        assert answer.winners
        assert [note for note in answer.notes if note == "shard 0 of 2 was left out: it did not answer in time"]
        assert cluster.hosts.counts()[0, "late"] == 1


def test_what_is_stale_is_mended_by_the_request_that_meets_it(
    store: Path, cluster: Cluster, four: tuple[Path, list[str]]
) -> None:
    versions = four[1]
    with Funnel.open(store, hosts=cluster.hosts) as funnel:
        for one in cluster.all:
            one.host.load(versions[1])
            one.host.unload(versions[0])
        cluster.hosts.towers.refresh({versions[0]: 2, versions[1]: 2})
        got, similarity, left_out = candidates(funnel)
        assert left_out == ()
        assert got
        assert bool((similarity != 0).all())
        assert sum(cluster.hosts.counts()[n, "refused"] for n in range(2)) >= 2
    assert not cluster.mixed


def test_shards_of_two_versions_are_each_asked_with_a_vector_of_their_own(
    store: Path, cluster: Cluster, four: tuple[Path, list[str]]
) -> None:
    versions = four[1]
    for one in cluster.fragile[1]:
        one.host.load(versions[1])
        one.host.unload(versions[0])
    cluster.hosts.refresh()
    with Funnel.open(store, hosts=cluster.hosts) as funnel:
        got, similarity, left_out = candidates(funnel)
        assert left_out == ()
        assert bool(similarity.isnan().all()), "they are of two spaces"
        users, rest = [], []
        for number, version in enumerate(versions[:2]):
            bundle = load(Registry(store).path(version))
            expand = ExpandUser(funnel._users, bundle.transforms, bundle.scorer.items)
            users.append(bundle.towers.user_side(expand.expand(funnel._users.get(2), ASKED)[0])[0])
            assert spaces.space_of(users[-1]) == {number}
            mine = best(bundle, users[-1], shard_of(ids_of(number), number))
            ours = [one for one in got if one in set(mine)]
            known = [one for one in mine if one in ids_of(0)]
            assert ours == known[: len(ours)], "the best of that version's shard, in its order"
            rest.append(len(ours))
        assert min(rest) >= 4
        assert funnel.recommend(ASKED).winners
    assert not cluster.mixed
    assert cluster.hosts.num_of_several >= 1


def test_a_user_is_embedded_once_for_each_distinct_version(
    store: Path, four: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded: list[str] = []
    search = RetrieveFromHosts._search

    def noted(self: RetrieveFromHosts, version: str, *rest: object) -> object:
        embedded.append(version)
        return search(self, version, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(RetrieveFromHosts, "_search", noted)
    with running(store, four[1], 4, 1, most=1) as cluster:
        for n, one in enumerate(cluster.all):
            one.host.load(four[1][n % 2])
        cluster.hosts.refresh()
        with Funnel.open(store, hosts=cluster.hosts) as funnel:
            embedded.clear()
            assert not funnel.recommend(ASKED).degraded
    assert sorted(embedded) == sorted(four[1][:2])


def test_a_version_whose_tower_is_gone_is_not_asked_and_that_is_said(
    store: Path, cluster: Cluster, four: tuple[Path, list[str]]
) -> None:
    versions = four[1]
    for one in cluster.fragile[1]:
        one.host.load(versions[1])
        one.host.unload(versions[0])
    shutil.rmtree(Registry(store).path(versions[1]))
    with structlog.testing.capture_logs() as logs:
        cluster.hosts.refresh()
        cluster.hosts.refresh()
    assert len([log for log in logs if log["event"] == "a user tower cannot be loaded"]) == 1
    with Funnel.open(store, hosts=cluster.hosts) as funnel:
        got, _, left_out = candidates(funnel)
        assert set(got) <= shard_of(ids_of(0), 0)
        assert [why for why in left_out if "no user tower of these is loaded" in why and versions[1] in why]
        assert cluster.hosts.counts()[1, "no_tower"] >= 1


def test_a_version_that_reads_what_the_request_lacks_is_not_asked(tmp_path: Path) -> None:
    plain = CONFIG.to_dict()["features"]
    assert isinstance(plain, dict)
    less = plain | {"context": {"hour": {"kind": "category", "dim": 2}}}
    home = tmp_path / "other"
    first = spaces.publish_space(home, 0, spaces.config(features=less, serve={"hosts_ms": 5000.0}))
    second = spaces.publish_space(home, 1, CONFIG)
    asked = Request(2, 5, ASKED.time_ms, {"hour": 1}, deadline_ms=20_000)
    with running(home, [first, second], 2, 1) as cluster:
        cluster.load(first)
        cluster.fragile[1][0].host.load(second)
        cluster.fragile[1][0].host.unload(first)
        cluster.hosts.refresh()
        with structlog.testing.capture_logs() as logs, Funnel.open(home, first, hosts=cluster.hosts) as funnel:
            for _ in range(3):
                answer = funnel.recommend(asked)
                assert answer.winners
                assert [note for note in answer.notes if note.startswith("shard 1 of 2 was left out: its hosts hold")]
        assert len([log for log in logs if log["event"] == "a user cannot be embedded"]) == 1


def test_what_a_request_finds_changed_is_looked_at_before_the_next_second(
    store: Path, cluster: Cluster, four: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prerank.serve.hosts.POLL_S", 600.0)
    with Funnel.open(store, hosts=cluster.hosts) as funnel:
        cluster.hosts.start()
        for one in cluster.fragile[1]:
            one.host.load(four[1][2])
            one.host.unload(four[1][0])
        assert funnel.recommend(ASKED).degraded, "nobody has heard of that version"
        until = time.monotonic() + 30
        while funnel.recommend(ASKED).degraded:
            assert time.monotonic() < until
            time.sleep(0.01)
        assert four[1][2] in cluster.hosts.towers.loaded


def test_the_last_n_towers_stay_loaded_those_that_hosts_hold_first(store: Path, four: tuple[Path, list[str]]) -> None:
    versions, registry = four[1], Registry(store)
    for version in versions[1:]:
        registry.promote(version, "a test", "")
    towers = UserTowers(store, most=3)
    towers.refresh({})
    assert towers.loaded == tuple(versions[:0:-1])
    towers.refresh({versions[0]: 2})
    assert towers.loaded == (versions[0], versions[3], versions[2])
    assert towers.get(versions[1]) is None
    side = towers.get(versions[0])
    towers.refresh({versions[0]: 1, versions[1]: 2})
    assert towers.loaded == (versions[1], versions[0], versions[3])
    assert towers.get(versions[0]) is side, "what is loaded stays"


def test_what_is_off_excluded_or_new_holds_though_hosts_do_not_know(store: Path, cluster: Cluster) -> None:
    with Funnel.open(store, hosts=cluster.hosts) as funnel, Funnel.open(store) as whole:
        off = candidates(funnel)[0][:4]
        changes = [ItemChange(one, on=False) for one in off]
        new = {"item_id": 900, "genre": "genre 1", "bid_micros": 9000, "title": "new", "topics": None}
        again = {"item_id": 110, "genre": "genre 2", "bid_micros": 10, "title": "again", "topics": None}
        columns = funnel.inventory.columns
        changes += [
            ItemChange(one["item_id"], columns={name: one[name] for name in columns})  # type: ignore[arg-type]
            for one in (new, again)
        ]
        funnel.change(changes)
        whole.catch_up([one.item_id for one in changes])
        request = Request(2, 12, ASKED.time_ms, spaces.CONTEXT, exclude=(111, 112), deadline_ms=20_000)
        got, expected = funnel.recommend(request), whole.recommend(request)
        assert [w.item_id for w in got.winners] == [w.item_id for w in expected.winners]
        found = candidates(funnel, request)[0]
        assert len(found) == 12, "more are asked for, as some are off"
        assert not {*off, 111, 112} & set(found)


def test_a_whole_roll_out_and_back_while_the_server_follows(
    store: Path, cluster: Cluster, four: tuple[Path, list[str]]
) -> None:
    versions = four[1]
    with closing(VersionWatch.open(store, hosts=cluster.hosts)) as watch:
        for target in (versions[1], versions[2], versions[1]):
            for one in cluster.all:
                one.host.load(target)
                cluster.hosts.refresh()
                answer = watch.live.recommend(ASKED)
                assert answer.winners
                assert not answer.degraded, answer.notes
            registry = Registry(store)
            if any(event.to == target for event in registry.history()):
                registry.rollback(target, "a test", "")
            else:
                registry.promote(target, "a test", "")
            assert watch.look()
            answer = watch.live.recommend(ASKED)
            assert (answer.version, answer.degraded) == (target, False)
        assert cluster.hosts.num_of_several == 0, "both were held everywhere"
    assert not cluster.mixed


def test_a_host_that_fails_is_logged_once_until_it_answers(store: Path, cluster: Cluster) -> None:
    one, replica = cluster.fragile[0][0], cluster.hosts.shards[0][0]
    with structlog.testing.capture_logs() as logs:
        for _ in range(2):
            one.is_dead = True
            replica.look(1.0)
            replica.look(1.0)
            one.is_dead = False
            replica.look(1.0)
    assert [(log["event"], log["host"], log["error"]) for log in logs] == [("an index host failed", "0.0", "dead")] * 2


def test_a_host_of_another_shard_than_it_is_listed_for_is_not_asked(four: tuple[Path, list[str]]) -> None:
    store, versions = four
    host = IndexHost(store, Place(1, 2))
    host.load(versions[0])
    replica = Replica("here", 0, 2, host)
    with structlog.testing.capture_logs() as logs:
        replica.look(1.0)
        replica.look(1.0)
    assert not replica.holds(versions[0])
    assert [(log["listed"], log["says"]) for log in logs] == [("0 of 2", "1 of 2")]


def test_a_replica_that_fails_again_and_again_is_left_alone(store: Path, four: tuple[Path, list[str]]) -> None:
    with running(store, four[1], 1, 1) as cluster:
        cluster.load(four[1][0])
        cluster.fragile[0][0].is_dead = True
        with Funnel.open(store, hosts=cluster.hosts) as funnel:
            for _ in range(10):
                assert funnel.recommend(ASKED).degraded
        assert cluster.fragile[0][0].num_asked <= 4


def test_searches_that_hang_take_no_more_than_a_few_threads() -> None:
    class Hangs:
        def __init__(self) -> None:
            self.end = threading.Event()

        def search(self, search: object, timeout_s: float | None = None) -> None:
            self.end.wait(30)

    hangs = Hangs()
    replica = Replica("here", 0, 1, hangs)  # type: ignore[arg-type]
    threads = [threading.Thread(target=replica.search, args=(None, 1.0)) for _ in range(8)]
    for one in threads:
        one.start()
    with pytest.raises(HostFailed, match="8 searches run there already"):
        replica.search(None, 1.0)  # type: ignore[arg-type]
    hangs.end.set()
    for one in threads:
        one.join()


def test_hosts_are_listed_in_a_word_or_in_a_file(tmp_path: Path) -> None:
    expected = [["a:1", "b:2"], ["[::1]:3"]]
    assert parse_hosts("0=a:1|b:2,1=[::1]:3") == expected
    where = tmp_path / "hosts"
    where.write_text("# ours\n1 = [::1]:3\n0 = a:1 | b:2  # two\n")
    assert parse_hosts(str(where)) == expected


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("0=a:1,2=b:2", r"from 0 without a gap; got the shards \[0, 2\]"),
        ("0=a", "got '0=a'"),
        ("0=a:99999", "got '0=a:99999'"),
        ("0=a:1,0=b:1", "shard 0 is listed twice"),
        ("x=a:1", "got 'x=a:1'"),
        ("0=a:1,b:2", "got 'b:2'"),
        ("nowhere", "No such file"),
    ],
)
def test_a_list_of_hosts_that_is_wrong_is_refused(said: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        parse_hosts(said)


def test_hosts_that_are_not_there_yet_leave_a_server_that_says_so(store: Path) -> None:
    hosts = IndexHosts.open("0=127.0.0.1:1", store)
    try:
        with Funnel.open(store, hosts=hosts) as funnel:
            answer = funnel.recommend(ASKED)
            assert (answer.degraded, answer.winners) == (True, [])
            assert LiveVersion(funnel).recommend(ASKED).degraded
    finally:
        hosts.close()


def test_targeting_is_asked_by_hosts_as_by_the_server(tmp_path: Path) -> None:
    rules = {
        "genres": {"item": "genre", "context": "surface"},
        "countries": {"item": "country", "user": "country", "excludes": True},
    }
    store, funnel = tmp_path / "tiny", spaces.config(targeting=rules, serve={"hosts_ms": 5000.0})
    version = spaces.publish_space(store, 0, funnel)
    with running(store, [version], 3, 1) as cluster:
        cluster.load(version)
        with Funnel.open(store) as whole, Funnel.open(store, hosts=cluster.hosts) as funnel:
            for user in (1, 2, 3, 9):
                for surface in ("genre 0", "genre 1", "nowhere"):
                    request = Request(user, 12, ASKED.time_ms, {"hour": 1, "surface": surface}, deadline_ms=20_000)
                    expected, got = whole.recommend(request), funnel.recommend(request)
                    assert [w.item_id for w in got.winners] == [w.item_id for w in expected.winners]
                    assert bool(got.winners) == (surface != "nowhere")
                    assert (got.notes, got.degraded) == (expected.notes, False)
