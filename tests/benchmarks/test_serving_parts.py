"""The documents ask serving_parts for rows it measures."""

import re

import pytest
import torch

from benchmarks import readme, serving_parts
from benchmarks.machine import REPOSITORY
from benchmarks.result import Hardware, Result

TINY = serving_parts.Sizes(items=100_000, users=30, described_items=1_000, searches=1, calls=20)
MARKER = re.compile(r"<!-- measured:((?:serving_parts|index_parts|scorer_parts|store_parts|request_parts).*?) -->")


def test_every_part_is_measured_on_one_core_and_every_marker_of_the_docs_names_one(monkeypatch):
    threads, seed = torch.get_num_threads(), torch.get_rng_state()
    used = []
    monkeypatch.setattr(
        serving_parts,
        "machine_ceilings",
        lambda: used.append(torch.get_num_threads()) or {"copy_gb_s": 30.0, "fp32_matmul_gflop_s": 90.0},
    )
    measured = serving_parts.parts(TINY)
    assert used == [1]
    assert (torch.get_num_threads(), torch.equal(torch.get_rng_state(), seed)) == (threads, True)
    result = Result(
        "serving_parts", "2026-01-05T10:00:00Z", "0123456789ab", Hardware("Some CPU", 2, 24.0), {},
        measured.config, measured.ceilings, tuple(measured.rows),
    )  # fmt: skip
    assert Result.from_json(result.to_json()) == result
    markers = [name for page in (REPOSITORY / "docs").rglob("*.md") for name in MARKER.findall(page.read_text())]
    assert len(markers) >= 4
    for name in markers:
        assert readme.said(name, [result])


def test_an_answer_that_is_an_error_is_no_measurement():
    with serving_parts.ready_server() as connection, pytest.raises(RuntimeError, match="POST /v1/recommend: 422"):
        serving_parts.ask(connection, "POST", "/v1/recommend", b"{}")
