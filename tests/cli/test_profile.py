"""`prerank profile` as a user runs it: the table, the trace, and what it says to wrong options."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from prerank.bundle.registry import Registry
from prerank.cli.app import app
from prerank.errors import PrerankError
from prerank.serve.funnel import Funnel
from tests.cli.test_cli import run
from tests.serve import world
from tests.serve.conftest import publish_live
from tests.serve.logs import log

STAGES = {"expand_user", "target", "retrieve", "prepare_user", "rank", "describe"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish_live(tmp_path_factory.mktemp("profile") / "tiny", world.config()).parent


def test_stages_and_kernels_are_told_beside_their_floors_and_the_trace_names_them(store: Path, tmp_path: Path) -> None:
    shown = run("profile", "--store", store, "-n", 3, "--most", 2, "--out", tmp_path / "trace.json")
    assert "requests under the profiler: 3 of 3 requests" in shown
    assert "3 requests, one at a time: 2 golden requests, asked in turn" in shown
    assert "cpu at best: " in shown
    assert "no GPU here: nothing below is a GPU's" in shown
    assert f"trace: {tmp_path / 'trace.json'}" in shown
    table = shown.partition("over")[2]
    named = {line.split()[0] for line in table.splitlines() if line.startswith(" ") and line[1:2].isalpha()}
    assert named > STAGES
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {one["name"] for one in events if one.get("cat") == "user_annotation"} > {"request", *STAGES}
    assert sum(one["name"] == "rank" for one in events) == 3


def test_a_log_of_requests_is_told_as_json(store: Path, tmp_path: Path) -> None:
    with Funnel.open(store / "tiny") as funnel:
        log(funnel, tmp_path / "log")
    words = ("--store", store, "-n", 2, "--requests", tmp_path / "log", "--out", tmp_path / "t.json.gz")
    said = run("profile", *words, "--workers", 0, "--no-measure", "--json")
    told, _ = json.JSONDecoder().raw_decode(said[said.index("{") :])
    assert (told["version"], told["ranks_by"]) == (Registry(store / "tiny").live(), "torch")
    assert told["requests"] == str(tmp_path / "log")
    assert (told["num_requests"], told["num_different"], told["ceilings"]) == (2, 2, {})
    assert {one["stage"] for one in told["lines"]} > STAGES
    assert {"kernel", "kind", "calls", "ms", "self_ms", "share", "floor_ms", "over_floor"} < set(told["lines"][0])
    assert (tmp_path / "t.json.gz").read_bytes()[:2] == b"\x1f\x8b"


def refused(*arguments: object) -> str:
    """What the command says to arguments that cannot be, in this process."""
    done = CliRunner().invoke(app, ["profile", *map(str, arguments)])
    assert done.exit_code != 0
    return str(done.exception) if isinstance(done.exception, PrerankError) else done.stderr


def test_what_cannot_be_is_one_line(store: Path, tmp_path: Path) -> None:
    here = ("--store", store, "--out", tmp_path / "trace.json")
    assert "Invalid value for '--num'" in refused(*here, "-n", 0)
    assert "expected a folder that `prerank serve --log-requests` wrote" in refused(
        *here, "--requests", tmp_path / "no"
    )
    assert "no version begins so" in refused(*here, "--version", "x")
    assert not (tmp_path / "trace.json").exists()
    (tmp_path / "empty" / "tiny" / "versions").mkdir(parents=True)
    assert "no version is live yet" in refused("--store", tmp_path / "empty")
    told = run("profile", "--store", store, "--out", tmp_path / "none" / "trace.json", code=1)
    assert "expected a file that can be written (No such file or directory)" in " ".join(told.split())
