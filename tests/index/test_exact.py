import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from prerank._tensor_files import write_tensors
from prerank.errors import BundleError
from prerank.index.base import INDEXES
from prerank.index.exact import ExactIndex
from prerank.index.storage import STORAGES, store
from prerank.kernels import native, scan

NUM_ITEMS, WIDTH = 500, 4


def small_numbers(*shape: int, seed: int) -> torch.Tensor:
    """Whole numbers, so that every product is exact and many are equal."""
    return torch.from_numpy(np.random.default_rng(seed).integers(-2, 3, shape).astype(np.float32))


def ranked(similarity: np.ndarray, eligible: np.ndarray, k: int) -> list[int]:
    rows = [row for row in range(len(similarity)) if eligible[row]]
    return sorted(rows, key=lambda row: (-similarity[row], row))[:k]


@pytest.fixture(params=["native", 1 << 20, 64])
def pieces(request, monkeypatch):
    """Searched natively, and by torch at once and in many pieces."""
    if request.param != "native":
        monkeypatch.setattr(native, "library", lambda: None)
        monkeypatch.setattr(scan, "_SIMILARITIES_AT_ONCE", request.param)


@pytest.mark.parametrize("kind", INDEXES)
@pytest.mark.parametrize("k", [0, 1, 7, 100, NUM_ITEMS])
@pytest.mark.usefixtures("pieces")
def test_an_exact_index_finds_the_k_most_similar_ties_by_smaller_row(kind, k):
    vectors, query = small_numbers(NUM_ITEMS, WIDTH, seed=1), small_numbers(3, WIDTH, seed=2)
    eligible = torch.from_numpy(np.random.default_rng(3).random(NUM_ITEMS) < 0.5)
    for allowed in (None, eligible):
        found = INDEXES[kind](vectors).search(query, k, allowed)
        allow = np.ones(NUM_ITEMS, dtype=bool) if allowed is None else allowed.numpy()
        if allowed is not None:
            given = INDEXES[kind](vectors).search(query, k, allowed.nonzero()[:, 0])
            assert torch.equal(given.rows, found.rows), "rows and a mask say the same"
        for b in range(3):
            similarity = (vectors @ query[b]).numpy()
            expected = ranked(similarity, allow, k)
            assert found.rows[b, found.valid[b]].tolist() == expected
            assert found.similarity[b, found.valid[b]].tolist() == similarity[expected].tolist()
            assert found.rows.shape == (3, k)
            assert not found.valid[b, len(expected) :].any()


@pytest.mark.usefixtures("pieces")
def test_more_than_there_is_comes_back_as_not_valid():
    found = ExactIndex(torch.ones(3, WIDTH)).search(torch.ones(1, WIDTH), 5, torch.tensor([True, False, True]))
    assert found.valid.tolist() == [[True, True, False, False, False]]
    assert found.rows.tolist() == [[0, 2, -1, -1, -1]]


@pytest.mark.usefixtures("pieces")
def test_a_similarity_that_is_not_finite_is_never_found():
    vectors = torch.ones(200, WIDTH)
    vectors[3], vectors[150], vectors[199] = torch.nan, torch.inf, -torch.inf
    found = ExactIndex(vectors).search(torch.ones(1, WIDTH), 200, None)
    assert found.num_valid == 197
    assert not {3, 150, 199} & set(found.rows[found.valid].tolist())


def test_no_query_finds_nothing():
    assert ExactIndex(torch.ones(3, WIDTH)).search(torch.ones(0, WIDTH), 2, None).rows.shape == (0, 2)


@pytest.mark.parametrize("kind", INDEXES)
@pytest.mark.parametrize("storage", STORAGES)
def test_a_saved_index_finds_the_same_and_knows_its_models(tmp_path, kind, storage):
    index = INDEXES[kind](torch.randn(NUM_ITEMS, WIDTH, generator=torch.Generator().manual_seed(1)), storage)
    index.save(tmp_path / "shard-0", {"retrieval": "abc"})
    loaded = INDEXES[kind].load(tmp_path / "shard-0")
    query = small_numbers(2, WIDTH, seed=5)
    assert torch.equal(loaded.search(query, 20, None).rows, index.search(query, 20, None).rows)
    assert torch.equal(loaded.search(query, 20, None).similarity, index.search(query, 20, None).similarity)
    assert loaded.models == {"retrieval": "abc"}
    assert loaded.is_exact == index.is_exact


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("storage", STORAGES)
def test_an_index_is_exact_over_what_it_stores(storage):
    vectors = torch.randn(NUM_ITEMS, 33, generator=torch.Generator().manual_seed(1))
    index, query = ExactIndex(vectors, storage), torch.randn(2, 33, generator=torch.Generator().manual_seed(2))
    assert index.storage == storage
    assert index.vectors.dtype == STORAGES[storage]
    stored = index.vectors.double() * (1 if index.scales is None else index.scales.double()[:, None])
    similarity = (stored @ query.double().T).T
    found = index.search(query, 50, None)
    assert found.rows.tolist() == similarity.topk(50).indices.tolist()
    assert torch.allclose(found.similarity.double(), similarity.topk(50).values, rtol=1e-5)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_part_finds_what_the_whole_does_among_its_rows(storage):
    vectors, query = small_numbers(NUM_ITEMS, 8, seed=1), small_numbers(3, 8, seed=2)
    whole, rows = ExactIndex(vectors, storage), torch.arange(1, NUM_ITEMS, 3)
    whole.models = {"retrieval": "one"}
    part = whole.part(rows)
    found, expected = part.search(query, 5, None), whole.search(query, 5, rows)
    assert torch.equal(rows[found.rows], expected.rows)
    assert torch.equal(found.similarity, expected.similarity)
    assert (part.models, part.storage) == (whole.models, storage)
    part.put(torch.tensor([0]), None)
    assert torch.equal(whole.search(query, 5, rows).rows, expected.rows), "it is a copy"


@pytest.mark.parametrize(("storage", "most"), [("float32", 0.0), ("bfloat16", 2**-8), ("int8", 0.5001 / 127)])
def test_what_is_stored_is_rounded_by_no_more_than_its_storage(storage, most):
    vectors = torch.randn(200, 33, generator=torch.Generator().manual_seed(1)) * torch.logspace(-40, 30, 200)[:, None]
    vectors[7] = 0
    kept, scales = store(vectors, storage)
    error = (kept.double() * (1 if scales is None else scales.double()[:, None]) - vectors.double()).abs()
    smallest = 1e-40 * (most > 0)  # numbers below the least normal one have few digits
    assert (error <= most * vectors.abs().amax(1, keepdim=True) + smallest).all()
    assert (scales is not None) == (storage == "int8")


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("storage", STORAGES)
def test_a_vector_that_is_not_finite_is_found_in_no_storage(storage):
    vectors = torch.ones(200, WIDTH)
    vectors[3, 1], vectors[150, 0], vectors[199, 2] = torch.nan, torch.inf, -torch.inf
    found = ExactIndex(vectors, storage).search(torch.ones(1, WIDTH), 200, None)
    assert found.num_valid == 197
    assert not {3, 150, 199} & set(found.rows[found.valid].tolist())


def test_a_cut_index_file_is_refused(tmp_path):
    path = tmp_path / "shard-0"
    ExactIndex(torch.ones(100, WIDTH)).save(path, {})
    whole = path.read_bytes()
    for cut in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(BundleError, match="shard-0: expected a safetensors file, but it cannot be read"):
            ExactIndex.load(path)
    path.unlink()
    with pytest.raises(BundleError, match="cannot be read"):
        ExactIndex.load(path)


def test_another_file_is_no_index(tmp_path):
    path = tmp_path / "shard-0"
    write_tensors(path, {"vectors": torch.ones(2, 2)}, {"index": "hnsw", "models": {}})
    with pytest.raises(BundleError, match="expected an exact index with the models"):
        ExactIndex.load(path)
    write_tensors(path, {"vectors": torch.ones(2, 2, dtype=torch.float64)}, {"index": "exact", "models": {}})
    with pytest.raises(BundleError, match=r"expected one tensor, vectors float32 \[I, D\], found .*float64 \[2, 2\]"):
        ExactIndex.load(path)
    write_tensors(path, {"vectors": torch.ones(2, 2)}, {"index": "exact", "models": {}, "storage": ["int8"]})
    with pytest.raises(BundleError, match="expected an exact index with the models"):
        ExactIndex.load(path)
    for storage, wanted in (
        ("bfloat16", r"one tensor, vectors bfloat16 \[I, D\]"),
        ("int8", r"two tensors, vectors int8 \[I, D\] and scales float32 \[I\]"),
    ):
        for scales in ({}, {"scales": torch.ones(3)}, {"scales": torch.ones(2).double()}):
            tensors = {"vectors": torch.ones(2, 2, dtype=torch.int8), **scales}
            write_tensors(path, tensors, {"index": "exact", "models": {}, "storage": storage})
            with pytest.raises(BundleError, match=f"expected {wanted}, found .*int8 .2, 2"):
                ExactIndex.load(path)
    save_file({"vectors": torch.ones(2, 2)}, path)
    with pytest.raises(BundleError, match="not one prerank wrote"):
        ExactIndex.load(path)
    save_file({"vectors": torch.ones(2, 2)}, path, metadata={"prerank": "[1]"})
    with pytest.raises(BundleError, match=r"expected a note of JSON values in its header, found \[1\]"):
        ExactIndex.load(path)
