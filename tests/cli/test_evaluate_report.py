"""`prerank evaluate --report` writes a page and its numbers, and says where."""

import json
import shutil

import pytest

from tests.cli.test_cli import run


@pytest.fixture(scope="module")
def where(world, trained, tmp_path_factory):
    """The options that name the world's funnel file, its data, and a copy of its store."""
    store = tmp_path_factory.mktemp("report_cli") / "store"
    shutil.copytree(world.store, store)
    return ("--config", world.config_path, "--data", world.data, "--store", store)


def test_a_report_is_written_where_asked_and_said(world, where, tmp_path):
    said = run("evaluate", *where, "--report", tmp_path / "report")
    assert f"report: {tmp_path / 'report' / 'index.html'}" in said
    assert (tmp_path / "report" / "index.html").read_text().startswith("<!doctype html>")
    told = json.loads((tmp_path / "report" / "quality.json").read_text())
    assert told["models"] == [world.config.ranker.model, "each item's rate", "the training rate"]
    assert told["about"]["segments"] == "surface"


def test_a_report_can_be_cut_by_another_category(where, tmp_path):
    run("evaluate", *where, "-r", tmp_path, "-g", "country")
    assert json.loads((tmp_path / "quality.json").read_text())["about"]["segments"] == "country"
    assert "segments: expected a category" in run("evaluate", *where, "-r", tmp_path, "-g", "nothing", code=1)
