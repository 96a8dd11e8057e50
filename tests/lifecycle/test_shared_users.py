"""Users in a Redis: a retrain loads them there and nowhere else, and the gate asks impressions again of them."""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from prerank.bundle.registry import Gate, Registry
from prerank.bundle.toml import to_toml
from prerank.cli.app import app
from prerank.config import Config
from prerank.lifecycle.build import load_users, publish_trained
from prerank.lifecycle.runs import opened
from prerank.lifecycle.user_shelves import open_users
from prerank.lifecycle.validate import validate
from tests.lifecycle import world
from tests.lifecycle.world import Made

NOBODY = "redis://127.0.0.1:9/0"


def judged(home: Path, made: Made, users: str) -> dict[str, Gate]:
    version = publish_trained(made.trained, made.tables, home, {})
    gates = validate(home, version, made.trained.prepared, made.tables, users=users)
    return {gate.name: gate for gate in gates}


@pytest.fixture
def loaded(first: Made, redis_url: str) -> str:
    load_users(first.trained.config, first.tables, first.trained.prepared, Path("nowhere"), redis=redis_url)
    return redis_url


def test_what_a_redis_serves_is_what_was_trained_and_what_a_file_serves(
    first: Made, loaded: str, tmp_path: Path
) -> None:
    far = judged(tmp_path / "far", first, loaded)["served_parity"]
    assert far.holds, far
    near = first.publish(tmp_path / "near")
    gates = validate(tmp_path / "near", near, first.trained.prepared, first.tables)
    assert far.measured == next(gate.measured for gate in gates if gate.name == "served_parity")


def test_a_redis_that_serves_something_else_is_refused_also_beside_a_file_that_does_not(
    first: Made, tastes: Path, redis_url: str, tmp_path: Path
) -> None:
    users = world.users()
    emptied = users.set_column(1, "taste", pa.nulls(len(users), pa.int64()))
    data = world.write(tmp_path / "data", pq.read_table(tastes / "log.parquet"), emptied)
    other = replace(first, tables=world.open_tables(first.trained.config, data, tmp_path / "work"))
    load_users(other.trained.config, other.tables, first.trained.prepared, tmp_path, redis=redis_url)
    first.publish(tmp_path / "home")  # with its users, as they are, in the file
    gate = judged(tmp_path / "home", first, redis_url)["served_parity"]
    assert not gate.holds
    assert gate.about == "taste differs in 100.0% of requests"


def test_without_the_users_or_the_redis_the_gate_fails_and_says_so(first: Made, redis_url: str, tmp_path: Path) -> None:
    gate = judged(tmp_path, first, redis_url)["served_parity"]
    assert not gate.holds
    assert "expected the users of funnel 'tastes', found none; load them with `prerank publish --users" in gate.about
    gate = judged(tmp_path, first, NOBODY)["served_parity"]
    assert not gate.holds
    assert "expected a Redis that answers" in gate.about


def test_a_retrain_loads_users_where_it_is_told(
    small: tuple[Config, Path], retrained: Path, redis_url: str, tmp_path: Path
) -> None:
    (tmp_path / "funnel.toml").write_text(to_toml(small[0].to_dict()))
    where = ["--config", str(tmp_path / "funnel.toml"), "--data", str(small[1]), "--store", str(retrained.parent)]
    before = (retrained / "users.lmdb").read_bytes()
    refused = CliRunner().invoke(app, ["retrain", *where, "--users", NOBODY])
    assert refused.exit_code == 1
    assert "expected a Redis that answers" in refused.output
    with opened(retrained) as runs:
        assert not runs.steps(runs.latest()[0]), "nothing was begun"
    done = CliRunner().invoke(app, ["retrain", *where], env={"PRERANK_USERS": redis_url})
    assert done.exit_code == 0, done.output
    assert (retrained / "users.lmdb").read_bytes() == before
    with open_users(retrained, "tastes", redis_url) as users:
        assert users.get(7) is not None
    with opened(retrained) as runs:
        (validated,) = (step for step in runs.steps(runs.latest()[0]) if step.name == "validate")
    gates = {gate.name for gate in Registry(retrained).versions()[-1].gates or ()}
    assert "served_parity" in gates
    assert validated.said == f"all {len(gates)} gates hold"
