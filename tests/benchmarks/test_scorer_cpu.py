"""Peers answer what is asked, and the documents ask for rows that are measured."""

import re

import numpy as np
import pyarrow as pa
import pytest
import torch

from benchmarks import readme, scorer_eligibility, scorer_memory, scorer_peers
from benchmarks.bloom_peer import BloomIndex
from benchmarks.machine import REPOSITORY
from benchmarks.result import Hardware, Result, Row
from benchmarks.scorer_eligibility import ASKED, Audience

MARKER = re.compile(r"<!-- measured:(scorer_eligibility.*?) -->")


@pytest.fixture(scope="module")
def audience():
    return Audience.draw(3_000, np.random.default_rng(1))


def test_all_find_the_same_items_and_every_marker_of_the_docs_names_a_row(audience):
    rows = tuple(scorer_eligibility.eligibility_rows(audience, 50.0, 1))
    hardware = Hardware("Some CPU", 2, 24.0)
    result = Result("scorer_cpu", "2026-01-05T10:00:00Z", "0123456789ab", hardware, {}, {}, {}, rows)
    assert Result.from_json(result.to_json()) == result
    markers = [name for page in (REPOSITORY / "docs").rglob("*.md") for name in MARKER.findall(page.read_text())]
    assert markers
    for name in markers:
        assert readme.said(re.sub(r"@\w+", "", name), [result]), "whichever processor it is of"


def test_a_bloom_index_leaves_no_eligible_item_out_and_with_many_bits_reports_no_other(audience):
    exact = audience.targeting.rows(audience.profile(), {}, 0).tolist()
    reported = {bits: BloomIndex(audience.listed, bits).rows(ASKED).tolist() for bits in (64, 512, 16_384)}
    assert all(set(exact) <= set(found) for found in reported.values())
    assert len(reported[64]) > len(reported[512]) > len(exact)
    assert len(reported[16_384]) <= len(exact) + 1


def test_a_bloom_index_of_lists_of_any_length_knows_each_items_own():
    listed = {"country": pa.array([[], [1], [1, 2, 3], [], [2]], pa.list_(pa.int16()))}
    index = BloomIndex(listed, 4_096)
    assert index.rows({"country": [1]}).tolist() == [0, 1, 2, 3]
    assert index.rows({"country": [2, 9]}).tolist() == [0, 2, 3, 4]
    assert index.bytes == 5 * 4_096 // 8


class Broken(torch.nn.Module):
    def forward(self, user, items):
        if torch.compiler.is_exporting():
            raise ValueError("\nno such operator\nand a long story")
        return items["x"][:, :, :1] * user["x"].unsqueeze(1)[:, :, :1]


def test_a_peer_that_cannot_run_says_why_and_the_others_go_on():
    side = {"x": torch.rand(50, 3)}
    peers = dict(scorer_peers.Peers(Broken(), {"x": torch.rand(1, 3)}, side).of(8, is_quick=True))
    failed = peers["AOTInductor bfloat16"]
    assert isinstance(failed, Row)
    assert re.fullmatch(r"AOTInductor bfloat16, 8 candidates \(cannot run: \w+: [^\n]+\)", failed.name)
    assert peers["eager float32"](torch.arange(8)[None]).shape == (1, 8, 1)


def test_the_best_of_those_that_compile_is_the_fastest_that_ran():
    medians = {("native", 10_000): 10.0, ("eager float32", 10_000): 1.0, ("AOTInductor float32", 10_000): 20.0}
    [row] = scorer_peers.best_rows({**medians, ("ONNX Runtime float32", 10_000): 40.0}, 10_000)
    assert (row.value, row.against, row.bar, row.holds) == (0.5, "AOTInductor float32", 0.7143, True)
    [row] = scorer_peers.best_rows({("native", 1_000): 1.0, ("eager float32", 1_000): 1.0}, 1_000)
    assert (row.value, row.holds) == (None, None)


@pytest.mark.parametrize("width", scorer_memory.WIDTHS)
def test_the_items_whose_memory_is_measured_are_as_many_numbers_and_categories_as_the_row_says(width):
    scorer = scorer_memory._scorer(200, width)
    kinds = [column.is_floating_point() for column in scorer.items.features().values()]
    assert (sum(kinds), len(kinds) - sum(kinds)) == (scorer_memory.NUMBERS, len(scorer_memory.CATEGORIES) + 1)
    assert scorer.item_side.tensors()["x"].shape == (200, width)
