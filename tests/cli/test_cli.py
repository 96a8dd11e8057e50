"""Every verb does what its help says, and a mistake is one line and exit code 1."""

import json
import os
import shutil
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

import prerank
from prerank.bundle.registry import Registry
from tests.processes import Command


def run(*arguments: object, code: int = 0, env: dict[str, str] | None = None) -> str:
    """`prerank` as a user runs it, but for the imports; what it prints."""
    # on one thread, as the worlds of conftest are: more sum in another order, and golden answers are part of a version
    command = Command(*arguments, env={"OMP_NUM_THREADS": "1", **(env or {})})
    return told(*command.communicate(240), command.returncode, code)


def run_alone(*arguments: object, code: int = 0, env: dict[str, str] | None = None) -> str:
    """The same in an interpreter of its own, imports and all: once for each command."""
    command = [sys.executable, "-m", "prerank", *map(str, arguments)]
    threads = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=threads)
    return told(done.stdout, done.stderr, done.returncode, code)


def told(out: str, err: str, code: int | None, expected: int) -> str:
    assert code == expected, out + err
    assert "Traceback" not in out + err
    return out + err


@pytest.fixture(scope="module")
def made(world, trained, published, tmp_path_factory):
    """The world's funnel file, data, and a store of its own, with everything trained and published."""
    store = tmp_path_factory.mktemp("cli") / "store"
    shutil.copytree(world.store, store)
    where = ("--config", world.config_path, "--data", world.data, "--store", store)
    return where, store, published


def test_help_names_every_verb():
    told = run("--help")
    for verb in (
        "market",
        "check",
        "train",
        "evaluate",
        "publish",
        "promote",
        "rollback",
        "versions",
        "show",
        "serve",
        "index-host",
    ):
        assert verb in told


def test_version_is_told():
    assert run_alone("--version").strip() == prerank.__version__


def test_check_finds_nothing_in_good_data_and_everything_in_bad(made, tmp_path):
    (_, config, _, data, _, store), _, _ = made
    assert "no problem found" in run("check", "--config", config, "--data", data, "--store", store)
    for path in data.glob("*.parquet"):
        shutil.copy(path, tmp_path)
    users = pq.read_table(tmp_path / "users.parquet").drop_columns(["country"])
    pq.write_table(users, tmp_path / "users.parquet")
    (tmp_path / "items.parquet").unlink()
    told = run("check", "--config", config, "--data", tmp_path, "--store", store, code=1)
    assert "country" in told
    assert "items" in told


def test_a_funnel_goes_from_training_to_a_live_version_and_back(made):
    where, store, version = made
    assert "two towers" in run("train", *where)
    assert "R@100" in run("evaluate", *where)
    assert json.loads("".join(run("evaluate", *where, "--json").partition("{")[1:]))
    told = run("publish", *where)
    assert f"published {version}" in told
    assert "golden" in told
    assert f"{version} is live" in run("promote", version[:15], "--store", store, "--why", "a test")
    listed = run("versions", "--store", store)
    assert version in listed
    assert "a test" in listed
    assert "scorer.safetensors" in run_alone("show", "--store", store)
    user = pq.read_table(where[3] / "users.parquet")["user_id"][0].as_py()
    context = ("-x", "surface=feed", "-x", "hour=20")
    answer = json.loads(run_alone("recommend", "--store", store, "--user", user, "-k", 3, *context, "--json"))
    assert len(answer["winners"]) == 3
    assert answer["version"] == version
    assert "unknown user" in run("recommend", "--store", store, "--user", 1, "-k", 3, *context)
    assert "no version" in run_alone("rollback", "--store", store, code=1)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("check", "--config", "nowhere.toml"), "error: nowhere.toml: no such funnel file"),
        (("versions", "--store", "nowhere"), "error: nowhere: the store has no published funnel yet"),
        (("promote", "20200101", "--store", "nowhere"), "error: nowhere: the store has no published funnel yet"),
        (("market", "--ads", 3, "--out", "nowhere"), "error: "),
    ],
)
def test_a_mistake_is_one_line(arguments, expected):
    said = run(*arguments, code=1)
    assert expected in said
    assert len(said.strip().splitlines()) == 1


def test_a_market_is_made_and_one_that_cannot_be_is_refused(tmp_path):
    made = ("--users", 100, "--impressions", 2000, "--out", tmp_path)
    assert "2,000" in run_alone("market", "--ads", 200, *made)
    assert pq.read_metadata(tmp_path / "impressions.parquet").num_rows == 2000
    assert "error: " in run_alone("market", "--ads", 3, *made, code=1)


def test_wrong_names_are_told_with_what_there_is(made):
    _, store, _ = made
    assert "it has market" in run("versions", "--store", store, "--funnel", "nothing", code=1)
    assert "no version begins so" in run("promote", "1999", "--store", store, code=1)
    context = ("--store", store, "--user", 1)
    assert "expected name=value" in run("recommend", *context, "-x", "hour", code=1)
    assert "surface" in run("recommend", *context, "-x", "hour=3", code=1)
    assert "hour" in run("recommend", *context, "-x", "surface=feed", "-x", "hour=late", code=1)
    assert "k: expected 1 to" in run("recommend", *context, "-x", "surface=feed", "-x", "hour=3", "-k", 0, code=1)


def test_users_may_be_in_a_redis_and_the_winners_are_the_same(made, redis_url):
    where, store, version = made
    run("publish", *where, "--users", redis_url)
    registry = Registry(store / "market")
    if registry.live() != version:
        registry.promote(version, "a test", "")
    user = pq.read_table(where[3] / "users.parquet")["user_id"][0].as_py()
    asked = ("recommend", "--store", store, "--user", user, "-k", 3, "-x", "surface=feed", "-x", "hour=20", "--json")
    answer = json.loads(run(*asked, env={"PRERANK_USERS": redis_url}))
    assert answer["winners"] == json.loads(run(*asked))["winners"]
    assert answer["notes"] == []
    other = redis_url.removesuffix("/0") + "/3"
    said = run(*asked, "--users", other, code=1)
    assert f"error: {other}: expected the users of funnel 'market', found none; load them with" in " ".join(
        said.split()
    )
