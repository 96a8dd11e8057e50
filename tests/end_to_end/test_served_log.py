"""A server's log of requests, from the command line to the tables that trained the version."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from prerank.bundle.toml import to_toml
from prerank.serve.funnel import Funnel
from tests.cli.test_cli import run, run_alone
from tests.serve.logs import log, read

NUM = 60


@pytest.fixture(scope="module")
def served(world, published: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log of a server that was asked at moments of impressions of the test day, for their users and contexts."""
    folder = tmp_path_factory.mktemp("served")
    home = folder / "store" / world.config.name
    shutil.copytree(world.home, home)
    day = world.config.data.days("test")
    columns = ["user_id", "time_ms", "surface", "hour"]
    rows = [row for batch in world.tables().impressions(columns, day) for row in batch.to_pylist()]
    bodies = [
        {"user_id": row["user_id"], "k": 20, "time_ms": row["time_ms"]}
        | {"context": {"surface": row["surface"], "hour": row["hour"]}}
        for row in rows[:: len(rows) // NUM][:NUM]
    ]
    with Funnel.open(home, published) as funnel:
        log(funnel, folder / "log", bodies)
    return folder


def test_a_server_of_the_tables_has_no_skew_and_its_version_answers_the_same(world, published, served: Path) -> None:
    assert len(read(served / "log")) == NUM
    where = ("--config", world.config_path, "--data", world.data, "--store", served / "store")
    told = run_alone("audit", "skew", served / "log", *where, "--at-least", 1.0)
    assert f"{NUM} of {NUM} requests compared, {NUM} with an impression" in told
    assert "the worst" not in told
    replayed = run("replay", served / "log", "--store", served / "store", "--version", published)
    assert re.search(r"same winners +100.00%", replayed), replayed
    assert re.search(r"same features +100.00%", replayed), replayed


def test_tables_that_say_something_else_than_was_served_are_found_out(world, served: Path, tmp_path: Path) -> None:
    """A users table of a later day: what it says of users was not known when they were served."""
    for file in world.data.glob("*.parquet"):
        shutil.copy(file, tmp_path)
    users = pq.read_table(tmp_path / "users.parquet")
    at = users.schema.get_field_index("activity")
    later = pc.add(users["activity"], pa.array(np.where(np.arange(len(users)) % 2, 25.0, 0.0)))
    pq.write_table(users.set_column(at, "activity", later), tmp_path / "users.parquet")
    where = ("--config", world.config_path, "--data", tmp_path, "--store", tmp_path / "store")
    told = run("audit", "skew", served / "log", *where, "--at-least", 0.9, code=1)
    rows = [line.split() for line in told.splitlines()]
    first = next(row for row, before in zip(rows[1:], rows, strict=False) if before and set(before[0]) <= {"─", "━"})
    assert first[:2] == ["activity", "user"]
    assert float(first[2].rstrip("%")) < 90
    assert "the worst of each" in told
    assert "activity, request r" in told


def test_a_log_that_is_none_is_refused(world, tmp_path: Path) -> None:
    where = ("--config", world.config_path, "--data", world.data, "--store", tmp_path / "store")
    said = run("audit", "skew", tmp_path, *where, code=1)
    assert "expected files requests-*.parquet, found none" in " ".join(said.split())


def test_training_takes_what_was_served_and_says_of_how_many_impressions(world, served: Path, tmp_path: Path) -> None:
    funnel = tmp_path / "funnel.toml"
    config = replace(world.config, data=replace(world.config.data, requests=f"{served}/log/*.parquet"))
    funnel.write_text(to_toml(config.to_dict()))
    where = ("--config", funnel, "--data", world.data, "--store", tmp_path / "store")
    assert "no problem found" in run("check", *where)
    told = run("train", *where)
    found = re.search(r"features as served: ([\d,]+) of 12,000 impressions", told)
    assert found is not None, told
    asked = {(row.user_id, row.time_ms) for row in read(served / "log")}
    batches = world.tables().impressions(["user_id", "time_ms"])
    rows = [(row["user_id"], row["time_ms"]) for batch in batches for row in batch.to_pylist()]
    assert int(found[1].replace(",", "")) == sum(one in asked for one in rows) > NUM, "all items of each request"
    assert "two towers, measured on the validate days" in told
