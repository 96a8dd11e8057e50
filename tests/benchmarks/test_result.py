"""One schema for all results, and no number in the docs that was not measured."""

import json
import tomllib
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import readme, retrieval_negatives, retrieval_quality
from benchmarks.result import KEYS, RESULTS, Hardware, Result, Row, read_results, shown, table
from benchmarks.run import Options, data_folder
from prerank.bundle.toml import to_toml
from prerank.config import load_config, parse_config

ROWS = (
    Row.timed("rank 10K: warm", [3.0, 1.0, 2.0], 10_000, against="naive", ratio=0.25),
    Row("recall", 4_003, value=0.43219, unit="recall", bar=0.411, holds=True),
    Row.of("generate", 6.25, "s", 1_000_000),
    Row.skipped("device", "no GPU"),
)
RESULT = Result(
    question="serve",
    date="2026-01-05T10:00:00Z",
    commit="0123456789ab",
    hardware=Hardware("Some CPU @ 3.0GHz", 2, 24.0),
    versions={"python": "3.11.2"},
    config={"quick": False},
    ceilings={"copy_gb_s": 20.5},
    rows=ROWS,
)


def page(number: str, name: str = "serve:generate") -> str:
    return f"It takes <!-- measured:{name} -->{number}<!-- /measured --> s.\n"


@pytest.fixture
def root(tmp_path) -> Path:
    (tmp_path / "docs").mkdir()
    RESULT.write(tmp_path / "results")
    return tmp_path


def run(root: Path, *words: str) -> int:
    return readme.main([*words, "--root", str(root), "--results", str(root / "results")])


def test_a_result_is_read_back_as_it_was_written(tmp_path):
    assert Result.from_json(RESULT.to_json()) == RESULT
    path = RESULT.write(tmp_path)
    assert path.name == "2026-01-05_some-cpu-3-0ghz-2-cores_serve.json"
    assert read_results(tmp_path) == [RESULT]


def test_one_line_of_json_has_the_keys_of_the_schema_in_order():
    assert "\n" not in RESULT.to_json()
    plain = json.loads(RESULT.to_json())
    assert tuple(plain) == KEYS
    fields = ["name", "n", "p50_ms", "p90_ms", "p99_ms", "value", "unit", "against", "ratio", "bar", "holds"]
    assert list(plain["rows"][0]) == fields


def test_what_is_not_the_schema_is_refused_by_name(tmp_path):
    plain = asdict(RESULT)
    short = {key: value for key, value in plain.items() if key != "commit"}
    with pytest.raises(ValueError, match="expected the keys question, date, commit"):
        Result.from_json(json.dumps(short))
    plain["rows"][0]["speed"] = 3
    with pytest.raises(ValueError, match="unexpected keyword argument 'speed'"):
        Result.from_json(json.dumps(plain))
    with pytest.raises(ValueError, match="two rows are named 'recall'"):
        Result.from_json(replace(RESULT, rows=(ROWS[1], ROWS[1])).to_json())
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(ValueError, match=r"broken\.json: expected the keys"):
        read_results(tmp_path)


def test_a_number_that_is_not_finite_is_no_result():
    with pytest.raises(ValueError, match="not JSON compliant"):
        replace(RESULT, rows=(Row("x", value=float("nan")),)).to_json()


def test_times_are_kept_as_percentiles():
    row = Row.timed("x", list(range(1, 102)))
    assert (row.p50_ms, row.p90_ms, row.p99_ms, row.value, row.unit) == (51, 91, 100, 51, "ms")


def test_numbers_are_shown_with_three_digits():
    assert [shown(x) for x in (None, 0.12, 6.2, 62.04, 123.4, 1234.5, 3.0, 0.0)] == [
        "", "0.120", "6.20", "62.0", "123", "1,234", "3", "0",
    ]  # fmt: skip


def test_a_table_leaves_out_what_no_row_has_and_says_what_does_not_hold():
    text = table([replace(ROWS[1], value=0.4, holds=False)])
    assert "NO" in text
    assert "p99" not in text
    assert "question" not in text
    assert "question" in table([("serve", ROWS[0])])
    assert len({len(line) for line in table(ROWS).splitlines()}) == 1


def test_marked_numbers_become_those_measured_and_the_rest_stays(root):
    (root / "README.md").write_text("# 1\n\n" + page("9") + page("", "serve:recall:value:.3f"))
    (root / "docs" / "serve.md").write_text(page("?", "serve@some-cpu:rank 10K: warm:p99_ms:.1f"))
    assert run(root) == 0
    assert (root / "README.md").read_text() == "# 1\n\n" + page("6.25") + page("0.432", "serve:recall:value:.3f")
    assert ">3.0<" in (root / "docs" / "serve.md").read_text()
    assert run(root, "--check") == 0


def test_a_whole_table_is_written_with_its_origin_and_is_then_not_stale(root):
    (root / "README.md").write_text(page("", "serve"))
    assert run(root) == 0
    text = (root / "README.md").read_text()
    assert table(ROWS) in text
    assert "2026-01-05, commit 0123456789ab, Some CPU @ 3.0GHz, 2 cores." in text
    assert run(root, "--check") == 0


def test_a_named_table_is_of_the_newest_result_that_has_its_rows(root):
    names = ("two towers, test, recall@100", "two towers, validate, recall@100", "ablation, seed 7: no popularity")
    rows = tuple(Row.of(name, 0.4, "recall") for name in names)
    replace(RESULT, question="retrieval_quality", rows=rows).write(root / "results")
    later = replace(RESULT, question="retrieval_quality", rows=rows[:2], date="2026-01-06T10:00:00Z")
    later.write(root / "results")
    (root / "README.md").write_text(page("", "retrieval_quality") + page("", "retrieval_ablation"))
    assert run(root) == 0
    quality, ablation = (root / "README.md").read_text().split("It takes")[1:]
    assert table(rows[:1]) in quality
    assert "2026-01-06" in quality
    assert table(rows[2:]) in ablation
    assert "2026-01-05" in ablation


def test_a_stale_number_is_found_and_left_alone_by_check(root, capsys):
    (root / "docs" / "serve.md").write_text(page("9"))
    assert run(root, "--check") == 1
    assert "docs/serve.md: stale: measured:serve:generate says '9', measured '6.25'" in capsys.readouterr().err
    assert (root / "docs" / "serve.md").read_text() == page("9")


def test_the_newest_result_counts_and_a_quick_one_does_not(root):
    (root / "README.md").write_text(page("6.25"))
    newer = replace(RESULT, date="2026-02-01T10:00:00Z", rows=(Row.of("generate", 5.0, "s"),))
    replace(newer, config={"quick": True}).write(root / "results")
    assert run(root, "--check") == 0
    newer.write(root / "results")
    assert run(root, "--check") == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("market:generate", "no result of 'market'; run `python -m benchmarks.market`"),
        ("serve@h200:generate", "no result of 'serve@h200'"),
        ("serve:generates", "serve has no row 'generates'; it has 'rank 10K: warm'"),
        ("serve:generate:p99_ms", "the newest result, of 2026-01-05, has no p99_ms there"),
        ("serve:generate:value:q", "'q' is no number format"),
    ],
)
def test_a_marker_that_names_nothing_is_told_and_its_number_stays(root, capsys, name, message):
    (root / "README.md").write_text(page("9", name))
    assert run(root) == 1
    assert message in capsys.readouterr().err
    assert (root / "README.md").read_text() == page("9", name)


def test_an_open_marker_is_told(root, capsys):
    (root / "README.md").write_text("<!-- measured:serve:generate -->9\n")
    assert run(root, "--check") == 1
    assert "not closed" in capsys.readouterr().err


def test_committed_results_are_of_the_schema_whole_and_name_no_path_of_a_machine():
    for result in read_results(RESULTS):
        assert not result.is_quick, result.question
        assert not any(place in result.to_json() for place in ("/home/", "/root/", "/work/", "/tmp/"))


def test_a_data_folder_that_was_named_must_be_there(tmp_path, monkeypatch):
    monkeypatch.setenv("PRERANK_DATA", str(tmp_path))
    assert data_folder(None) == tmp_path
    with pytest.raises(FileNotFoundError, match="name that of KuaiRand-Pure by --data or PRERANK_DATA"):
        data_folder(tmp_path / "absent")


def test_without_data_the_row_says_it_was_skipped():
    [row] = retrieval_quality.measure(Options(), {}).rows
    assert "skipped: no folder of KuaiRand-Pure" in row.name
    assert row.value is None


def test_every_ablation_changes_one_thing():
    config = load_config(retrieval_quality.FUNNEL)
    plain = config.to_dict()
    for name, changed in retrieval_quality.ablations(config).items():
        other = changed.to_dict()
        assert [key for key in plain if plain[key] != other[key]] in (["retrieval"], ["features"]), name


def test_every_change_of_the_negatives_is_of_the_retrieval_alone_and_can_be_asked_for():
    config = load_config(retrieval_quality.FUNNEL)
    plain = config.to_dict()
    for name in retrieval_negatives.CHANGES:
        changed = retrieval_negatives.changed_by(config, name).to_dict()
        assert [key for key in plain if plain[key] != changed[key]] in ([], ["retrieval"]), name
        assert parse_config(tomllib.loads(to_toml(changed)), where=name).to_dict() == changed
    assert retrieval_negatives.changed_by(config, retrieval_negatives.FULL) == config


def test_negatives_are_compared_with_the_full_softmax_of_the_same_seeds():
    full, corrected = retrieval_negatives.FULL, retrieval_negatives.CORRECTED
    by_seed = {(full, 7): 0.5, (full, 8): 0.9, (corrected, 7): 0.4, (corrected, 8): 0.9, ("no log-Q", 7): 0.25}
    found = {key: {"validate": np.full(10, value), "test": np.full(10, value)} for key, value in by_seed.items()}
    said = {row.name: row for row in retrieval_negatives.rows(found, is_whole=True)}
    assert said["no log-Q, test, 1 seed"].ratio == 0.5
    assert said["no log-Q, test, 1 seed: less full softmax"].value == pytest.approx(-0.25)
    below = said["log-Q, test, 2 seeds: less full softmax"]
    assert (below.value, below.bar, below.holds) == (pytest.approx(-0.05), -0.02, False)
    assert said["log-Q, validate, 2 seeds: less full softmax"].bar is None
    alone = retrieval_negatives.rows({("no log-Q", 7): found["no log-Q", 7]}, is_whole=True)
    assert [row.ratio for row in alone] == [None, None]


def test_an_ablation_is_measured_against_the_whole_recipe(monkeypatch, tmp_path):
    half, whole = (
        retrieval_quality._Trained(1.0, {"test": np.full((10, len(retrieval_quality.KS)), recall)})
        for recall in (0.2, 0.4)
    )
    monkeypatch.setattr(retrieval_quality, "prepare", lambda *_: None)
    monkeypatch.setattr(retrieval_quality, "_train", lambda *_: half)
    config = load_config(retrieval_quality.FUNNEL)
    first, *others = retrieval_quality._ablation_rows(config, None, tmp_path, whole)
    assert (first.value, first.ratio) == (0.4, None)
    assert len(others) == len(retrieval_quality.ablations(config))
    assert {(row.value, row.ratio) for row in others} == {(0.2, 0.5)}


def test_the_standard_error_is_that_of_a_mean():
    values = [0.0, 1.0] * 200
    assert retrieval_quality.standard_error(np.array(values), seed=0) == pytest.approx(0.5 / 20, rel=0.1)
