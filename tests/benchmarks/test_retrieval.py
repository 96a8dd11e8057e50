import sys
from importlib.util import find_spec

import torch

from benchmarks import retrieval
from benchmarks.result import Hardware, Result
from benchmarks.retrieval_world import equally_long, tower_vectors
from prerank.index.exact import ExactIndex

TINY = retrieval.Sizes(items=2_000, users=3)


def test_each_share_each_storage_and_each_library_has_its_rows(monkeypatch):
    monkeypatch.setattr(retrieval, "WIDTHS", (100, 400))
    measured = retrieval.indexes(TINY)
    told = (measured.config, measured.ceilings, tuple(measured.rows))
    result = Result("retrieval", "2026-01-05T10:00:00Z", "0123456789ab", Hardware("Some CPU", 2, 24.0), {}, *told)
    assert Result.from_json(result.to_json()) == result
    for storage in retrieval.STORED:
        assert result.row(f"HNSWIndex, {storage}: recall@100").value >= 0.98
    for share in ("100.0%", "50.0%", "20.0%", "5.0%", "0.5%", "0.0%"):
        assert result.row(f"HNSWIndex, {share} eligible, at random: recall@100").value >= 0.97
    peers = [f"{name}, equally long" for name in ("hnswlib", "usearch") if find_spec(name)]
    for name in ("graph of HNSWIndex", *peers):
        narrow, wide = (result.row(f"{name}, width {width}") for width in (100, 400))
        assert 0.5 < narrow.value <= wide.value
        assert wide.p50_ms > 0
    assert not any(row.holds is not None for row in measured.rows), "only the whole question has bars"


def test_the_vectors_are_as_the_market_towers_make_them():
    items, users = tower_vectors(5_000, 100)
    lengths = items.norm(dim=1)
    assert 5.5 < lengths.median() < 7
    assert 0.6 < items[:, -1].std() < 0.7
    assert (users[:, -1] == 1).all()
    spread = torch.linalg.svdvals(items - items.mean(0)).square()
    assert 15 < spread.sum().square() / spread.square().sum() < 22, "directions that matter"
    assert torch.equal(tower_vectors(5_000, 100)[0], items)


def test_of_vectors_made_equally_long_the_nearest_have_the_largest_product():
    items, users = tower_vectors(500, 5)
    longer, user = equally_long(items), torch.nn.functional.pad(users, (0, 1))
    assert longer.norm(dim=1).allclose(longer[0].norm(), atol=1e-3)
    assert torch.equal(torch.cdist(user, longer).argmin(1), (users @ items.T).argmax(1))


def test_a_library_that_is_not_installed_is_said_to_be_missing(monkeypatch):
    for name in ("hnswlib", "usearch", "usearch.index"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(retrieval, "WIDTHS", (100,))
    items, users = tower_vectors(500, 2)
    world = retrieval.World(items, users, ExactIndex(items))
    names = [row.name for row in retrieval._curves(world, retrieval._graph(items))]
    assert names[0].startswith("hnswlib, inner product (skipped: ")
    assert names[4:] == ["graph of HNSWIndex, width 100"]
