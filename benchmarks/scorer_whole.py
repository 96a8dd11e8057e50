"""Eligibility, retrieval, ranking, rules over a million items: each stage, all of it, and the straightforward way."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from threading import Event, Thread

import numpy as np
import pyarrow as pa
import torch

from benchmarks.machine import times_ms
from benchmarks.result import Row
from benchmarks.scorer_eligibility import ASKED, Audience, eligibility_rows
from benchmarks.scorer_world import WINNERS, Drawn
from prerank.bundle.item_table import ItemTable
from prerank.bundle.scorer import Scorer
from prerank.business.diversity import Diversity
from prerank.business.live import LiveItems
from prerank.business.utility import Utility
from prerank.config import DiversityRule, UtilityTerm
from prerank.index.exact import ExactIndex
from prerank.kernels.engine import Engine
from prerank.kernels.greedy import greedy_top_k
from prerank.types import Array, CandidateSet, Given, ItemChange

KEEP, DIM = 10_000, 64
LEAVING = 100  # fewer than the least candidates, of which rules leave some out
CAPS = {"advertiser": 5, "creative": 1, "campaign": 20}


def whole_rows(world: Drawn, gflop_s: float, copy_gb_s: float, calls: int) -> Iterator[Row]:
    """Bars are of a million items and two cores."""
    stages = _Stages(world)
    profile = stages.audience.profile()
    yield from eligibility_rows(stages.audience, copy_gb_s, calls)
    yield from _greedy(stages, calls)
    yield from _leaving(stages)
    sizes = {KEEP: "10,000", 10 * KEEP: "100,000"}
    for num, name in sizes.items():
        if num > stages.num_eligible(profile):
            continue
        parts = stages.parts(profile, num)
        slow = 3 if num > KEEP else max(3, calls // 8)
        times = {part: times_ms(work, calls) for part, work in parts.items()}
        plain = times_ms(partial(stages.straightforward, num), slow, warm_up=1)
        whole = float(np.median(times["whole"]))
        for part, spent in times.items():
            yield Row.timed(f"Scorer, {name} candidates: {part}", spent, num)
        yield Row.timed(f"straightforward, {name} candidates", plain, num)
        ratio = Row.of(f"Scorer over straightforward, {name} candidates", whole / float(np.median(plain)), "times", num)
        yield _bar(ratio, 1 / 8)
        if num == KEEP:
            least = stages.least_ms(gflop_s, copy_gb_s)
            yield Row.of("Scorer, 10,000 candidates: the least its stages could take", least, "ms", num)
            yield _bar(Row.of("Scorer, 10,000 candidates: over that", whole / least, "times", num), 1.3)
    yield from _changing(stages, profile, calls)
    stages.engine.close()


def _leaving(stages: _Stages) -> Iterator[Row]:
    """Bytes of the memory behind what a request returns: the winners', and nothing of a candidate that lost."""
    first = 0
    for num in (1_000, 10_000, 100_000):
        rows = torch.randint(stages.targeting.num_items, (1, num))
        candidates = CandidateSet(rows, torch.zeros(rows.shape), torch.ones_like(rows, dtype=torch.bool))
        ranked = stages.scorer(stages.world.user, candidates, LEAVING)
        held = sum(getattr(ranked, field.name).untyped_storage().nbytes() for field in fields(ranked))
        first = first or held
        row = Row.of(f"Scorer, {num:,} candidates: bytes that leave with {LEAVING} winners", held, "bytes", num)
        yield replace(row, bar=first, holds=held == first)


def _changing(stages: _Stages, profile: Mapping[str, Given], calls: int) -> Iterator[Row]:
    """The whole at 10,000 candidates, by turns while a thread changes 1,000 items a second and while none does."""
    work, num = stages.parts(profile, KEEP)["whole"], stages.targeting.num_items
    quiet: list[float] = []
    busy: list[float] = []
    for turn in range(8):
        if turn % 2:
            with _changes(stages.scorer.live, num):
                busy += times_ms(work, max(2, calls // 4))
        else:
            quiet += times_ms(work, max(2, calls // 4))
    yield Row.timed("Scorer, 10,000 candidates: whole, while 1,000 items a second change", busy, KEEP)
    over = Row.of("Scorer: p50 while items change over p50 without", float(np.median(busy) / np.median(quiet)), "times")
    yield _bar(over, 1.05)


@contextmanager
def _changes(live: LiveItems, num: int) -> Iterator[None]:
    """In calls of ten, a hundred a second."""
    done, made = Event(), np.random.default_rng(7)

    def run() -> None:
        while not done.wait(0.01):
            rows = made.integers(0, num, 10).tolist()
            live.change(rows, [ItemChange(row, on=True, values={"bid_micros": 5e5}) for row in rows])

    thread = Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def drawn_diversity(world: Drawn, made: np.random.Generator) -> Diversity:
    """Of each item its advertiser, a creative that two items or so share, and a campaign of fifty."""
    num = len(world.items["price"])
    groups = {"advertiser": world.items["advertiser"].numpy(), "creative": made.integers(0, num // 2, num)}
    groups["campaign"] = made.integers(0, num // 50, num)
    return Diversity.build({n: DiversityRule(m) for n, m in CAPS.items()}, pa.table(groups))


def drawn_scorer(world: Drawn, diversity: Diversity) -> Scorer:
    """The world's items and ranker; a click is worth the bid."""
    columns = {name: tensor.numpy() for name, tensor in world.items.items()}
    utility = Utility.build(world.ranker.tasks, {"click": UtilityTerm("bid_micros")})
    items = ItemTable.build(np.arange(len(world.items["price"])), columns)
    return Scorer(items, world.ranker, utility, world.item_side, diversity).eval()


class _Stages:
    """The whole of a request over the items of a world."""

    def __init__(self, world: Drawn) -> None:
        num, made = len(world.items["price"]), np.random.default_rng(7)
        self.world = world
        self.audience = Audience.draw(num, made)
        self.targeting = self.audience.targeting
        self.masks = list(self.audience.masks().values())  # the straightforward way's index
        self.diversity = drawn_diversity(world, made)
        self.scorer = drawn_scorer(world, self.diversity)
        self.index = ExactIndex(torch.randn(num, DIM), "bfloat16")
        self.query = torch.randn(1, DIM)
        self.engine = Engine(len(os.sched_getaffinity(0)))
        self.scorer.accelerate(self.engine)

    def num_eligible(self, profile: Mapping[str, Given]) -> int:
        """Of all items."""
        return len(self.targeting.rows(profile, {}, 0))

    def parts(self, profile: Mapping[str, Given], num: int) -> dict[str, Callable[[], object]]:
        """Each stage on what the one before gave, and all of them."""
        rows = self.targeting.rows(profile, {}, 0)
        found = self.index.search(self.query, num, rows)

        def whole() -> object:
            eligible = self.targeting.rows(profile, {}, 0)
            return self.scorer(self.world.user, self.index.search(self.query, num, eligible), WINNERS)

        return {
            "eligibility": partial(self.targeting.rows, profile, {}, 0),
            "retrieval": partial(self.index.search, self.query, num, rows),
            "ranking, utility, rules, top 1,000": partial(self.scorer, self.world.user, found, WINNERS),
            "whole": whole,
        }

    def least_ms(self, gflop_s: float, copy_gb_s: float) -> float:
        """Bitmaps and vectors at the copy's bytes a second, the ranker's arithmetic at a product's rate."""
        read = self.targeting.bitmaps.shape[1] * 8 * sum(map(len, ASKED.values())) + self.index.vectors.nbytes
        flops = self.world.ranker.program().flops * KEEP
        return read / copy_gb_s / 1e6 + flops / gflop_s / 1e6

    def straightforward(self, num: int) -> list[int]:
        """Booleans in numpy, a product and topk, eager float32 over gathered features, scores out, rules in Python."""
        user, items = self.world.user, self.world.items
        mask = torch.from_numpy(np.logical_and.reduce(self.masks))
        similar = (self.query @ self.index.vectors.float().T)[0].masked_fill(~mask, -torch.inf)
        rows = similar.topk(num).indices
        ranker = self.world.ranker
        side = ranker.item_side({name: column[rows] for name, column in items.items()})
        logits = ranker(ranker.user_side(user), {name: tensor.unsqueeze(0) for name, tensor in side.items()})
        worth = (logits[0, :, 0].sigmoid() * items["bid_micros"][rows]).numpy()
        return plain_greedy(worth, rows.numpy(), self.diversity.codes[rows].numpy(), WINNERS)


def _greedy(stages: _Stages, calls: int) -> Iterator[Row]:
    num = min(100_000, stages.targeting.num_items)
    rows = torch.randperm(stages.targeting.num_items)[:num][None]
    worth, valid = torch.rand(1, num), torch.ones(1, num, dtype=torch.bool)
    groups, at_most = stages.diversity(rows), stages.diversity.at_most
    work = partial(greedy_top_k, worth, rows, valid, groups, at_most, WINNERS)
    codes = stages.diversity.codes[rows[0]].numpy()
    plain = partial(plain_greedy, worth[0].numpy(), rows[0].numpy(), codes, WINNERS)
    assert rows[0][work()[0]].tolist() == plain()
    ours, pythons = times_ms(work, calls), times_ms(plain, max(3, calls // 8))
    row = Row.timed("greedy top 1,000 of 100,000, three rules", ours, num)
    yield replace(row, bar=3.0, holds=bool((row.value or 0.0) < 3.0))
    yield Row.timed("the same in plain Python", pythons, num)
    yield _bar(Row.of("greedy over plain Python", float(np.median(ours) / np.median(pythons)), "times", num), 1 / 10)


def plain_greedy(worth: Array, rows: Array, codes: Array, k: int) -> list[int]:
    """The rows of the k best, at most so many of a group: worth [N], rows int64 [N], codes int32 [N, G]."""
    held = [Counter[int]() for _ in CAPS]
    won: list[int] = []
    for place in np.lexsort((rows, -worth)):
        own = codes[place].tolist()
        if all(count[code] < most for count, code, most in zip(held, own, CAPS.values(), strict=True)):
            won.append(int(rows[place]))
            for count, code in zip(held, own, strict=True):
                count[code] += 1
            if len(won) == k:
                break
    return won


def _bar(row: Row, at_most: float) -> Row:
    return replace(row, bar=round(at_most, 4), holds=bool((row.value or 0.0) <= at_most))
