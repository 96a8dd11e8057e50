"""Exhaustive retrieval on a device, and a whole request in one graph: targeting, retrieval, ranking, rules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from benchmarks.device_graphs import Captured, made
from benchmarks.device_rows import Bench
from benchmarks.machine import times_ms
from benchmarks.result import Row
from benchmarks.scorer_eligibility import ASKED, Audience
from benchmarks.scorer_whole import DIM
from benchmarks.scorer_world import SEED, WINNERS
from prerank.index.exact import ExactIndex
from prerank.kernels.eligible_mask import eligible_mask
from prerank.kernels.scan import scan_top_k
from prerank.serve.device_buckets import Buckets
from prerank.serve.device_counts import Counts
from prerank.serve.device_graphs import Graphs
from prerank.serve.device_ground import Ground
from prerank.serve.device_replica import Replica
from prerank.serve.device_retrieval import Retrieval, RetrievalReplica
from prerank.serve.device_sought import Chosen, Sought
from prerank.serve.device_times import Times
from prerank.serve.device_updates import Updates
from prerank.serve.device_whole import DeviceWhole
from prerank.types import Features

MATMUL = "matmul + topk"
_ALIKE = 0.98  # of the rows found: rounding and ties at the last place leave as many


def retrieval_rows(bench: Bench) -> Iterator[Row]:
    """The most similar of all items that are eligible, by the kernels and by a product and topk."""
    audience, num, keep = _audience(bench), bench.sizes.items, bench.sizes.small
    chosen, starts, inverted = audience.targeting.choose(audience.profile(), {}, 0)
    vectors = torch.randn(num, DIM, generator=torch.Generator().manual_seed(SEED))
    given = {"query": torch.randn(1, DIM), "chosen": chosen, "starts": starts, "inverted": inverted}
    medians: dict[str, float] = {}
    wanted: set[int] = set()
    for storage in ("bfloat16", "int8"):
        index = ExactIndex(vectors, storage)
        works = {"scan": partial(_scanned, keep)}
        if storage == "bfloat16":
            works = {MATMUL: partial(_multiplied, keep), **works}
        num_bytes = index.vectors.nbytes + (0 if index.scales is None else index.scales.nbytes)
        least = bench.roofline.least_ms(num_bytes + _bitmap_bytes(audience) + 12 * keep, 0)
        yield Row.of(f"retrieval, {storage}: the least its bytes could take", least, "ms", num)
        for name, work in works.items():
            graph = _graph(bench, audience, index, work, given)
            found = set(graph(given)["rows"][0].tolist()) - {-1}
            wanted = wanted or found
            if storage == "bfloat16" and len(found & wanted) < _ALIKE * len(wanted):
                raise RuntimeError(f"{name}: finds {len(found & wanted)} of the {len(wanted)} rows of {MATMUL}")
            what = f"retrieval, {storage}, targeting, top {keep:,}, {name}"
            spent = times_ms(partial(graph, given), bench.sizes.calls)
            medians[f"{storage} {name}"] = float(np.median(spent))
            yield Row.timed(what, spent, num)
            alone = times_ms(graph.replay, bench.sizes.calls)
            yield Row.timed(f"{what}: the graph alone", alone, num)
            over = Row.of(f"{what}: the graph alone over the least", float(np.median(alone)) / least, "times", num)
            yield over.within(2) if name == "scan" else over
    ratio = medians["bfloat16 scan"] / medians[f"bfloat16 {MATMUL}"]
    yield Row.of(f"retrieval, bfloat16: scan over {MATMUL}", ratio, "times", num, MATMUL, ratio)


def whole_rows(bench: Bench) -> Iterator[Row]:
    """A user's features to winners, one request at a time."""
    audience, keep = _audience(bench), bench.sizes.small
    vectors = torch.randn(bench.sizes.items, DIM, generator=torch.Generator().manual_seed(SEED))
    index, requests = ExactIndex(vectors, "bfloat16"), bench.asked(keep)
    retrieval, device = Retrieval(audience.targeting, index, keep), bench.device

    def tables() -> Updates:
        replica = Replica(bench.world.scorer, device, torch.bfloat16)
        return Updates(device, replica, RetrievalReplica(retrieval, device))

    updates, buckets, counts = made(device, tables), Buckets(), Counts()
    ground = Ground(device, device.stream(), updates, buckets, Times(buckets), counts)
    whole = DeviceWhole(0, ground, requests[0].user_side, WINNERS, Graphs(device, counts), device.stream())
    chosen = Chosen(*audience.targeting.choose(audience.profile(), {}, 0))
    sought = Sought(torch.randn(1, DIM), chosen, torch.zeros(0, dtype=torch.int64))
    works = [partial(whole.rank, one.user_side, sought, WINNERS) for one in requests]
    if not all(bool(work().valid.any()) for work in works):
        raise RuntimeError("a whole request has no winners, so nothing was ranked")
    read = index.vectors.nbytes + _bitmap_bytes(audience) + bench.num_bytes(keep)
    least = bench.roofline.least_ms(read, keep * bench.world.flops)
    yield Row.of(bench.called("roofline of targeting, retrieval, ranking and rules", keep), least, "ms", keep)
    rounds = max(1, bench.sizes.calls // len(works))
    spent = [ms for _ in range(rounds) for work in works for ms in times_ms(work, 1, warm_up=0)]
    row = Row.timed(bench.called("targeting, retrieval, ranking and rules in one graph", keep), spent, keep)
    yield row.within(2.0, "p90_ms")


def _audience(bench: Bench) -> Audience:
    return Audience.draw(bench.sizes.items, np.random.default_rng(SEED))


def _bitmap_bytes(audience: Audience) -> int:
    return int(audience.targeting.bitmaps.shape[1]) * 8 * sum(map(len, ASKED.values()))


def _graph(
    bench: Bench,
    audience: Audience,
    index: ExactIndex,
    work: Callable[[Tensor, Tensor | None, Tensor, Tensor], Tensor],
    like: Features,
) -> Captured:
    where = bench.device.where
    scales = None if index.scales is None else made(bench.device, partial(index.scales.to, where))
    bitmaps, vectors = (
        made(bench.device, partial(one.to, where)) for one in (audience.targeting.bitmaps, index.vectors)
    )
    num = audience.targeting.num_items

    def whole(given: Features) -> Features:
        mask = eligible_mask(bitmaps, given["chosen"], given["starts"], given["inverted"], num)
        return {"rows": work(vectors, scales, given["query"], mask)}

    return Captured(bench.device, whole, like)


def _scanned(keep: int, vectors: Tensor, scales: Tensor | None, query: Tensor, mask: Tensor) -> Tensor:
    return scan_top_k(vectors, scales, query, keep, mask)[1]


def _multiplied(keep: int, vectors: Tensor, scales: Tensor | None, query: Tensor, mask: Tensor) -> Tensor:
    assert scales is None
    similarity = query.to(vectors.dtype) @ vectors.T
    best = similarity.masked_fill(~mask, -torch.inf).topk(keep)
    return best.indices.masked_fill(best.values.isinf(), -1)
