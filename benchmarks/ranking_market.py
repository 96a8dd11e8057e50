"""How near does each ranker come to the true probability of a click, and when does a model a segment pay?

The simulated market. Part a: rankers of about equal weights outside the tables, three seeds, trained on clicks, against
the truth on the test day's impressions and on random ads for 500 users; beside them oracles that know some terms of the
truth exactly, and what no dot product can hold. Part b: one ranker for all surfaces against one a surface, at three
numbers of training impressions a surface, one seed. Two processes of one thread each. PRERANK_BENCHMARK_PART=a or b
runs one part, PRERANK_BENCHMARK_STORE names a folder that keeps markets and trainings.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import cast

import numpy as np
import pyarrow.parquet as pq
import torch

from benchmarks.machine import REPOSITORY, say
from benchmarks.market import KNOWS, _Log, _ranks
from benchmarks.market_truth import (
    View,
    interval_rows,
    judged_rows,
    log_order,
    logit_of,
    pair_error,
    paired_rows,
    pairs,
    parts,
    references,
    seed_rows,
    taken,
)
from benchmarks.ranking_quality import num_weights
from benchmarks.result import Row
from benchmarks.run import Measured, Options, run
from prerank.config import Config, Segments, load_config
from prerank.data.logs import open_tables
from prerank.evaluate.judge import predict
from prerank.market.generate import MarketTruth, best_rank_error, generate_market
from prerank.market.marginals import SURFACES
from prerank.metrics.bootstrap import difference_interval
from prerank.models.ranker import Ranker
from prerank.models.segmented import SegmentedRanker
from prerank.train.candidates import Retrieved, one_event_a_user
from prerank.train.prepare import Prepared, prepare
from prerank.train.ranking import Impressions, train_ranker
from prerank.train.segments import own_codes, train_segments
from prerank.types import Array

BASE, EARLY, FULL, TWICE = "mmoe_dcn", "cross_feature, early crossing alone", "cross_feature", "twice the epochs"
DOT = "knows context, biases and taste"
SPLIT = (FULL, BASE)  # the rankers of part b, the dearer one first
PAIRS = (
    ("two_tower", BASE), ("mtmd", BASE), ("mtmd", "mtmd without domains"), (f"mtmd, {TWICE}", f"{BASE}, {TWICE}"),
    (f"mtmd, {TWICE}", "mtmd"), (f"{BASE}, {TWICE}", BASE), (EARLY, BASE), (FULL, BASE), (FULL, EARLY), (FULL, DOT),
)  # fmt: skip
ALL, OWN, OVER = "one for all", "its own", "its own over one for all"


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything; `segments` are (training impressions a surface, batch) of part b, the largest first."""

    num_ads: int = 100_000
    impressions: int = 1_200_000
    seeds: tuple[int, ...] = (7, 8, 9)
    questions: int = 500
    candidates: int = 200
    split_impressions: int = 21_000_000  # so that the smallest surface has a million in the training days
    segments: tuple[tuple[int, int], ...] = ((1_000_000, 2048), (150_000, 512), (15_000, 128))
    split_test: int = 200_000
    draws: int = 300


QUICK = Sizes(15_000, 40_000, (7, 8), 50, 40, 50_000, ((1_500, 128), (500, 64)), 2_000, 50)


def models(config: Config) -> dict[str, Config]:
    """The funnel of each ranker; widths and experts are set for about equal weights outside the tables."""
    config = replace(config, heavy_ranker=None, segments=None)
    plain = replace(config.ranker, domain="", tables="own", patience=0)
    rankers = {
        FULL: replace(plain, model="cross_feature"),
        EARLY: replace(plain, model="cross_feature", crossings=(), hidden=(216,)),
        BASE: replace(plain, model="mmoe_dcn", experts=2, hidden=(70,)),
        "mtmd": replace(plain, model="mtmd", domain="surface", hidden=(31,)),
        "mtmd without domains": replace(plain, model="mtmd", hidden=(46,)),
        "two_tower": replace(plain, model="two_tower", hidden=(176,)),
    }
    rankers |= {f"{name}, {TWICE}": replace(rankers[name], epochs=2 * plain.epochs) for name in (BASE, "mtmd")}
    return {name: replace(config, ranker=ranker) for name, ranker in rankers.items()}


@dataclass(frozen=True, slots=True)
class World:
    """A market on disk, and a funnel over it."""

    config: Config
    folder: Path

    @classmethod
    def make(cls, config: Config, home: Path, num_ads: int, num_impressions: int) -> World:
        """Generated and prepared under `home`, unless it was before."""
        folder = home / f"market-{num_ads}-{num_impressions}"
        if not (folder / "market.json").exists():
            generate_market(folder, num_ads=num_ads, num_impressions=num_impressions)
        world = cls(config, folder)
        world.prepared()
        return world

    def prepared(self) -> Prepared:
        """The prepared arrays, memory-mapped."""
        return prepare(self.config, open_tables(self.config, self.folder, self.folder), self.folder / "work")

    def work(self, *said: object) -> tuple[Path, str]:
        """The folder and the identity of the training that is told by what is `said`."""
        key = hashlib.sha256(json.dumps([torch.__version__, *said], sort_keys=True).encode()).hexdigest()[:16]
        return self.folder / "work" / key, key


@dataclass(frozen=True, slots=True)
class Told:
    """What one training gave: probabilities by what they are of, its seconds, its weights outside the tables."""

    probs: Mapping[str, Array]
    seconds: float
    weights: int


def measure(options: Options, ceilings: Mapping[str, float]) -> Measured:
    sizes, part = QUICK if options.quick else Sizes(), os.environ.get("PRERANK_BENCHMARK_PART", "ab")
    config = load_config(REPOSITORY / "funnel.toml")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with TemporaryDirectory() as kept, ProcessPoolExecutor(2, get_context("spawn"), _one_thread) as pool:
        home = Path(os.environ.get("PRERANK_BENCHMARK_STORE", kept))
        asked: dict[tuple[object, ...], Future[Told]] = {}
        worlds: dict[str, World] = {}
        # the longest first, so that no process is left alone with one at the end
        for one, num in (("b", sizes.split_impressions), ("a", sizes.impressions)):
            if one in part:
                say(f"ranking_market: a market of {num:,} impressions for part {one}")
                worlds[one] = World.make(config, home, sizes.num_ads, num)
                work = JOBS[one](config, sizes)
                asked |= {job: pool.submit(WORK[one], worlds[one], sizes, *job) for job in work}
        told = {}
        for job, future in asked.items():
            told[job] = future.result()
            say(f"ranking_market: {', '.join(str(word) for word in job)}: {told[job].seconds:.0f} s")
        rows = [row for one, world in sorted(worlds.items()) for row in ROWS[one](world, sizes, told)]
    said = {name: one.to_dict()["ranker"] for name, one in models(config).items()}
    return Measured(rows, {**asdict(sizes), "part": part, "seed": config.seed, "rankers": said})


def _one_thread() -> None:
    torch.set_num_threads(1)
