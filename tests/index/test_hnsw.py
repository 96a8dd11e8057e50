import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prerank._tensor_files import read_tensors, write_tensors
from prerank.errors import BundleError, ConfigError
from prerank.index import graph, plan
from prerank.index.exact import ExactIndex
from prerank.index.hnsw import HNSWIndex
from prerank.index.storage import STORAGES
from prerank.types import CandidateSet
from tests.index.world import FLOOR, NUM_ROWS, K, always_worth_it, plain, prepared, queries, vectors

pytestmark = pytest.mark.usefixtures("always_worth_it")
assert always_worth_it


def recall(found: CandidateSet, best: CandidateSet) -> float:
    shares = []
    for b in range(len(best.rows)):
        wanted = set(best.rows[b, best.valid[b]].tolist())
        shares.append(len(wanted & set(found.rows[b, found.valid[b]].tolist())) / len(wanted) if wanted else 1.0)
    return float(np.mean(shares))


def one_by_one(index: HNSWIndex | ExactIndex, query: torch.Tensor, k: int, eligible: torch.Tensor | None):
    found = [index.search(one[None], k, eligible) for one in query]
    return CandidateSet(*(torch.cat([getattr(f, name) for f in found]) for name in ("rows", "similarity", "valid")))


def asked_graph(index: HNSWIndex, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The widths that the graph is searched with from now on."""
    widths: list[int] = []
    found = graph.Graph.find
    monkeypatch.setattr(
        graph.Graph, "find", lambda self, q, width, *how: widths.append(width) or found(self, q, width, *how)
    )
    return widths


@pytest.fixture(params=STORAGES)
def storage(request):
    return request.param


@pytest.mark.parametrize("share", [1.0, 0.5, 0.05, 0.005, 0.0])
def test_at_least_the_floor_is_found_however_few_are_eligible(storage, share, monkeypatch):
    some, query = vectors(), queries(64, seed=5)
    index, exact = plain(storage), ExactIndex(some, storage)
    widths = asked_graph(index, monkeypatch)
    eligible = torch.rand(NUM_ROWS, generator=torch.Generator().manual_seed(2)) < share
    alike = some @ some[11]
    like_one = alike >= alike.quantile(1 - share) if share else torch.zeros(NUM_ROWS, dtype=torch.bool)
    for mask in (None, eligible, like_one) if share == 1 else (eligible, like_one):
        found, best = one_by_one(index, query, K, mask), exact.search(query, K, mask)
        assert recall(found, best) >= FLOOR
        assert torch.equal(found.valid, best.valid), "as many as there are"
        if mask is not None:
            assert mask[found.rows[found.valid]].all()
            rows = one_by_one(index, query, K, mask.nonzero().squeeze(1))
            assert torch.equal(rows.rows, found.rows), "rows and a mask say the same"
    assert bool(widths) == (share >= 0.05), "by the graph where enough are eligible"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), share=st.floats(0, 1), k=st.integers(0, 30), batch=st.integers(1, 3))
def test_what_is_found_is_eligible_each_once_and_sorted_with_its_own_similarity(seed, share, k, batch):
    index, exact = the_small_one()
    eligible = torch.from_numpy(np.random.default_rng(seed).random(800) < share)
    query = queries(batch, 8, seed)
    found, best = index.search(query, k, eligible), exact.search(query, k, eligible)
    assert torch.equal(found.valid, best.valid)
    for b in range(batch):
        rows, similarity = found.rows[b, found.valid[b]], found.similarity[b, found.valid[b]]
        assert eligible[rows].all()
        assert len(rows.unique()) == len(rows)
        pairs = [(-s, r) for s, r in zip(similarity.tolist(), rows.tolist(), strict=True)]
        assert pairs == sorted(pairs), "falling, ties by the smaller row"
        alone = exact.search(query[b : b + 1], len(rows), rows.sort().values)
        assert torch.equal(alone.similarity[0], similarity), "to the bit what ExactIndex says"
        assert (found.rows[b, ~found.valid[b]] == -1).all()


SMALL: list[tuple[HNSWIndex, ExactIndex]] = []


def the_small_one() -> tuple[HNSWIndex, ExactIndex]:
    """Of whole numbers, so that many similarities are equal; some rows are found by nobody."""
    if not SMALL:
        some = vectors(800, 8).mul(2).round()
        some[::17] = torch.nan
        SMALL.append((prepared(some, k=30), ExactIndex(some)))
    return SMALL[0]


def test_for_more_than_was_measured_every_row_is_looked_at(monkeypatch):
    index, exact = plain("float32"), ExactIndex(vectors())
    widths, query = asked_graph(index, monkeypatch), queries(2)
    assert torch.equal(index.search(query, K + 1, None).rows, exact.search(query, K + 1, None).rows)
    assert not widths
    index.search(query, K, None)
    index.search(query, 1, None)
    assert widths == [index.plan.steps[0].width] * 2


def test_a_graph_that_is_not_faster_is_not_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "_pace", lambda tried, truth: 0.8)
    index = prepared(vectors())
    assert not index.plan.has_graph
    index.save(tmp_path / "i", {})
    assert list(read_tensors(tmp_path / "i")[0]) == ["vectors"]
    query = queries(3)
    assert torch.equal(
        HNSWIndex.load(tmp_path / "i").search(query, 9, None).rows, ExactIndex(vectors()).search(query, 9, None).rows
    )


def test_where_the_graph_comes_by_too_few_every_row_is_looked_at(monkeypatch):
    index, exact = plain("float32"), ExactIndex(vectors())
    monkeypatch.setattr(graph.Graph, "find", lambda self, q, width, *how: np.full((len(q), width), -1))
    query, half = queries(2), torch.arange(NUM_ROWS) % 2 == 0
    for mask in (None, half):
        assert torch.equal(index.search(query, K, mask).rows, exact.search(query, K, mask).rows)


def test_rows_that_come_and_leave_are_found_and_not_found_beside_the_graph(storage, monkeypatch):
    some = vectors()
    some[-200:] = torch.nan
    index, exact, query = prepared(some, storage), ExactIndex(some, storage), queries(48, seed=9)
    widths = asked_graph(index, monkeypatch)
    best = exact.search(query, 3, None).rows
    gone = best.flatten().unique()[:60]
    came = torch.arange(NUM_ROWS - 200, NUM_ROWS - 150)
    for one in (index, exact):
        one.own()
        one.put(gone, None)
        one.put(came, 1.2 * query[:1].expand(50, -1) + vectors(50, seed=3))
        one.put(came[:10], None)
        one.put(torch.tensor([5]), 2 * query[:1])
    half = torch.arange(NUM_ROWS) % 2 == 0
    for mask in (None, half, half.nonzero().squeeze(1)):
        found, best = one_by_one(index, query, K, mask), exact.search(query, K, mask)
        assert recall(found, best) >= FLOOR
        assert torch.equal(found.valid, best.valid)
        assert not set(found.rows.flatten().tolist()) & {*gone.tolist(), *came[:10].tolist()}
        fresh = set(came[10:].tolist())
        mine, wanted = (set(answer.rows[0].tolist()) & fresh for answer in (found, best))
        assert wanted
        assert mine == wanted, "those that came are never missed"
    assert 5 in index.search(query[:1], K, None).rows[0].tolist(), "anew in the row that it had"
    assert widths, "by the graph"


def test_so_many_that_came_that_the_graph_is_no_gain_are_looked_at_with_all():
    steps = (plan.Step(1.0, 50, 10, 0.99, 0.25),)
    measured = plan.Plan(10, 0.9, 1_000, steps)
    assert measured.step(10, 1_000, 750) == steps[0]
    assert measured.step(10, 1_000, 751) is None


def test_those_who_search_while_rows_come_and_leave_find_only_what_is_there():
    some = vectors()
    some[-300:] = torch.nan
    index, query, ended = prepared(some), queries(8), threading.Event()
    index.own()
    wrong: list[object] = []

    def search() -> None:
        while not ended.is_set():
            found = index.search(query, K, None)
            if not found.valid.all() or not bool((found.similarity[:, :-1] >= found.similarity[:, 1:]).all()):
                wrong.append(found)

    threads = [threading.Thread(target=search) for _ in range(2)]
    for thread in threads:
        thread.start()
    for n in range(60):
        rows = torch.arange(NUM_ROWS - 300 + 5 * n, NUM_ROWS - 295 + 5 * n)
        index.put(rows, query[:5] + 0.01 * n)
        index.put(rows[:2], None)
    ended.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert index.search(query, K, None).rows.max() >= NUM_ROWS - 300


def test_a_saved_graph_comes_back_with_its_plan_and_finds_the_same(storage, tmp_path):
    some = vectors()
    some[::9] = torch.nan
    index, query = prepared(some, storage), queries(20, seed=4)
    index.save(tmp_path / "i", {"retrieval": "abc"})
    loaded = HNSWIndex.load(tmp_path / "i")
    assert (loaded.plan, loaded.models, loaded.storage) == (index.plan, {"retrieval": "abc"}, storage)
    for mask in (None, torch.arange(NUM_ROWS) % 3 > 0):
        for one in (loaded, index):
            one.threads = 1 if one is loaded else 2
        found, same = loaded.search(query, K, mask), index.search(query, K, mask)
        assert torch.equal(found.rows, same.rows)
        assert torch.equal(found.similarity, same.similarity)


def test_the_same_vectors_give_the_same_graph_with_any_threads():
    first, again = (graph.build_links(vectors().numpy(), threads) for threads in (1, 2))
    assert first is not None
    assert again is not None
    assert first.entry == again.entry
    for name, tensor in first.to_tensors().items():
        assert torch.equal(tensor, again.to_tensors()[name])


def test_rows_that_do_not_rise_are_refused_by_the_graph_too():
    index = plain("float32")
    every = torch.arange(NUM_ROWS)
    for rows in (every.flip(0), every + 1, every - 1):
        with pytest.raises(IndexError, match="eligible: expected rows"):
            index.search(queries(1), K, rows)


@pytest.mark.parametrize("some", [torch.full((50, 4), torch.nan), torch.ones(1, 4), torch.ones(0, 4)])
def test_where_there_is_next_to_nothing_there_is_no_graph(some):
    index = HNSWIndex(some)
    index.prepare(torch.ones(2, 4), 5, 0.9)
    assert not index.plan.has_graph
    assert index.search(torch.ones(1, 4), 5, None).num_valid == int(some.isfinite().all(1).sum())


def test_equal_vectors_are_told_apart_by_their_rows():
    index = prepared(torch.ones(500, 8), k=5, floor=0.5)
    found = index.search(torch.ones(1, 8), 5, None)
    assert found.valid.all()
    assert found.rows[0].tolist() == sorted(found.rows[0].tolist())


TAMPERED = {
    "a link out of the rows": (
        "neighbors",
        lambda t: t.index_fill(0, torch.tensor([3]), NUM_ROWS),
        "expected links to rows up to 1999",
    ),
    "a link before the rows": ("neighbors", lambda t: t.index_fill(0, torch.tensor([3]), -2), "expected links to rows"),
    "too few links": ("neighbors", lambda t: t[:-1], "places for links"),
    "no level": ("levels", lambda t: t * 0, "expected each row on 1 to 32 levels"),
    "other levels": ("levels", lambda t: t.flip(0), "highest level|places for links|is not on it"),
    "short codes": ("codes", lambda t: t[:-1], "expected .*codes"),
    "codes of another type": ("codes", lambda t: t.short(), "expected .*codes"),
    "ranges that are not finite": ("ranges", lambda t: t * torch.nan, "finite ranges"),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_a_graph_that_would_lead_out_of_memory_is_refused(tmp_path, what):
    name, change, said = TAMPERED[what]
    path = tmp_path / "i"
    plain("float32").save(path, {})
    tensors, note = read_tensors(path)
    write_tensors(path, {**tensors, f"graph.{name}": change(tensors[f"graph.{name}"])}, note)
    with pytest.raises(BundleError, match=f"i: a graph over .*({said})"):
        HNSWIndex.load(path)


def test_a_link_to_a_row_that_is_not_on_its_level_is_refused(tmp_path):
    path = tmp_path / "i"
    plain("float32").save(path, {})
    tensors, note = read_tensors(path)
    levels, neighbors = tensors["graph.levels"], tensors["graph.neighbors"].clone()
    high = int((levels > 1).nonzero()[0])
    start = int((graph.LINKS * (levels[:high].long() + 1)).sum())
    neighbors[start + 2 * graph.LINKS] = int((levels == 1).nonzero()[0])
    write_tensors(path, {**tensors, "graph.neighbors": neighbors}, note)
    with pytest.raises(BundleError, match=f"a link of row {high} on level 1 leads to a row that is not on it"):
        HNSWIndex.load(path)


@pytest.mark.parametrize("entry", [-1, NUM_ROWS, "0", None, True])
def test_an_entry_that_is_no_row_is_refused(tmp_path, entry):
    path = tmp_path / "i"
    plain("float32").save(path, {})
    tensors, note = read_tensors(path)
    write_tensors(path, tensors, {**note, "entry": entry})
    with pytest.raises(BundleError, match=r"i: a graph over \[2000, 16\]"):
        HNSWIndex.load(path)


@pytest.mark.parametrize("change", [None, 7, {"k": "x"}, {"steps": [{"share": 1.0}]}, {"k": True}])
def test_a_plan_that_is_none_is_refused(tmp_path, change):
    path = tmp_path / "i"
    index = plain("float32")
    index.save(path, {})
    tensors, note = read_tensors(path)
    wrong = {**index.plan.to_plain(), **change} if isinstance(change, dict) else change
    write_tensors(path, tensors, {**note, "plan": wrong})
    with pytest.raises(BundleError, match="i: expected an index's plan"):
        HNSWIndex.load(path)


def test_an_index_of_another_kind_is_refused_both_ways(tmp_path):
    ExactIndex(torch.ones(3, 4)).save(tmp_path / "e", {})
    HNSWIndex(torch.ones(3, 4)).save(tmp_path / "h", {})
    with pytest.raises(BundleError, match="expected an hnsw index"):
        HNSWIndex.load(tmp_path / "e")
    with pytest.raises(BundleError, match="expected an exact index"):
        ExactIndex.load(tmp_path / "h")


def test_without_the_library_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigError, match=r"pip install 'prerank\[hnsw\]'"):
        prepared(vectors())


def test_a_saved_graph_is_searched_where_the_library_is_not(monkeypatch, tmp_path):
    built = prepared(vectors())
    built.save(tmp_path / "i", {})
    monkeypatch.setitem(sys.modules, "faiss", None)
    index = HNSWIndex.load(tmp_path / "i")
    widths, query = asked_graph(index, monkeypatch), queries(2)
    assert torch.equal(index.search(query, K, None).rows, built.search(query, K, None).rows)
    assert widths, "by the graph"


def test_the_library_is_imported_only_for_a_graph():
    code = "import sys, prerank.index.base; sys.exit('faiss' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_a_query_that_is_not_finite_finds_what_it_finds_in_an_exact_index(number):
    query = queries(2)
    query[0, 3] = number
    found, best = plain("float32").search(query, K, None), ExactIndex(vectors()).search(query, K, None)
    assert torch.equal(found.rows[0], best.rows[0])
    assert found.valid[1].all()
