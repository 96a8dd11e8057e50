"""The page says every number of the JSON, needs nothing from outside, and shows names as they are."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest

from prerank.errors import DataError
from prerank.evaluate.compare import Predictions, compare
from prerank.evaluate.report import difference_table, key_table, name_of, number, render_report, signed, write_report
from tests.conftest import ROOT
from tests.evaluate.world import FEW, TASKS, arrays


@pytest.fixture(scope="module")
def told():
    world = arrays(candidates=150)
    segment = np.where(world.winners.user < 10, 1, 0)  # a segment of too few users
    models = {"two_tower": world.model(noise=1.0), "cross_feature": world.model(noise=0.2)}
    winners, about = replace(world.winners, segment=segment), {"funnel": "small", "days": "2026-01-14 to 2026-01-14"}
    return compare(models, winners, world.candidates, world.model(), how=FEW, about=about)


@pytest.fixture(scope="module")
def written(told, tmp_path_factory):
    return write_report(told, tmp_path_factory.mktemp("report") / "new" / "folder")


def numbers_of(plain) -> set[float | int]:
    if isinstance(plain, dict):
        plain = list(plain.values())
    if isinstance(plain, list):
        return set().union(*map(numbers_of, plain)) if plain else set()
    return {plain} if isinstance(plain, int | float) and not isinstance(plain, bool) else set()


class Page(HTMLParser):
    """Texts of a page, what it refers to, and whether every element that was opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts: set[str] = set()
        self.links: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href", "action", "data")]
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        self.texts.add(data.strip())


def test_the_page_holds_each_number_of_the_json(written):
    plain = json.loads((written.parent / "quality.json").read_text())
    texts = Page(written.read_text()).texts
    for part in ("measured", "differences", "curves", "histograms"):
        found = numbers_of(plain[part])
        assert len(found) > 50
        missing = [n for n in found if number(n) not in texts and signed(n) not in texts]
        assert not missing, part


def test_the_page_tells_every_reason_and_caution(written, told):
    texts = unescape(written.read_text())
    assert "10 users here, expected at least 20" in texts
    for caution in told.cautions:
        assert caution in texts


def test_the_page_is_whole_and_refers_to_nothing_outside_itself(written):
    text = written.read_text()
    page = Page(text)
    assert not page.open
    assert all(link.startswith("#") for link in page.links)
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert "<script" not in text
    ids = re.findall(r' id="([^"]+)"', text)
    assert {link[1:] for link in page.links} <= set(ids)


def test_the_same_comparison_gives_the_same_bytes(told, written):
    assert render_report(told) == written.read_text()


def test_the_first_table_has_a_row_a_model_with_its_key_numbers(told):
    table = key_table(told, "click")
    assert [labels for labels, _ in table.rows] == [("teacher",), ("two_tower",), ("cross_feature",)]
    assert ("winners", "auc") in table.columns
    assert ("candidates", "overlap@10") in table.columns
    _, cells = table.rows[1]
    auc = cells[table.columns.index(("winners", "auc"))].estimate
    assert auc == told.metrics("two_tower", "winners", "click")["auc"]


def test_a_sure_difference_is_called_better_or_worse_whichever_way_is_up():
    world = arrays()
    rough, near, same = world.model(noise=1.0), world.model(noise=0.2), world.model(noise=1.0)
    told = compare({"rough": rough, "near": near, "same": same}, world.winners, how=FEW)
    table = difference_table(told, "click")
    verdicts = {
        labels[0]: {metric: cell.verdict for (_, metric), cell in zip(table.columns, cells, strict=True)}
        for labels, cells in table.rows
    }
    assert verdicts["near − rough"]["auc"] == verdicts["near − rough"]["log_loss"] == "better"
    assert set(verdicts["same − rough"].values()) == {"unsure"}
    turned = difference_table(compare({"near": near, "rough": rough}, world.winners, how=FEW), "click")
    [(labels, cells)] = turned.rows
    assert labels == ("rough − near",)
    assert {cell.verdict for cell in cells} == {"worse"}
    assert 'class="worse">-' in render_report(compare({"near": near, "rough": rough}, world.winners, how=FEW))


def test_names_are_shown_as_they_are_and_never_run():
    world = arrays()
    odd = {"<script>alert(1)</script>": world.model(noise=0.5), "_$x^2$ & co": world.model()}
    page = render_report(compare(odd, world.winners, world.candidates, world.model(), how=FEW))
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "_$x^2$ &amp; co" in page
    assert not Page(page).open


def test_without_teacher_segments_or_enough_users_there_is_still_a_page():
    small = arrays(rows=30, users=5)
    for models in (
        {"light": small.model()},
        {"light": small.model(), "flat": Predictions(TASKS, np.full((30, 2), 0.3))},
    ):
        page = render_report(compare(models, replace(small.winners, segments=(), segment=np.zeros(30, int)), how=FEW))
        assert "5 users here, expected at least 20" in page
        assert "By segment" not in page
        assert "KL" not in page


def test_a_folder_that_cannot_be_written_is_an_error_with_its_name(told, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/under: expected a folder to write the report into: "):
        write_report(told, tmp_path / "file" / "under")


def test_numbers_and_names_read_well():
    assert [number(n) for n in (None, 1234567, 0.5, 0.00012345, 0.0, -0.25)] == [
        "–", "1,234,567", "0.5000", "1.23e-04", "0.0000", "-0.2500",
    ]  # fmt: skip
    assert [signed(n) for n in (None, 0.5, -0.5)] == ["–", "+0.5000", "-0.5000"]
    assert [name_of(m) for m in ("auc", "top10_in_100", "ndcg@10", "overlap@10")] == [
        "AUC", "top 10 in 100", "NDCG@10", "overlap@10",
    ]  # fmt: skip


def test_the_command_line_and_serving_start_without_the_plotting_library():
    said = "import sys, prerank.cli, prerank.serve.http; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", said], timeout=120, check=False).returncode == 0


def test_the_example_of_the_docs_runs(tmp_path):
    page = (ROOT / "docs" / "evaluate.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    world = arrays()
    label, light, trees = (a[:, :1] for a in (world.winners.label, world.model(1.0).winners, world.model(0.1).winners))
    names = {"label": label, "user": world.winners.user, "tab": world.winners.segment, "light": light, "trees": trees}
    exec(code, {**names, "folder": tmp_path})
    assert json.loads((tmp_path / "quality.json").read_text())["models"] == ["light", "boosted trees"]
