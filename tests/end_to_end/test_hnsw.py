"""A funnel whose index is a graph: published, loaded, served, with items that come and leave."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from prerank.bundle.load import load
from prerank.bundle.registry import Registry
from prerank.errors import BundleError, ConfigError
from prerank.index import graph, plan
from prerank.index.hnsw import HNSWIndex
from prerank.serve.funnel import Funnel
from prerank.types import Given, ItemChange, Request
from tests.bundle.world import sign_again
from tests.serve import world
from tests.serve.conftest import publish_live

REQUEST = Request(user_id=1, k=5, time_ms=world.T0 + 10_000, context={"hour": 1, "surface": "search"})
NEW: dict[str, Given] = {"item_id": 500, "genre": "genre 1", "bid_micros": 10**8, "title": "new"}


def store_of(home: Path, kind: str, storage: str = "float32") -> Path:
    plain = world.config().to_dict()["retrieval"]
    assert isinstance(plain, dict)
    index = {"kind": kind, "storage": storage}
    return publish_live(home, world.config(inventory={"slack": 4}, retrieval={**plain, "index": index}))


def ids(funnel: Funnel) -> list[int]:
    return [winner.item_id for winner in funnel.recommend(REQUEST).winners]


@pytest.fixture
def widths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of so few rows a graph is never faster; here it is searched wherever it finds enough, and says so."""
    asked: list[int] = []
    find = graph.Graph.find
    monkeypatch.setattr(plan, "_pace", lambda tried, truth: 0.5)
    monkeypatch.setattr(graph.Graph, "find", lambda self, q, w, *how: asked.append(w) or find(self, q, w, *how))
    return asked


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
def test_a_funnel_with_a_graph_answers_as_one_that_looks_at_all(
    tmp_path: Path, storage: str, widths: list[int]
) -> None:
    store = store_of(tmp_path / "hnsw", "hnsw", storage)
    with Funnel.open(store) as by_graph, Funnel.open(store_of(tmp_path / "exact", "exact", storage)) as exact:
        widths.clear()
        assert ids(by_graph) == ids(exact)
        assert widths, "by the graph"
        for funnel in (by_graph, exact):
            funnel.change([ItemChange(500, columns=NEW)])
        assert 500 in ids(exact)
        assert ids(by_graph) == ids(exact)
        best = ids(exact)[0]
        for funnel in (by_graph, exact):
            funnel.change([ItemChange(best, removed=True)])
        assert best not in ids(by_graph)
        assert ids(by_graph) == ids(exact)


def test_a_version_of_few_items_keeps_no_graph_and_says_why(tmp_path: Path) -> None:
    store = store_of(tmp_path / "w", "hnsw")
    index = load(Registry(store).path(str(Registry(store).live()))).index
    assert isinstance(index, HNSWIndex)
    assert [step.width for step in index.plan.steps] == [0], "measured, and slower than looking at eight rows"
    assert (index.plan.k, index.plan.floor) == (6, 0.98)


def test_a_version_whose_graph_is_damaged_is_refused(tmp_path: Path, widths: list[int]) -> None:
    store = store_of(tmp_path / "w", "hnsw")
    path = Registry(store).path(str(Registry(store).live()))
    where = path / "index" / "shard-0.safetensors"
    whole = where.read_bytes()
    where.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(BundleError, match="shard-0"):
        load(path)
    where.write_bytes(whole.replace(b"graph.levels", b"graph.labels"))
    with pytest.raises(BundleError, match="a graph over"):
        load(sign_again(path))


def test_a_funnel_that_asks_for_a_graph_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigError, match=r"pip install 'prerank\[hnsw\]'"):
        store_of(tmp_path / "w", "hnsw")


@pytest.mark.parametrize("floor", [0.0, -0.1, 1.1])
def test_a_floor_that_is_no_share_is_refused(floor: float) -> None:
    plain = world.config().to_dict()["retrieval"]
    assert isinstance(plain, dict)
    with pytest.raises(ConfigError, match=r"retrieval\.index\.floor: expected above 0 and at most 1"):
        world.config(retrieval={**plain, "index": {"kind": "hnsw", "floor": floor}})
