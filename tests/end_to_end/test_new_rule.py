"""The example of a new rule changes what the change map says, and works from the funnel file to the winners."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

EXAMPLE = ROOT / "examples" / "new_rule"


@pytest.fixture(scope="module")
def changed(tmp_path_factory) -> Path:
    """A folder with a copy of prerank that has the example's rule, made as its README says."""
    folder = tmp_path_factory.mktemp("new_rule")
    shutil.copytree(ROOT / "prerank", folder / "prerank", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(EXAMPLE, folder / "examples" / "new_rule", ignore=shutil.ignore_patterns("__pycache__"))
    (commands,) = re.findall(r"```bash\n(.*?)```", (EXAMPLE / "README.md").read_text(), flags=re.DOTALL)
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    done = subprocess.run(
        ["bash", "-euc", commands], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


def sources(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in (folder / "prerank").rglob("*.py")}


def test_a_rule_is_one_file_one_key_and_its_line_in_the_dict(changed):
    before, after = sources(ROOT), sources(changed)
    touched = {name for name in after if before.get(name) != after[name]}
    assert touched == {"prerank/business/low_quality.py", "prerank/business/rules.py", "prerank/config.py"}
    assert set(after) - set(before) == {"prerank/business/low_quality.py"}
    keys, keys_before = (fields_of(files["prerank/config.py"], "Rules") for files in (after, before))
    assert [name for name in keys if name not in keys_before] == ["low_quality"]
    lines, lines_before = (files["prerank/business/rules.py"].splitlines() for files in (after, before))
    assert [line for line in lines if line not in lines_before] == [
        "from prerank.business.low_quality import LowQuality",
        '    "low_quality": LowQuality,',
    ]


def fields_of(source: str, name: str) -> list[str]:
    (found,) = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == name]
    return [node.target.id for node in found.body if isinstance(node, ast.AnnAssign)]


def test_it_publishes_loads_serves_and_refuses_in_a_process_of_its_own(changed):
    """The example's own tests, which the prerank beside this file would fail for want of the key."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(EXAMPLE / "test_low_quality.py")],
        cwd=changed,
        env={**os.environ, "PYTHONPATH": f"{changed}{os.pathsep}{ROOT}", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\b9 passed", done.stdout), done.stdout


def test_without_the_rule_its_key_is_unknown(changed):
    code = "from prerank.config import parse_config; parse_config({'rules': {'low_quality': {}}}, 'f')"
    told = [
        subprocess.run(
            [sys.executable, "-c", code], cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)},
            capture_output=True, text=True, check=False,
        ).stderr
        for folder in (ROOT, changed)
    ]  # fmt: skip
    assert "rules.low_quality: unknown key" in told[0]
    assert "rules.low_quality.column: missing; expected text in quotes" in told[1]
