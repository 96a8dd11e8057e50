"""A server beside index hosts is ready while enough shards answer, and says which do not."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from prerank.errors import ConfigError
from prerank.serve.funnel import Funnel
from prerank.serve.hosts import IndexHosts
from prerank.serve.http import create_app
from tests.serve import spaces
from tests.serve.client import Client
from tests.serve.cluster import Cluster, running

SHARDS, REPLICAS = 3, 2


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    store = tmp_path_factory.mktemp("ready") / "tiny"
    return store, spaces.publish_space(store, 0)


@pytest.fixture
def cluster(published: tuple[Path, str]) -> Iterator[Cluster]:
    store, version = published
    with running(store, [version], SHARDS, REPLICAS) as cluster:
        cluster.load(version)
        yield cluster


@pytest.fixture
def client(published: tuple[Path, str], cluster: Cluster) -> Iterator[Client]:
    with (
        Funnel.open(published[0], hosts=cluster.hosts) as funnel,
        Client(create_app(funnel, hosts=cluster.hosts)) as client,
    ):
        yield client


def die(cluster: Cluster, *shards: int) -> None:
    for number, replicas in enumerate(cluster.fragile):
        for one in replicas:
            one.is_dead = number in shards
    cluster.hosts.refresh()


def test_a_server_is_ready_while_one_shard_answers_and_names_those_that_do_not(
    published: tuple[Path, str], cluster: Cluster, client: Client
) -> None:
    ready = {"status": "ready", "version": published[1], "shards": SHARDS}
    assert client.get("/readyz").json() == ready | {"missing_shards": []}
    die(cluster, 0, 2)
    response = client.get("/readyz")
    assert (response.status_code, response.json()) == (200, ready | {"missing_shards": [0, 2]})
    answer = client.post("/v1/recommend", json={"user_id": 2, "k": 5, "context": spaces.CONTEXT, "deadline_ms": 20_000})
    assert answer.json()["degraded"]
    up = [line for line in client.get("/metrics").text.splitlines() if line.startswith("prerank_index_shard_up{")]
    assert up == [f'prerank_index_shard_up{{shard="{n}"}} {float(n == 1)}' for n in range(SHARDS)]


def test_a_server_of_which_no_shard_answers_is_not_ready_until_one_does(cluster: Cluster, client: Client) -> None:
    die(cluster, 0, 1, 2)
    response = client.get("/readyz")
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (503, "NotReady")
    assert error["message"] == (
        "of 3 shards of the index 0 have a host that answers and holds a version, expected at least 1; missing: 0, 1, 2"
    )
    die(cluster, 0, 1)
    assert client.get("/readyz").status_code == 200


def test_one_replica_is_enough_for_a_shard_and_one_that_holds_nothing_is_none(
    published: tuple[Path, str], cluster: Cluster
) -> None:
    cluster.fragile[0][0].is_dead = True
    cluster.hosts.refresh()
    assert cluster.hosts.missing() == []
    cluster.fragile[0][1].host.unload(published[1])
    cluster.hosts.refresh()
    assert cluster.hosts.missing() == [0]


def test_how_many_shards_must_answer_is_said_by_who_serves(cluster: Cluster, client: Client) -> None:
    cluster.hosts.least = SHARDS
    die(cluster, 2)
    error = client.get("/readyz").json()["error"]
    assert error["message"].endswith("2 have a host that answers and holds a version, expected at least 3; missing: 2")
    cluster.hosts.least = 0
    die(cluster, 0, 1, 2)
    assert client.get("/readyz").json()["missing_shards"] == [0, 1, 2]


def test_more_shards_than_are_listed_cannot_be_asked_for(published: tuple[Path, str]) -> None:
    with pytest.raises(ConfigError, match="--least-shards 2: expected a number from 0 to 1, the shards listed"):
        IndexHosts.open("0=127.0.0.1:1", published[0], 2)


def test_the_ranking_stage_alone_needs_no_shard(cluster: Cluster, client: Client) -> None:
    die(cluster, 0, 1, 2)
    assert client.get("/v2/health/ready").json() == {"ready": True}
