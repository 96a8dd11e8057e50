"""A log of requests from the command line: made by a server, asked again."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prerank.bundle.registry import Registry
from tests.cli.test_cli import run, run_alone
from tests.processes import Command
from tests.serve import world as tiny
from tests.serve.conftest import publish_live
from tests.serve.logs import BODIES, BODY


@contextmanager
def serving(*arguments: object) -> Iterator[str]:
    """`prerank serve` as a user runs it, ended as a user ends it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = Command("serve", "--port", port, *arguments)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                if httpx.get(f"{address}/readyz").status_code == 200:
                    break
            except httpx.TransportError:
                assert process.poll() is None, process.communicate(60)
                time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, int]:
    """A store of two versions, the first live; the log of the first's requests, and how many it has."""
    folder = tmp_path_factory.mktemp("requests")
    store = folder / "store"
    home = publish_live(store / "tiny", tiny.config())
    first = Registry(home).live()
    publish_live(home, tiny.config(), seed=7)
    Registry(home).rollback(first, "a test", "the first serves")
    with (
        serving("--store", store, "--log-requests", folder / "log", "--sample", 0.5) as address,
        httpx.Client(base_url=address) as http,
    ):
        for n in range(40):
            http.post("/v1/recommend", json=BODIES[n % len(BODIES)], headers={"x-request-id": f"r{n}"})
        assert 'prerank_logged_requests_total{outcome="dropped"} 0.0' in http.get("/metrics").text
    return store, folder / "log", len(pq.read_table(next((folder / "log").glob("*.parquet"))))


def test_a_share_is_logged_and_the_same_version_answers_the_same(logged: tuple[Path, Path, int]) -> None:
    store, log, num = logged
    assert 8 <= num <= 32, "half of 40, give or take four standard deviations"
    told, _ = json.JSONDecoder().raw_decode(run_alone("replay", log, "--store", store, "--json"))
    assert (told["num_requests"], told["num_compared"]) == (num, num)
    assert (told["same_winners"], told["same_features"], told["utility_change"]) == (1.0, 1.0, 0.0)
    assert list(told["logged_by"]) == [told["version"]]
    shown = run("replay", log, "--store", store, "--limit", 3)
    assert "3 requests" in shown
    assert "same winners" in shown
    assert "100.00%" in shown


def test_another_version_differs_and_says_so(logged: tuple[Path, Path, int]) -> None:
    store, log, num = logged
    registry = Registry(store / "tiny")
    (other,) = (one.version for one in registry.versions() if one.version != registry.live())
    shown = run("replay", log, "--store", store, "--version", other)
    assert f"{num:,} by {registry.live()}" in shown
    assert f"{other}, which is another version than served them" in shown
    assert "the most different" in shown
    assert "100.00%" not in shown.partition("overlap@1 ")[0].partition("same winners")[2]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: None, "expected a folder that `prerank serve --log-requests` wrote, found none"),
        (lambda folder: folder.mkdir(), "expected files requests-*.parquet, found none"),
        (
            lambda folder: (folder.mkdir(), pq.write_table(pa.table({"a": [1]}), folder / "requests-1.parquet")),
            "a Parquet file, but no log of requests: it has the columns a",
        ),
    ],
)
def test_what_is_no_log_is_refused_in_one_line(logged, tmp_path: Path, make, says: str) -> None:
    make(tmp_path / "log")
    told = run("replay", tmp_path / "log", "--store", logged[0], code=1)
    assert says in " ".join(told.split())
    assert len([line for line in told.splitlines() if line.startswith("error")]) == 1


def test_a_folder_that_cannot_be_written_to_is_told_before_anything_is_served(tmp_path: Path, logged) -> None:
    (tmp_path / "log").touch()
    told = run("serve", "--store", logged[0], "--log-requests", tmp_path / "log", code=1)
    assert "expected a folder that this process may write to" in " ".join(told.split())


def test_without_the_option_nothing_is_written(logged, tmp_path: Path) -> None:
    with serving("--store", logged[0]) as address:
        assert httpx.post(f"{address}/v1/recommend", json=BODY).status_code == 200
        assert "prerank_logged" not in httpx.get(f"{address}/metrics").text
