"""`prerank retrain`, `status` and `history`, and the exit codes that a timer reads."""

import fcntl
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from prerank.bundle.registry import Registry
from prerank.bundle.toml import to_toml
from prerank.cli.app import app
from prerank.cli.retrain import seconds
from prerank.config import Config
from prerank.errors import ConfigError
from prerank.lifecycle.runs import FILE, LOCK, opened
from tests.lifecycle import world


@pytest.fixture
def where(small: tuple[Config, Path], retrained: Path, tmp_path: Path) -> list[str]:
    """The options of a retrain of a store where the first has run."""
    config = tmp_path / "funnel.toml"
    config.write_text(to_toml(small[0].to_dict()))
    return ["--config", str(config), "--data", str(small[1]), "--store", str(retrained.parent)]


@pytest.fixture(autouse=True)
def _signals_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prerank.cli.retrain.signal.signal", lambda *_: None)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


def test_a_retrain_is_told_and_ends_with_0_also_where_nothing_is_new(where: list[str], retrained: Path) -> None:
    first = run("retrain", *where)
    assert first.exit_code == 0, first.output
    live = Registry(retrained).live()
    assert f"run 2, {world.day(7)}: {live} is live: every gate holds" in first.output
    again = run("retrain", *where)
    assert again.exit_code == 0
    assert f"nothing is new since run 2, {world.day(7)}" in again.output
    store = where[-2:]
    told = run("status", *store)
    assert told.exit_code == 0
    assert f"live: {live}" in told.output
    assert f"run 2 of {world.day(7)} promoted" in told.output
    plain = json.loads(run("status", *store, "--json").output)
    assert (plain["live"], plain["running"], plain["run"]["outcome"]) == (live, "", "promoted")
    assert [step["name"] for step in plain["steps"]] == ["check", "train", "publish", "validate", "roll out"]
    history = run("history", *store).output
    assert "run 1:" in history
    assert "run 2:" in history
    assert "did not stay live" not in history


def test_rolling_back_by_name_reads_nothing_of_the_version_that_is_left(where: list[str], retrained: Path) -> None:
    old = str(Registry(retrained).live())
    assert run("retrain", *where).exit_code == 0
    newest = Registry(retrained).path(str(Registry(retrained).live()))
    (newest / "validation.json").write_text("{")
    (newest / "manifest.json").unlink()
    done = run("rollback", old, *where[-2:], "--why", "it is damaged")
    assert done.exit_code == 0, done.output
    assert Registry(retrained).live() == old


def test_a_refusal_ends_with_3_each_time_and_is_in_the_history(
    small: tuple[Config, Path],
    where: list[str],
) -> None:
    strict = replace(small[0], validate=world.config(validate={"retrieval_recall": {"at_least": 1.0}}).validate)
    Path(where[1]).write_text(to_toml(strict.to_dict()))
    for what in ("run 2", "nothing is new since run 2"):
        done = run("retrain", *where)
        assert done.exit_code == 3
        assert done.output.strip().splitlines()[-1].startswith(what)
        assert "stays unpointed: retrieval_recall: expected at least 1, measured 0." in done.output
    assert run("status", *where[-2:]).exit_code == 3
    assert "retrieval_recall: expected at least 1" in " ".join(run("history", *where[-2:]).output.split())


def test_a_second_retrainer_ends_with_75_and_says_who_runs(where: list[str], retrained: Path) -> None:
    with (retrained / LOCK).open("w") as file:
        file.write("4711\n")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        done = run("retrain", *where)
        assert done.exit_code == 75
        assert "a retrain runs already, process 4711" in done.output
        with opened(retrained) as runs, runs.step(runs.begin("x", "2026-03-09", ""), "train"):
            assert "run 2 of 2026-03-09: train since " in run("status", *where[-2:]).output
    assert "was stopped at train and nobody goes on with it" in run("status", *where[-2:]).output


def test_what_fails_ends_with_1_and_one_line(where: list[str]) -> None:
    done = run("retrain", *where, "--watch-url", "http://127.0.0.1:9")
    assert done.exit_code == 1
    (line,) = done.output.strip().splitlines()
    assert line.startswith("error: http://127.0.0.1:9/metrics: a server's metrics cannot be read there")
    assert run("status", *where[-2:]).exit_code == 1
    done = run("retrain", *where, "--watch-url", "http://127.0.0.1:9", "--watch-url", "http://127.0.0.1:7")
    assert all(f"http://127.0.0.1:{port}/metrics: a server's metrics" in done.output for port in (7, 9))


def test_every_goes_on_so_long_after_the_last_began(where: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("prerank.cli.retrain.time.sleep", sleep)
    done = run("retrain", *where, "--every", "6h")
    assert len(slept) == 2
    assert all(6 * 3600 - 300 < one <= 6 * 3600 for one in slept)
    assert "nothing is new" in done.output


def test_a_time_is_a_number_and_a_unit() -> None:
    assert [seconds(said) for said in ("30s", "5m", "6h", "1d", "1.5h")] == [30, 300, 21_600, 86_400, 5_400]
    for said in ("6", "h", "0s", "-1h", "6 h", "6hours"):
        with pytest.raises(ConfigError, match="expected a time such as 30s, 5m, 6h or 1d, got"):
            seconds(said)


def test_a_store_without_a_retrain_says_so(retrained: Path, tmp_path: Path) -> None:
    (retrained / FILE).unlink()
    told = run("status", "--store", str(retrained.parent))
    assert told.exit_code == 0
    assert "no retrain was begun yet" in told.output
    with pytest.raises(ConfigError, match="the store has no funnel yet"):
        CliRunner().invoke(app, ["status", "--store", str(tmp_path / "none")], catch_exceptions=False)
    shutil.copytree(retrained, retrained.parent / "other")
    with pytest.raises(ConfigError, match=r"other, tastes\); name one with --funnel"):
        CliRunner().invoke(app, ["history", "--store", str(retrained.parent)], catch_exceptions=False)


def test_state_that_is_damaged_is_told(where: list[str], retrained: Path) -> None:
    (retrained / FILE).write_bytes(b"no database, and long enough to be read as one" * 40)
    done = run("retrain", *where)
    assert done.exit_code == 1
    assert f"{FILE}: not what a retrain keeps its state in" in done.output
