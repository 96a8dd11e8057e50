"""One contract for every implementation of the scan: torch, and the native one at every level of this processor."""

import functools

import hypothesis.extra.numpy as npst
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prerank.kernels import native, scan

HERE = native.LEVELS[: native.LEVELS.index(native.level()) + 1]
WAYS = {"torch": lambda *asked: scan.scan_by_torch(*asked)} | {
    f"{level}, {threads} threads": functools.partial(
        lambda *asked, threads, level: scan.scan_natively(*asked, threads, level), threads=threads, level=level
    )
    for level in HERE
    for threads in (1, 3)
}
DTYPES = [torch.float32, torch.bfloat16, torch.int8]
ELIGIBLE = ["all", "many", "few", "one", "none"]
SHARES = {"many": 0.7, "few": 0.05}


@pytest.fixture(params=WAYS)
def way(request):
    return WAYS[request.param]


@pytest.fixture
def divided(monkeypatch):
    """The reference in many pieces."""
    monkeypatch.setattr(scan, "_SIMILARITIES_AT_ONCE", 64)


def small_numbers(*shape: int, seed: int) -> np.ndarray:
    """Whole numbers, so that every product is exact and many are equal."""
    return np.random.default_rng(seed).integers(-2, 3, shape).astype(np.float32)


def made(num: int, dim: int, dtype: torch.dtype, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Vectors of small numbers, and for int8 scales that are powers of two, so that products stay exact."""
    vectors = torch.from_numpy(small_numbers(num, dim, seed=seed)).to(dtype)
    scales = torch.from_numpy(np.random.default_rng(seed).choice([0.5, 1, 2], num).astype(np.float32))
    return vectors, scales if dtype == torch.int8 else None


def allowed(kind: str, num: int, seed: int = 3) -> np.ndarray | None:
    if kind == "all":
        return None
    mask = np.random.default_rng(seed).random(num) < SHARES.get(kind, 0)
    mask[num // 2 :][: kind == "one"] = True
    return mask


def expected(vectors, scales, query, k, mask):
    """Rows by falling similarity, then by rising row, of what may be found: numpy, one query at a time."""
    full = vectors.float().numpy() if scales is None else (vectors.float() * scales[:, None]).numpy()
    similarity, rows = np.full((len(query), k), -np.inf, np.float32), np.full((len(query), k), -1)
    with np.errstate(all="ignore"):
        for b in range(len(query)):
            of_rows = (full * query[b].numpy()).sum(1, dtype=np.float32)
            may = np.isfinite(of_rows) if mask is None else np.isfinite(of_rows) & mask
            order = np.argsort(-of_rows, kind="stable")
            kept = order[may[order]][:k]
            similarity[b, : len(kept)], rows[b, : len(kept)] = of_rows[kept], kept
    return similarity, rows


def is_as_expected(way, vectors, scales, query, k, mask):
    similarity, rows = expected(vectors, scales, query, k, mask)
    forms = [None] if mask is None else [torch.from_numpy(mask), torch.from_numpy(np.flatnonzero(mask))]
    for eligible in forms:
        found = way(vectors, scales, query, k, eligible)
        np.testing.assert_array_equal(found[1].numpy(), rows)
        np.testing.assert_array_equal(found[0].numpy(), similarity)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ELIGIBLE)
@pytest.mark.parametrize("dim", [1, 3, 16, 64, 65])
def test_the_k_most_similar_eligible_rows_are_found_ties_by_the_smaller_row(way, dtype, kind, dim):
    num = 900
    vectors, scales = made(num, dim, dtype)
    for num_queries, k in ((1, 10), (1, 5000), (3, 100)):
        query = torch.from_numpy(small_numbers(num_queries, dim, seed=2))
        is_as_expected(way, vectors, scales, query, k, allowed(kind, num))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["all", "many", "few"])
@pytest.mark.parametrize("num_queries", [1, 35])
def test_what_fills_many_chunks_of_rows_is_merged_exactly(way, dtype, kind, num_queries):
    vectors, scales = made(40_000, 32, dtype)
    query = torch.from_numpy(small_numbers(num_queries, 32, seed=2))
    is_as_expected(way, vectors, scales, query, 60, allowed(kind, 40_000))


@pytest.mark.usefixtures("divided")
@pytest.mark.parametrize("kind", ELIGIBLE)
def test_the_reference_finds_the_same_in_many_pieces(kind):
    vectors, scales = made(500, 4, torch.int8)
    query = torch.from_numpy(small_numbers(3, 4, seed=2))
    for k in (1, 7, 600):
        is_as_expected(scan.scan_by_torch, vectors, scales, query, k, allowed(kind, 500))


few = st.sampled_from([0.0, -0.0, 1.0, -1.0, 3.0, np.nan, np.inf, -np.inf])


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(data=st.data())
def test_no_value_makes_a_scan_find_what_argsort_would_not(name, dtype, data):
    num, dim = data.draw(st.integers(0, 70)), data.draw(st.sampled_from([1, 2, 5, 16, 17]))
    vectors = data.draw(npst.arrays(np.float32, (num, dim), elements=few, fill=st.just(1.0)))
    query = data.draw(npst.arrays(np.float32, (data.draw(st.integers(0, 3)), dim), elements=few, fill=st.just(1.0)))
    mask = data.draw(st.none() | npst.arrays(np.bool_, num))
    k = data.draw(st.integers(0, 80))
    is_as_expected(WAYS[name], torch.from_numpy(vectors).to(dtype), None, torch.from_numpy(query), k, mask)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_similarity_that_is_not_finite_is_never_found(way, dtype):
    vectors, scales = made(300, 20, dtype)
    poisoned = torch.tensor([3, 150, 299])
    spoilt = torch.tensor([torch.nan, torch.inf, -torch.inf])
    if scales is None:
        vectors[poisoned, 19] = spoilt.to(dtype)
    else:
        scales[poisoned] = spoilt
    similarity, rows = way(vectors, scales, torch.full((1, 20), 3.0), 300, None)
    assert set(rows[0].tolist()) == {-1, *range(300)} - set(poisoned.tolist())
    assert similarity.isfinite().sum() == 297
    for worthless in (torch.nan, torch.inf):
        query = torch.ones(2, 20)
        query[0] = worthless
        found = way(vectors, scales, query, 5, None)[1]
        assert found[0].tolist() == [-1] * 5
        assert (found[1] >= 0).all()


def test_a_row_beside_a_poisoned_one_is_as_similar_as_before(way):
    vectors, query = torch.randn(200, 65, generator=torch.Generator().manual_seed(1)), torch.ones(2, 65)
    before = dict(zip(*(t[1].tolist() for t in reversed(way(vectors, None, query, 200, None))), strict=True))
    vectors[50::7] = torch.nan
    found, rows = way(vectors, None, query, 200, None)
    kept = rows[1] >= 0
    assert kept.sum() == 200 - len(range(50, 200, 7))
    for row, similarity in zip(rows[1, kept].tolist(), found[1, kept].tolist(), strict=True):
        assert similarity == pytest.approx(before[row], abs=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_threads_and_any_form_of_the_eligible_gives_the_same_bits(dtype):
    generator = torch.Generator().manual_seed(5)
    vectors = (torch.randn(60_000, 65, generator=generator) * 20).clamp(-127, 127).to(dtype)
    scales = torch.rand(60_000, generator=generator) if dtype == torch.int8 else None
    for level in HERE:
        for num_queries in (1, 33):
            query = torch.randn(num_queries, 65, generator=generator)
            for share in (0.02, 0.5, 1.0):
                mask = torch.rand(60_000, generator=generator) < share
                first = scan.scan_natively(vectors, scales, query, 500, mask, 1, level)
                for threads, eligible in ((2, mask), (7, mask), (2, mask.nonzero()[:, 0]), (2, None)):
                    if eligible is None and share < 1:
                        continue
                    again = scan.scan_natively(vectors, scales, query, 500, eligible, threads, level)
                    assert torch.equal(again[0], first[0])
                    assert torch.equal(again[1], first[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_querys_answer_does_not_depend_on_the_queries_beside_it(dtype):
    generator = torch.Generator().manual_seed(6)
    vectors = (torch.randn(5_000, 33, generator=generator) * 20).clamp(-127, 127).to(dtype)
    scales = torch.rand(5_000, generator=generator) if dtype == torch.int8 else None
    query = torch.randn(40, 33, generator=generator)
    for level in HERE:
        together = scan.scan_natively(vectors, scales, query, 50, None, 2, level)
        for b in (0, 31, 32, 39):
            alone = scan.scan_natively(vectors, scales, query[b : b + 1], 50, None, 1, level)
            assert torch.equal(alone[0][0], together[0][b])
            assert torch.equal(alone[1][0], together[1][b])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_similarity_is_the_dot_product_but_for_the_order_of_its_sum(way, dtype):
    generator = torch.Generator().manual_seed(7)
    vectors = (torch.randn(3_000, 100, generator=generator) * 20).clamp(-127, 127).to(dtype)
    scales = torch.rand(3_000, generator=generator) if dtype == torch.int8 else None
    query = torch.randn(2, 100, generator=generator)
    full = vectors.double() * (1 if scales is None else scales.double()[:, None])
    similarity, rows = way(vectors, scales, query, 3_000, None)
    for b in range(2):
        exact = (full @ query[b].double())[rows[b]]
        assert ((similarity[b] - exact).abs() <= 1e-4 * exact.abs().max()).all()
        assert (similarity[b, :-1] >= similarity[b, 1:]).all()
        assert sorted(rows[b].tolist()) == list(range(3_000))


def test_nothing_asked_or_nothing_there_gives_nothing(way):
    vectors = torch.ones(5, 4)
    assert [t.shape for t in way(vectors, None, torch.ones(0, 4), 3, None)] == [(0, 3)] * 2
    assert [t.shape for t in way(vectors, None, torch.ones(2, 4), 0, None)] == [(2, 0)] * 2
    for eligible in (torch.zeros(5, dtype=torch.bool), torch.empty(0, dtype=torch.int64)):
        similarity, rows = way(vectors, None, torch.ones(1, 4), 2, eligible)
        assert similarity.tolist() == [[-torch.inf] * 2]
        assert rows.tolist() == [[-1, -1]]
    assert way(vectors[:0], None, torch.ones(1, 4), 1, None)[1].tolist() == [[-1]]
    assert way(vectors[:, :0], None, torch.ones(1, 0), 2, None)[1].tolist() == [[0, 1]]


def test_vectors_that_do_not_lie_in_order_are_found_all_the_same(way):
    vectors, query = small_numbers(8, 50, seed=1), small_numbers(4, 2, seed=2)
    turned, asked = torch.from_numpy(vectors).T, torch.from_numpy(query).T
    rows = torch.arange(100)[::2][:25]
    found = way(turned[:, ::2], None, asked, 9, rows)[1]
    assert torch.equal(found, way(turned[:, ::2].contiguous(), None, asked.contiguous(), 9, rows.contiguous())[1])


def test_rows_that_do_not_rise_or_are_not_there_are_refused(monkeypatch):
    vectors, query = torch.ones(5, 4), torch.ones(1, 4)
    for library in (native.library, lambda: None):
        monkeypatch.setattr(native, "library", library)
        for rows in ([-1, 2], [0, 5]):
            with pytest.raises(IndexError, match=f"expected rows from 0 to 4, got {rows[0]} to {rows[1]}"):
                scan.scan_top_k(vectors, None, query, 1, torch.tensor(rows))
        for rows in ([0, 3, 2, 4], [1, 1]):
            with pytest.raises(IndexError, match="expected rows in strictly rising order"):
                scan.scan_top_k(vectors, None, query, 1, torch.tensor(rows))
        assert scan.scan_top_k(vectors, None, query, 1, torch.tensor([3]))[1].tolist() == [[3]]


def test_a_scan_that_there_is_no_memory_for_is_refused(monkeypatch):
    class Full:
        def prerank_scan(self, scan: object) -> int:
            return 1

    monkeypatch.setattr(native, "library", Full)
    monkeypatch.setattr(native, "level", lambda: "portable")
    with pytest.raises(MemoryError, match="no memory to keep the 3 best of 2 queries on 4 threads"):
        scan.scan_top_k(torch.ones(5, 4), None, torch.ones(2, 4), 3, None, threads=4)


def test_what_the_scan_cannot_read_never_reaches_it():
    vectors, query = torch.ones(5, 4), torch.ones(1, 4)
    for asked in (
        (vectors.double(), None, query, 1, None),
        (vectors, torch.ones(5), query, 1, None),
        (vectors.to(torch.int8), None, query, 1, None),
        (vectors.to(torch.int8), torch.ones(4), query, 1, None),
        (vectors, None, query.double(), 1, None),
        (vectors, None, torch.ones(1, 3), 1, None),
        (vectors, None, query, 1, torch.ones(4, dtype=torch.bool)),
        (vectors, None, query, 1, torch.ones(5)),
    ):
        with pytest.raises(AssertionError):
            scan.scan_top_k(*asked)


def test_the_operation_is_one_that_torch_can_see_through():
    vectors, query = torch.randn(50, 4), torch.randn(2, 4)
    for eligible in (None, torch.rand(50) < 0.5, torch.tensor([1, 7])):
        checked = torch.library.opcheck(torch.ops.prerank.scan_top_k, (vectors, None, query, 3, eligible, 1))
        assert set(checked.values()) == {"SUCCESS"}


odd = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.3, 1e-38, 3e-20, 1e20, 3e38, np.nan, np.inf, -np.inf])


@pytest.mark.parametrize("level", HERE)
@given(data=st.data())
def test_bytes_that_are_sieved_are_found_as_those_that_are_not(level, data):
    """A lone query goes by a bound first; beside a second one every row is looked at exactly, in the same order."""
    num, dim = data.draw(st.integers(1, 300)), data.draw(st.sampled_from([4, 16, 32, 64, 96, 33]))
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    vectors = torch.from_numpy(rng.integers(-128, 128, (num, dim)).astype(np.int8))
    scales = data.draw(npst.arrays(np.float32, num, elements=odd, fill=st.just(np.float32(0.5))))
    drawn = rng.standard_normal(dim).astype(np.float32) * 10.0 ** data.draw(st.integers(-30, 30))
    query = torch.from_numpy(data.draw(npst.arrays(np.float32, (1, dim), elements=odd) | st.just(drawn[None])))
    k = data.draw(st.integers(1, 20))
    mask = None if data.draw(st.booleans()) else torch.from_numpy(rng.random(num) < 0.6)
    alone = scan.scan_natively(vectors, torch.from_numpy(scales), query, k, mask, 1, level)
    beside = scan.scan_natively(vectors, torch.from_numpy(scales), query.repeat(2, 1), k, mask, 1, level)
    assert torch.equal(alone[1][0], beside[1][0])
    assert torch.equal(alone[0][0], beside[0][0])


@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_query_that_whole_numbers_tell_badly_finds_the_same(level, sign):
    """Its one large weight meets zeros; of the small ones, 1.49 units each, a third is lost; ever better rows come."""
    rng = np.random.default_rng(5)
    codes = rng.integers(0, 101, (50_000, 64)) * sign
    codes[:, 0] = 0
    codes = codes[np.argsort(codes.sum(1) * sign)]
    vectors, scales = torch.from_numpy(codes.astype(np.int8)), torch.ones(50_000)
    query = torch.full((1, 64), sign * 1.49 / 32767)
    query[0, 0] = 1.0
    for mask in (None, torch.from_numpy(rng.random(50_000) < 0.5), torch.from_numpy(rng.random(50_000) < 0.1)):
        alone = scan.scan_natively(vectors, scales, query, 5, mask, 2, level)
        beside = scan.scan_natively(vectors, scales, query.repeat(2, 1), 5, mask, 1, level)
        assert torch.equal(alone[1][0], beside[1][0])
        assert torch.equal(alone[0][0], beside[0][0])
