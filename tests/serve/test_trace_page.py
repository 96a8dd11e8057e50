"""What a real Chromium draws of a request to a real server."""

import re
import shutil
import subprocess
import xml.etree.ElementTree as Tree
from pathlib import Path

import httpx
import pytest

from tests.serve.test_serve import BODY, started

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the path: apt-get install chromium")


def chromium(*options: str) -> str:
    assert CHROMIUM is not None
    plain = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1100,1000")
    return subprocess.run([CHROMIUM, *plain, *options], capture_output=True, text=True, timeout=120, check=True).stdout


def drawn(dom: str, picture: str) -> Tree.Element:
    found = re.search(rf'<svg id="{picture}".*?</svg>', dom, re.S)
    assert found is not None
    return Tree.fromstring(found[0])


def bars(svg: Tree.Element, key: str) -> dict[str, tuple[float, float]]:
    """Left end and width of the bar in each group, by the group's name."""
    groups = [group for group in svg.iter("g") if key in group.attrib]
    rects = {group.attrib[key]: group.find("rect") for group in groups}
    return {name: (float(r.attrib["x"]), float(r.attrib["width"])) for name, r in rects.items() if r is not None}


def test_chromium_draws_the_waterfall_and_the_counts_of_a_request(published: Path, tmp_path: Path) -> None:
    with started(published) as (_, address):
        for n in range(2):  # the first one is slow in odd places
            body = {**BODY, "deadline_ms": 10_000}
            answer = httpx.post(f"{address}/v1/recommend", json=body, headers={"x-request-id": f"n/{n}"}).json()
        trace = httpx.get(f"{address}/v1/trace/n%2F1").json()
        page = f"{address}/trace/n%2F1"
        dom = chromium("--dump-dom", page)
        listed = chromium("--dump-dom", f"{address}/traces")
        chromium("--hide-scrollbars", f"--screenshot={tmp_path / 'page.png'}", page)
    stages = bars(drawn(dom, "waterfall"), "data-stage")
    lane = drawn(dom, "waterfall").find("rect")
    assert lane is not None
    left, width = float(lane.attrib["x"]), float(lane.attrib["width"])
    assert {stage["name"] for stage in answer["stages"]} == set(stages) - {"waited for a worker", "made the answer"}
    for stage in trace["stages"]:
        begins = left + width * (trace["began_ms"] + stage["start_ms"]) / trace["ms"]
        assert stages[stage["name"]] == pytest.approx((begins, width * max(stage["ms"] / trace["ms"], 0.004)), abs=0.5)
    levels = bars(drawn(dom, "narrowing"), "data-level")
    assert list(levels) == ["items", "eligible", "candidates", "ranked", "winners"]
    widths = [one[1] for one in levels.values()]
    assert widths == sorted(widths, reverse=True)
    assert [group.attrib["data-num"] for group in drawn(dom, "narrowing").iter("g")] == ["8", "8", "6", "6", "3"]
    assert re.findall(r'href="(/trace/[^"]+)"', listed) == ["/trace/n%2F1", "/trace/n%2F0"]
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


def test_chromium_draws_a_request_that_was_refused_as_such(published: Path) -> None:
    with started(published) as (_, address):
        httpx.post(f"{address}/v1/recommend", json={**BODY, "k": 0}, headers={"x-request-id": "wrong"})
        dom = chromium("--dump-dom", f"{address}/trace/wrong")
    assert 'id="status" class="bad">422 RequestError' in dom
    assert "k: expected 1 to 5, got 0" in dom
    assert list(bars(drawn(dom, "waterfall"), "data-stage")) == ["no stage began"]
    assert 'id="narrowing"' not in dom
