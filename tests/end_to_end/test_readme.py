"""What the README says to type works as it is typed, in a folder laid out as it says."""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
PRERANK = [sys.executable, "-m", "prerank"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def lines_of(block: str) -> list[list[str]]:
    joined = block.replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in joined.splitlines() if shlex.split(line, comments=True)]


COMMANDS = [line for block in blocks("bash") for line in lines_of(block)]


def run(command: list[str], cwd: Path, timeout_s: float = 240) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


@pytest.fixture(scope="module")
def folder(world, trained, published, tmp_path_factory) -> Path:
    """funnel.toml, market/ and store/ side by side, with the models already trained."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copy(world.config_path, folder / "funnel.toml")
    shutil.copytree(world.data, folder / "market", copy_function=shutil.copy2)
    return folder


def test_the_make_commands_are_targets():
    named = [line for line in COMMANDS if line[0] == "make"]
    assert ["make", "demo"] in named
    assert ["make", "test"] in named
    for line in named:
        told = subprocess.run(["make", "-n", line[1]], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert "prerank demo" in told or "pytest" in told


def test_every_command_of_the_readme_runs_in_order(folder):
    """check, train, publish, versions, promote, serve and curl, then the Python block."""
    verbs = [line for line in COMMANDS if line[0] in ("prerank", "curl")]
    assert [line[1] for line in verbs if line[0] == "prerank"] == [
        "check", "train", "evaluate", "publish", "versions", "promote", "serve",
    ]  # fmt: skip
    answers = {}
    for line in verbs:
        if line[:2] == ["prerank", "promote"]:
            version = next((folder / "store" / "market" / "versions").glob("2*")).name
            assert f"{version} is live" in run([*PRERANK, "promote", version], folder)
        elif line[:2] == ["prerank", "serve"]:
            server, port = start_server(folder)
        elif line[0] == "curl":
            try:
                answers[next(word for word in line if "localhost" in word)] = ask(line, port)
            except BaseException:
                server.kill()
                raise
        else:
            run([*PRERANK, *line[1:]], folder)
    server.terminate()
    server.wait(timeout=30)
    assert len(answers["localhost:8000/v1/recommend"]["winners"]) == 5
    assert answers["localhost:8000/v1/events"]["accepted"] == 1
    assert (folder / "report" / "index.html").exists()
    python_blocks = blocks("python")
    assert python_blocks
    for block in python_blocks:
        assert version in run([sys.executable, "-c", block], folder)


def start_server(folder: Path) -> tuple[subprocess.Popen, int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([*PRERANK, "serve", "--port", str(port)], cwd=folder, stderr=subprocess.DEVNULL)
    for _ in range(300):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=1):
                return server, port
        except OSError:
            assert server.poll() is None, "the server ended"
            time.sleep(0.1)
    server.kill()
    raise AssertionError("the server was not ready")


def ask(curl: list[str], port: int) -> dict:
    """The request the README's curl makes, to another port."""
    address = next(word for word in curl if "localhost:8000" in word).replace("localhost:8000", f"127.0.0.1:{port}")
    headers = dict([curl[curl.index("-H") + 1].split(": ")])
    request = urllib.request.Request(f"http://{address}", curl[curl.index("-d") + 1].encode(), headers)
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


def test_every_page_the_readme_links_to_is_there():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_demo_on_a_market_prints_and_writes_its_summary(tmp_path):
    told = run([*PRERANK, "demo", "--store", str(tmp_path)], ROOT, 1700)
    check_demo(told, tmp_path, "a simulated ad market of 100,000 ads")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.realdata
def test_the_demo_on_kuairand_beats_its_bar(tmp_path, kuairand):
    told = run([*PRERANK, "demo", "--store", str(tmp_path), "--data", os.fspath(kuairand)], ROOT, 3500)
    summary = check_demo(told, tmp_path, "kuairand")
    recall = summary["quality"]["retrieval"]["recall"]
    assert recall["two towers"][2] >= 0.411
    assert recall["two towers"][2] >= 1.1 * recall["EASE"][2]


def check_demo(told: str, store: Path, said: str) -> dict:
    assert said in told
    for piece in ("R@100", "gates", "winners", "what to type next", "over HTTP"):
        assert piece in told
    summary = json.loads((store / "demo.json").read_text())
    assert len(summary["winners"]) == 3
    assert all(len(answer["winners"]) == 5 for answer in summary["winners"])
    stages = ["target", "expand_user", "retrieve", "prepare_user", "rank", "describe"]
    assert [stage["name"] for stage in summary["stages"]] == stages
    return summary
