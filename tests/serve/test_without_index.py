"""A server beside index hosts needs no index: it serves, switches and takes items in a store that has none."""

import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from prerank.bundle import manifest
from prerank.bundle.registry import Registry
from prerank.errors import BundleError
from prerank.serve.funnel import Funnel
from prerank.serve.watch import VersionWatch
from prerank.types import ItemChange, Request
from tests.serve import spaces, world
from tests.serve.cluster import Cluster, running

CONFIG = spaces.config(inventory={"slack": 4}, serve={"hosts_ms": 5000.0})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    store = tmp_path_factory.mktemp("whole") / "tiny"
    return store, [spaces.publish_space(store, number, CONFIG) for number in range(2)]


@pytest.fixture
def bare(whole: tuple[Path, list[str]], tmp_path: Path) -> Path:
    """A copy of the store as a server's machine may have it: no version has its index."""
    store = Path(shutil.copytree(whole[0], tmp_path / "bare"))
    for path in (store / "versions").iterdir():
        (path / manifest.INDEX).unlink()
    return store


@pytest.fixture
def cluster(whole: tuple[Path, list[str]]) -> Iterator[Cluster]:
    """Hosts of the store that has all files."""
    with running(whole[0], whole[1], 2, 1) as cluster:
        for version in whole[1]:
            cluster.load(version)
        yield cluster


def asked(user: int = 2) -> Request:
    return Request(user, 12, world.UNTIL + 1, spaces.CONTEXT, deadline_ms=20_000)


def test_a_server_whose_store_has_no_index_answers_as_one_that_has(
    whole: tuple[Path, list[str]], bare: Path, cluster: Cluster
) -> None:
    with pytest.raises(BundleError, match="the manifest lists it, and there is no such file"):
        Funnel.open(bare)
    with Funnel.open(whole[0]) as other, Funnel.open(bare, hosts=cluster.hosts) as funnel:
        for user in (1, 2, 9):
            expected, got = other.recommend(asked(user)), funnel.recommend(asked(user))
            assert [w.item_id for w in got.winners] == [w.item_id for w in expected.winners]
            assert (got.degraded, bool(got.winners)) == (False, True)


def test_a_version_that_is_promoted_is_switched_to_and_back(
    whole: tuple[Path, list[str]], bare: Path, cluster: Cluster
) -> None:
    first, second = whole[1]
    with closing(VersionWatch.open(bare, hosts=cluster.hosts)) as watch:
        for version in (second, first):  # as what copies a store moves the pointer, when all else is there
            (bare / "live").write_text(f"{version}\n")
            assert watch.look()
            answer = watch.live.recommend(asked())
            assert (answer.version, answer.degraded, bool(answer.winners)) == (version, False, True)
        (bare / "versions" / second / manifest.SCORER).write_bytes(b"cut")
        (bare / "live").write_text(f"{second}\n")
        assert not watch.look()
        assert watch.live.recommend(asked()).version == first


def test_promote_reads_the_whole_version_and_refuses_one_without_its_index(
    whole: tuple[Path, list[str]], bare: Path
) -> None:
    with pytest.raises(BundleError, match="the manifest lists it, and there is no such file"):
        Registry(bare).promote(whole[1][1], "a test", "")


def test_items_that_come_change_and_go_are_as_where_the_index_is(
    whole: tuple[Path, list[str]], bare: Path, cluster: Cluster, tmp_path: Path
) -> None:
    other_store = Path(shutil.copytree(whole[0], tmp_path / "other"))
    with Funnel.open(other_store) as other, Funnel.open(bare, hosts=cluster.hosts) as funnel:

        def item(item_id: int, genre: int) -> ItemChange:
            columns = {
                "item_id": item_id,
                "genre": f"genre {genre}",
                "bid_micros": 9_000_000,
                "title": "new",
                "topics": None,
            }
            return ItemChange(item_id, columns={name: columns[name] for name in funnel.inventory.columns})

        def winners() -> list[int]:
            expected, got = other.recommend(asked()), funnel.recommend(asked())
            assert [w.item_id for w in got.winners] == [w.item_id for w in expected.winners]
            assert not got.degraded
            return [w.item_id for w in got.winners]

        before = winners()
        off = [ItemChange(100 + n, on=False) for n in range(spaces.NUM_ITEMS) if 100 + n not in before[:4]]
        came = [item(900 + genre, genre) for genre in range(3)]
        assert funnel.change([*off, *came]) == other.change([*off, *came])
        found = winners()
        assert {900, 901, 902, *before[:4]} == set(found)
        for changes in ([item(before[0], 1)], [ItemChange(one, removed=True) for one in (901, before[1])]):
            assert funnel.change(changes) == other.change(changes)
            found = winners()
        assert {900, 902, before[0], before[2], before[3]} == set(found)
