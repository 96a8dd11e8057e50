"""The k rows most similar to a query, by looking at every eligible one: in torch, the reference, and natively.

Natively a row is read once, where it lies: float32, bfloat16 or int8 becomes float32 in the processor, so what limits a
scan is the memory's speed. On a GPU a Triton kernel does the same.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from prerank.kernels import native, ranges, triton
from prerank.kernels.stop import current
from prerank.kernels.top_k import NONE, order_keys, value_and_row
from prerank.kernels.work import Work

_SIMILARITIES_AT_ONCE = 1 << 19
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


class _Scan(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("vectors", "scales", "query", "mask", "rows", "similarity", "found")),
        *(
            (name, ctypes.c_int64)
            for name in ("kind", "items", "dim", "num_queries", "k", "num_rows", "threads", "level")
        ),
        ("stop", ctypes.c_void_p),
    )


def scan_top_k(
    vectors: Tensor, scales: Tensor | None, query: Tensor, k: int, eligible: Tensor | None, threads: int | None = None
) -> tuple[Tensor, Tensor]:
    """The k largest dot products of each query, best first, and their rows; ties are broken by the smaller row.

    vectors [I, D] are float32, bfloat16, or int8 with float32 `scales` [I], which multiply each row's products; query
    float32 [B, D]; `eligible` is bool [I], or the int64 [N] rows themselves in strictly rising order, or None for all.
    Gives similarity float32 [B, k] and rows int64 [B, k], -inf and -1 past the last row that is eligible and of finite
    similarity. `threads` None is torch's number of them; the answer is the same, to the bit, for any.

    Raises IndexError for rows that do not rise or that there are not, and Cancelled where `stop.current` is set before
    all is looked at: it is between chunks of some thousand rows.
    """
    _check(vectors, scales, query, eligible)
    if torch.compiler.is_compiling():
        similarity, rows = _operation(vectors, scales, query, k, eligible, threads)
        return similarity, rows
    # the first call of a custom operation imports the whole compiler, over a second: nobody but it needs that
    return _here(vectors, scales, query, k, eligible, threads)


def _here(
    vectors: Tensor, scales: Tensor | None, query: Tensor, k: int, eligible: Tensor | None, threads: int | None
) -> tuple[Tensor, Tensor]:
    if eligible is not None and eligible.dtype == torch.int64:
        check_rows(eligible, len(vectors))
    if triton.serves(vectors.device):
        return scan_by_triton(vectors, scales, query, k, eligible)
    if vectors.device.type == "cpu" and native.library() is not None:
        threads = torch.get_num_threads() if threads is None else threads
        return scan_natively(vectors, scales, query, k, eligible, threads, native.level())
    return scan_by_torch(vectors, scales, query, k, eligible)


@torch.library.custom_op("prerank::scan_top_k", mutates_args=())
def _operation(
    vectors: Tensor, scales: Tensor | None, query: Tensor, k: int, eligible: Tensor | None, threads: int | None
) -> tuple[Tensor, Tensor]:
    return _here(vectors, scales, query, k, eligible, threads)


@_operation.register_fake
def _(
    vectors: Tensor, scales: Tensor | None, query: Tensor, k: int, eligible: Tensor | None, threads: int | None
) -> tuple[Tensor, Tensor]:
    shape = (query.shape[0], k)
    return query.new_empty(shape), query.new_empty(shape, dtype=torch.int64)


def scan_by_torch(
    vectors: Tensor, scales: Tensor | None, query: Tensor, k: int, eligible: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The reference, on any device, in pieces of so many similarities that memory does not grow with B x I."""
    rows = eligible if eligible is not None and eligible.dtype == torch.int64 else None
    mask = eligible if rows is None else None
    num_queries, num_items = query.shape[0], len(vectors) if rows is None else len(rows)
    best = torch.full((num_queries, k), NONE, device=query.device)
    step = max(1, _SIMILARITIES_AT_ONCE // max(num_queries, 1))
    stop = current()
    for start in range(0, num_items if k else 0, step):
        stop.check()
        piece = slice(start, start + step) if rows is None else rows[start : start + step]
        similarity = query @ vectors[piece].float().T
        if scales is not None:
            similarity *= scales[piece]
        if mask is not None:
            similarity.masked_fill_(~mask[piece], -torch.inf)
        similarity.nan_to_num_(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)
        # only what beats the k-th so far can enter, which soon is few; an equal one has a larger row
        beaten, _ = value_and_row(best[:, -1:])
        entering = max((similarity > beaten).sum(1).tolist(), default=0)
        if entering < min(k, similarity.shape[1]):
            similarity, places = similarity.topk(entering)
        else:
            places = torch.arange(similarity.shape[1], device=query.device)
        found = places + start if rows is None else rows[places + start]
        keys = order_keys(similarity, found, None)
        best = torch.cat([best, keys.topk(min(k, keys.shape[1])).values], dim=1).topk(k).values
    return value_and_row(best)


def scan_by_triton(
    vectors: Tensor, scales: Tensor | None, query: Tensor, k: int, eligible: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same by a Triton kernel, on a GPU or in Triton's interpreter; of `eligible` rows that were checked.

    It is done once it has begun: `stop` is looked at before.
    """
    from prerank.kernels.triton.scan import top_k  # where there is no GPU there need be no triton

    current().check()
    is_rows = eligible is not None and eligible.dtype == torch.int64
    return top_k(vectors, scales, query, k, None if is_rows else eligible, eligible if is_rows else None)


def scan_natively(
    vectors: Tensor, scales: Tensor | None, query: Tensor, k: int, eligible: Tensor | None, threads: int, level: str
) -> tuple[Tensor, Tensor]:
    """The same on the CPU with the instructions of `level`, one of `native.LEVELS` that this processor has.

    Few eligible rows are gathered, many are read in order with those between them. It is for `eligible` rows that were
    checked. Raises MemoryError where there is not the memory for B x k on each thread.
    """
    library = native.library()
    assert library is not None
    assert level in native.LEVELS[: native.LEVELS.index(native.level()) + 1]
    (num_items, dim), num_queries = vectors.shape, query.shape[0]
    rows = eligible if eligible is not None and eligible.dtype == torch.int64 else None
    mask = eligible if rows is None else None
    num_rows = 0 if rows is None else len(rows)
    similarity = torch.full((num_queries, k), -torch.inf)
    found = torch.full((num_queries, k), -1)
    if not similarity.numel() or not (num_items if rows is None else num_rows):
        return similarity, found
    # a copy is made only of what is not laid out as it should be, and lives until the scan is done
    vectors, query = vectors.contiguous(), query.contiguous()
    scales, mask, rows = (None if t is None else t.contiguous() for t in (scales, mask, rows))
    stop = current()
    scan = _Scan(
        native.pointer(vectors, vectors.dtype, num_items, dim),
        None if scales is None else native.pointer(scales, torch.float32, num_items),
        native.pointer(query, torch.float32, num_queries, dim),
        None if mask is None else native.pointer(mask, torch.bool, num_items),
        None if rows is None else native.pointer(rows, torch.int64, num_rows),
        native.pointer(similarity, torch.float32, num_queries, k),
        native.pointer(found, torch.int64, num_queries, k),
        *(_KINDS[vectors.dtype], num_items, dim, num_queries, k, num_rows, threads, native.LEVELS.index(level)),
        stop.address,
    )
    with ranges.kernel("native scan", lambda: _work(vectors, num_queries, k, eligible)):
        is_out_of_memory = library.prerank_scan(ctypes.byref(scan))
    if is_out_of_memory:
        raise MemoryError(f"no memory to keep the {k} best of {num_queries} queries on {threads} threads")
    stop.check()
    return similarity, found


def _work(vectors: Tensor, num_queries: int, k: int, eligible: Tensor | None) -> Work:
    """Of rows that are eligible, each read once: products in float32, and the k best written."""
    num, dim = vectors.shape
    if eligible is not None:
        num = len(eligible) if eligible.dtype == torch.int64 else int(eligible.sum())
    row_bytes = dim * vectors.element_size() + (4 if vectors.dtype == torch.int8 else 0)
    named = 0 if eligible is None else eligible.nbytes
    return Work(num_bytes=num * row_bytes + named + 12 * num_queries * k, float32_flops=2 * num * dim * num_queries)


def _check(vectors: Tensor, scales: Tensor | None, query: Tensor, eligible: Tensor | None) -> None:
    assert vectors.dim() == 2
    assert vectors.dtype in _KINDS
    assert len(vectors) < 1 << 32, "a row is the lower half of a key"
    assert (scales is not None) == (vectors.dtype == torch.int8)
    assert scales is None or (scales.dtype == torch.float32 and scales.shape == (len(vectors),))
    assert query.dtype == torch.float32
    assert query.dim() == 2
    assert query.shape[1] == vectors.shape[1]
    assert (
        eligible is None
        or (eligible.dtype == torch.int64 and eligible.dim() == 1)
        or (eligible.dtype == torch.bool and eligible.shape == (len(vectors),))
    )


def check_rows(rows: Tensor, num_items: int) -> None:
    """Raises IndexError for rows int64 [N] that do not rise strictly, or are not all of `num_items`."""
    if not len(rows):
        return
    first, last = int(rows[0]), int(rows[-1])
    if first < 0 or last >= num_items:
        raise IndexError(f"eligible: expected rows from 0 to {num_items - 1}, got {first} to {last}")
    if not bool((rows[1:] > rows[:-1]).all()):
        raise IndexError("eligible: expected rows in strictly rising order")
