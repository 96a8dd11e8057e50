"""The files of examples/retrain are what systemd, cron and Kubernetes read, and start commands that there are."""

import configparser
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import typer

from prerank.cli.app import app
from prerank.cli.retrain import BUSY, CODES
from tests.conftest import ROOT

EXAMPLE = ROOT / "examples" / "retrain"


def unit(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(EXAMPLE / name)
    return parser


def commands() -> dict[str, list[str]]:
    """What each file starts, without the program."""
    cron = (EXAMPLE / "prerank-retrain.cron").read_text().splitlines()[-1]
    (started,) = re.findall(r"\.venv/bin/prerank (.*?) >>", cron)
    (job,) = re.findall(r"args: (\[.*\])", (EXAMPLE / "cronjob.yaml").read_text())
    service = shlex.split(unit("prerank-retrain.service")["Service"]["ExecStart"])
    return {"service": service[1:], "cron": shlex.split(started), "cronjob": json.loads(job)}


@pytest.mark.parametrize("name", ["service", "cron", "cronjob"])
def test_what_is_started_is_a_command_with_options_it_knows(name: str) -> None:
    verb, *options = commands()[name]
    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    given = command.make_context(verb, options).params
    assert (given["store"], given["watch"]) == (Path("store"), "5m")
    assert [url.partition("//")[0] for url in given["watch_url"]] == ["http:"]


def test_exit_codes_mean_the_same_everywhere() -> None:
    service = unit("prerank-retrain.service")["Service"]
    assert service["SuccessExitStatus"].split() == [str(BUSY), "130"]
    verdicts = [str(CODES[outcome]) for outcome in ("refused", "rolled back")]
    assert service["RestartPreventExitStatus"].split() == verdicts
    assert f"values: [{', '.join(verdicts)}]" in (EXAMPLE / "cronjob.yaml").read_text()
    assert f"[ $code -eq {BUSY} ]" in (EXAMPLE / "prerank-retrain.cron").read_text()


def test_cron_has_five_times_and_a_user() -> None:
    line = (EXAMPLE / "prerank-retrain.cron").read_text().splitlines()[-1]
    assert line.split()[:7] == ["15", "*/6", "*", "*", "*", "prerank", "cd"]
    assert "%" not in line, "cron reads it as the end of the line"


def test_systemd_finds_nothing_wrong(tmp_path: Path) -> None:
    """With a program that is there in place of the one that is not."""
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("needs systemd-analyze")
    for name in ("prerank-retrain.service", "prerank-retrain.timer"):
        text = (EXAMPLE / name).read_text()
        (tmp_path / name).write_text(text.replace("/srv/prerank/.venv/bin/prerank", "/bin/true"))
    files = [str(tmp_path / name) for name in ("prerank-retrain.service", "prerank-retrain.timer")]
    done = subprocess.run([analyze, "verify", *files], capture_output=True, text=True, timeout=60, check=False)
    told = [line for line in (done.stdout + done.stderr).splitlines() if "prerank-retrain" in line]
    assert not told
    when = unit("prerank-retrain.timer")["Timer"]["OnCalendar"]
    said = subprocess.run([analyze, "calendar", when], capture_output=True, text=True, timeout=60, check=False)
    assert said.returncode == 0, said.stderr
