"""How fast are the k most similar of a million rows found, and what do smaller numbers cost in recall?

ExactIndex over each storage, beside a product and topk and beside the same scan in torch, all called in turn. The
ceiling where all are eligible is reading every vector once at the speed of a copy, whose bytes are those read and those
written. Numbers are drawn from one normal distribution: no gap between those found and the next helps recall.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from benchmarks.machine import ceilings as machine_ceilings
from benchmarks.machine import say, times_ms
from benchmarks.result import Row
from benchmarks.run import Measured, Options, run
from prerank.index.exact import ExactIndex
from prerank.index.storage import STORAGES, Storage
from prerank.kernels import native
from prerank.kernels.scan import scan_by_torch

SEED, DIM, K = 7, 64, 1_000
SHARES = (1.0, 0.5, 0.06, 0.01)
THREADS = (1, 2)
MOST_OVER_CEILING, LEAST_FASTER = 2.0, 5.0
PLAIN = "matmul + torch.topk"


@dataclass(frozen=True, slots=True)
class Sizes:
    """Rows of the index, timed calls of each way, queries that recall is measured on."""

    items: int = 1_000_000
    calls: int = 101
    queries: int = 32


QUICK = Sizes(items=200_000, calls=11, queries=8)


def measure(options: Options, ceilings: Mapping[str, float]) -> Measured:
    return scans(QUICK if options.quick else Sizes())


def scans(sizes: Sizes) -> Measured:
    """Every row, with the milliseconds that reading each storage takes at the speed of a copy, by number of threads."""
    rows: list[Row] = []
    ceilings: dict[str, float] = {}
    generator = torch.Generator().manual_seed(SEED)
    vectors, query = (torch.randn(num, DIM, generator=generator) for num in (sizes.items, sizes.queries))
    indexes: dict[Storage, ExactIndex] = {storage: ExactIndex(vectors, storage) for storage in STORAGES}
    masks = {share: torch.rand(sizes.items, generator=generator) < share for share in SHARES}
    for threads in THREADS:
        with _threads(threads), torch.inference_mode():
            say(f"retrieval_scan: threads = {threads}")
            copy_gb_s = machine_ceilings()["copy_gb_s"]
            ceilings[f"copy_gb_s_{threads}_threads"] = copy_gb_s
            least = {storage: _bytes(index) / copy_gb_s / 1e6 for storage, index in indexes.items()}
            ceilings |= {f"{name}_read_ms_{threads}_threads": round(ms, 4) for name, ms in least.items()}
            for share, mask in masks.items():
                asked, at = None if share == 1 else mask, f"{share:.0%} eligible, threads = {threads}"
                is_barred = sizes == Sizes() and threads == max(THREADS)
                rows += _timed(indexes, query[:1], asked, sizes, at, least, is_barred)
    with torch.inference_mode():
        rows += _recalls(indexes, query)
    config = {"dim": DIM, "k": K, "seed": SEED, "level": native.level(), **asdict(sizes)}
    return Measured(rows, config, ceilings)


def _timed(
    indexes: Mapping[Storage, ExactIndex],
    query: Tensor,
    mask: Tensor | None,
    sizes: Sizes,
    at: str,
    least: Mapping[Storage, float],
    is_barred: bool,
) -> Iterator[Row]:
    """All ways in turn; where every row is eligible, beside the ceilings too, with the bars if `is_barred`."""
    vectors = indexes["float32"].vectors

    def plain() -> object:
        similarity = query @ vectors.T
        return (similarity if mask is None else similarity.masked_fill_(~mask, -torch.inf)).topk(K)

    ways: dict[str, Callable[[], object]] = {
        PLAIN: plain,
        "torch scan": partial(scan_by_torch, vectors, None, query, K, mask),
        **{storage: partial(index.search, query, K, mask) for storage, index in indexes.items()},
    }
    if mask is not None:
        rows = mask.nonzero().squeeze(1)
        ways["float32, given as rows"] = partial(indexes["float32"].search, query, K, rows)
    times = dict(zip(ways, _in_turn(sizes.calls, list(ways.values())), strict=True))
    of_plain = float(np.median(times[PLAIN]))
    for name, taken in times.items():
        over_plain = None if name == PLAIN else float(np.median(taken)) / of_plain
        yield Row.timed(f"{name}, {at}", taken, sizes.items, "" if name == PLAIN else PLAIN, over_plain)
    if mask is not None:
        return
    for storage in indexes:
        took = float(np.median(times[storage]))
        over, faster = took / least[storage], of_plain / took
        row = Row.of(f"{storage}, {at}: over the ceiling", over, "x, less is better", sizes.items)
        yield replace(row, bar=MOST_OVER_CEILING, holds=over <= MOST_OVER_CEILING) if is_barred else row
        row = Row.of(f"{storage}, {at}: faster than {PLAIN}", faster, "x, more is better", sizes.items)
        yield replace(row, bar=LEAST_FASTER, holds=faster >= LEAST_FASTER) if is_barred else row


def _recalls(indexes: Mapping[Storage, ExactIndex], query: Tensor) -> Iterator[Row]:
    exact = indexes["float32"].search(query, K, None).rows.numpy()
    for storage in ("bfloat16", "int8"):
        found = indexes[storage].search(query, K, None).rows.numpy()
        shares = [len(np.intersect1d(a, b)) / len(a) for a, b in zip(exact, found, strict=True)]
        yield Row.of(f"{storage}: recall@{K:,} of float32", float(np.mean(shares)), "share, more is better", len(exact))


def _bytes(index: ExactIndex) -> int:
    return index.vectors.nbytes + (0 if index.scales is None else index.scales.nbytes)


def _in_turn(calls: int, works: Sequence[Callable[[], object]]) -> list[list[float]]:
    """Milliseconds of each of the works, called in turn so that all see the same machine; first calls do not count."""
    rounds = [[times_ms(work, 1, warm_up=int(call == 0))[0] for work in works] for call in range(calls)]
    return [list(times) for times in zip(*rounds, strict=True)]


@contextmanager
def _threads(num: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(num)
    try:
        yield
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    run("retrieval_scan", __doc__, measure)
