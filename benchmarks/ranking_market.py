"""How near does each ranker come to the true probability of a click, and when does a model a segment pay?

The simulated market. Part a: rankers of about equal weights outside the tables, three seeds, trained on clicks, against
the truth on the test day's impressions and on random ads for 500 users; beside them oracles that know some terms of the
truth exactly, and what no dot product can hold. Part b: one ranker for all surfaces against one a surface, at three
numbers of training impressions a surface, one seed. Two processes of one thread each.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow.parquet as pq
import torch

from benchmarks.machine import REPOSITORY, say
from benchmarks.market import _Log
from benchmarks.market_truth import (
    View,
    interval_rows,
    judged_rows,
    log_order,
    logit_of,
    paired_rows,
    pairs,
    parts,
    rank_rows,
    references,
    taken,
)
from benchmarks.ranking_world import home_of_trainings, num_weights
from benchmarks.result import Row
from benchmarks.run import Measured, Options, run
from prerank.config import Config, Segments, load_config
from prerank.data.logs import open_tables
from prerank.evaluate.judge import predict
from prerank.market.generate import MarketTruth, generate_market
from prerank.market.marginals import SURFACES
from prerank.metrics.bootstrap import difference_interval, interval_of
from prerank.models.ranker import Ranker
from prerank.train.candidates import Retrieved, one_event_a_user
from prerank.train.prepare import Prepared, prepare
from prerank.train.ranking import Impressions, train_ranker
from prerank.train.segments import own_codes, train_segments
from prerank.types import Array

BASE, PLAIN, FULL, TWICE = "mmoe_dcn", "cross_feature, no crossings", "cross_feature", "twice the epochs"
DOT = "knows context, biases and taste"
PARTS = ("a", "b")
SPLIT = (FULL, BASE)  # the rankers of part b, the dearer one first
PAIRS = (
    ("two_tower", BASE), ("mtmd", BASE), ("mtmd", "mtmd without domains"), (f"mtmd, {TWICE}", f"{BASE}, {TWICE}"),
    (f"mtmd, {TWICE}", "mtmd"), (f"{BASE}, {TWICE}", BASE), (PLAIN, BASE), (FULL, BASE), (FULL, PLAIN), (FULL, DOT),
)  # fmt: skip
ALL, OWN, OVER = "one for all", "its own", "its own over one for all"


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything; `segments` has the batch by the training impressions a surface of part b."""

    num_ads: int = 100_000
    impressions: int = 1_200_000
    seeds: tuple[int, ...] = (7, 8, 9)
    questions: int = 500
    candidates: int = 200
    split_impressions: int = 21_000_000  # so that the smallest surface has a million in the training days
    segments: Mapping[int, int] = field(default_factory=lambda: {1_000_000: 1024, 150_000: 512, 15_000: 128})
    split_test: int = 200_000
    draws: int = 300


QUICK = Sizes(15_000, 32_000, (7,), 50, 40, 40_000, {1_000: 256, 300: 128}, 2_000, 20)


def models(config: Config) -> dict[str, Config]:
    """The funnel of each ranker; widths and experts are set for about equal weights outside the tables."""
    config = replace(config, heavy_ranker=None, segments=None)
    plain = replace(config.ranker, domain="", tables="own", patience=0)
    rankers = {
        FULL: replace(plain, model="cross_feature"),
        PLAIN: replace(plain, model="cross_feature", crossings=(), hidden=(174,)),
        BASE: replace(plain, model="mmoe_dcn", experts=2, hidden=(174,)),
        "mtmd": replace(plain, model="mtmd", domain="surface", hidden=(37,)),
        "mtmd without domains": replace(plain, model="mtmd", hidden=(56,)),
        "two_tower": replace(plain, model="two_tower", hidden=(206,)),
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
    """What one training gave: two arrays of probabilities, its seconds, and a ranker's weights outside the tables."""

    probs: tuple[Array, ...]
    seconds: float
    weights: int


def measure(options: Options, ceilings: Mapping[str, float]) -> Measured:
    sizes, part = QUICK if options.quick else Sizes(), options.only or PARTS
    sizes = replace(sizes, seeds=options.seeds or sizes.seeds)
    config = load_config(REPOSITORY / "funnel.toml")
    rows: list[Row] = []
    with home_of_trainings(options) as home, ProcessPoolExecutor(2, get_context("spawn"), one_thread) as pool:
        several: dict[tuple[str, int], Future[Told]] = {}
        if "b" in part:  # the longest first, so that no process ends alone with one
            say(f"ranking_market: a market of {sizes.split_impressions:,} impressions")
            wide = World.make(config, home, sizes.num_ads, sizes.split_impressions)
            several |= {(name, num): pool.submit(split, wide, sizes, name, num) for num, name in _splits(sizes)}
        if "a" in part:
            say(f"ranking_market: a market of {sizes.impressions:,} impressions")
            world = World.make(config, home, sizes.num_ads, sizes.impressions)
            each = [(name, seed) for name in models(config) for seed in sizes.seeds]
            several |= {job: pool.submit(judged, world, sizes, *job) for job in each}
        told = {job: _said(job, one) for job, one in several.items()}
        if "a" in part:
            rows += truth_rows(world, sizes, {name: [told[name, s] for s in sizes.seeds] for name in models(config)})
        if "b" in part:
            rows += split_rows(wide, sizes, told)
    said = {name: one.to_dict()["ranker"] for name, one in models(config).items()}
    return Measured(rows, {**asdict(sizes), "part": "".join(part), "seed": config.seed, "rankers": said})


def one_thread() -> None:
    """Of each process, where several train at once."""
    torch.set_num_threads(1)


def _said(job: tuple[str, int], one: Future[Told]) -> Told:
    told = one.result()
    say(f"ranking_market: {job[0]}, {job[1]}: {told.seconds:.0f} s")
    return told


def judged(world: World, sizes: Sizes, name: str, seed: int) -> Told:
    """One ranker of part a, and its probabilities of impressions [P] and of candidates [Q N]."""
    config, prepared = replace(models(world.config)[name], seed=seed), world.prepared()
    ranker, epochs = train_ranker(prepared, config, *world.work(config.to_dict()))
    test = Impressions(prepared, config, np.flatnonzero(prepared.of_days(config.data.days("test"))))
    found = predict(ranker, test, ask(world.config, prepared, sizes))
    assert found.candidates is not None
    return Told((found.winners[:, 0], found.candidates[..., 0].ravel()), _seconds(epochs), num_weights(ranker))


def _seconds(epochs: Sequence[Mapping[str, float]]) -> float:
    return sum(epoch["seconds"] for epoch in epochs)


def ask(config: Config, prepared: Prepared, sizes: Sizes) -> Retrieved:
    """The first moment on the test day of some users, each asked about the same random ads, eligible or not."""
    events = one_event_a_user(prepared, config.data.days("test"), sizes.questions, config.seed)
    draw = np.random.default_rng(config.seed)
    items = draw.choice(len(prepared.item_ids), sizes.candidates, replace=False).astype(np.int32)
    rows = np.tile(items, (len(events), 1))
    return Retrieved(events, rows, rows >= 0)


def truth_rows(world: World, sizes: Sizes, told: Mapping[str, Sequence[Told]]) -> Iterator[Row]:
    """Every row of part a; `told` are the seeds of each ranker."""
    say("ranking_market: the truth beside them")
    config, prepared, truth = world.config, world.prepared(), MarketTruth.load(world.folder)
    log = taken(_Log.read(truth, world.folder), log_order(world.folder, prepared))
    train, test = (taken(log, np.flatnonzero(prepared.of_days(config.data.days(d)))) for d in ("train", "test"))
    asked = pairs(truth, prepared, log, ask(config, prepared, sizes))
    known = references(truth, train, test, asked)
    shown, drawn = known.pop("truth")
    views = [
        View(shown, test.user, parts(truth, test), test.label),
        View(drawn, asked.user, {"candidates": np.arange(len(drawn))}),
    ]
    probs = {name: [np.stack([one.probs[k] for one in runs]) for k in (0, 1)] for name, runs in told.items()}
    probs |= {name: [prob[None] for prob in both] for name, both in known.items()}
    for name, runs in told.items():
        yield Row.of(f"{name}: weights outside the tables", runs[0].weights, "weights")
        yield Row.of(f"{name}: training, one thread", float(np.mean([one.seconds for one in runs])), "s", len(runs))
    for name, both in probs.items():
        for view, prob in zip(views, both, strict=False):
            yield from judged_rows(name, prob, view, in_full=name in told)
    areas = {name: views[0].areas(probs[name][0], sizes.draws) for name in (*told, DOT)}
    for ours, theirs in PAIRS:
        for view, mine, other in zip(views, probs[ours], probs[theirs], strict=True):
            yield from paired_rows(f"{ours} over {theirs}", mine, other, view, sizes.draws)
        more = interval_of(areas[ours] - areas[theirs])
        yield from interval_rows(f"{ours} over {theirs}, impressions, AUC", more, "AUC", len(shown))
    yield from rank_rows(truth, config.ranker.dim, logit_of(drawn).reshape(-1, sizes.candidates), probs)


def _splits(sizes: Sizes) -> list[tuple[int, str]]:
    return [(num, name) for num in sizes.segments for name in SPLIT]


def split(world: World, sizes: Sizes, name: str, num: int) -> Told:
    """One ranker for all surfaces and one a surface, by `num` training impressions of each: probabilities [P] of both.

    That for all is the segmented ranker's own common one, of all these impressions together.
    """
    prepared, config = world.prepared(), models(world.config)[name]
    options = replace(config.ranker, batch=sizes.segments[num])
    config = replace(config, ranker=options, segments=Segments(by="surface", own=SURFACES, least=1))
    events = np.concatenate(list(learnt(config, prepared, num).values()))
    where = world.work(config.to_dict(), num)
    # what learns them is gone before the test's are made: either is gigabytes of a large log
    ranker, epochs = train_segments(
        prepared, config, *where, events, Impressions(prepared, config, events), lambda _: lambda _: {}
    )
    test = Impressions(prepared, config, tested(config, prepared, sizes))
    common = cast("Ranker", ranker.rankers[0])
    return Told(tuple(test.predict(one)[:, 0] for one in (common, ranker)), _seconds(epochs), num_weights(common))


def learnt(config: Config, prepared: Prepared, num: int) -> dict[str, Array]:
    """`num` random training impressions of each surface, all where there are fewer -> positions int64 by surface."""
    days = prepared.of_days(config.data.days("train"))
    found = {}
    for name, code in codes(prepared).items():
        rows = np.flatnonzero(days & (prepared.events["surface"] == code))
        found[name] = np.sort(np.random.default_rng(config.seed).permutation(rows)[:num])
    return found


def tested(config: Config, prepared: Prepared, sizes: Sizes) -> Array:
    """The impressions of the test day that part b judges on, drawn at random -> positions int64."""
    rows = np.flatnonzero(prepared.of_days(config.data.days("test")))
    drawn: Array = np.sort(np.random.default_rng(config.seed).permutation(rows)[: sizes.split_test])
    return drawn


def codes(prepared: Prepared) -> dict[str, int]:
    """The prepared code of each surface."""
    return own_codes(prepared, Segments(by="surface", own=SURFACES))


def split_rows(world: World, sizes: Sizes, told: Mapping[tuple[str, int], Told]) -> Iterator[Row]:
    """Every row of part b, by ranker and training impressions a surface; a row's n is that surface's."""
    say("ranking_market: the truth of the segments")
    config, prepared = world.config, world.prepared()
    events = tested(config, prepared, sizes)
    place = log_order(world.folder, prepared)[events]
    prob = pq.read_table(world.folder / "truth.parquet", columns=["click_prob"])["click_prob"].to_numpy()[place]
    label, surface = prepared.happened("is_click")[events].astype(np.int64), prepared.events["surface"][events]
    where = {"all surfaces": np.arange(len(events))}
    where |= {name: np.flatnonzero(surface == code) for name, code in codes(prepared).items()}
    for num, name in _splits(sizes):
        rows = {part: len(some) for part, some in learnt(config, prepared, num).items()}
        rows["all surfaces"] = sum(rows.values())
        yield Row.of(f"{name}, {num:,} a surface: training both, one thread", told[name, num].seconds, "s")
        for part, at in where.items():
            view = View(prob[at], np.asarray(prepared.events["user"])[events[at]], {}, label[at])
            common, own = (one[None, at] for one in told[name, num].probs)
            said = f"{name}, {num:,} a surface, {part}"
            for metric, of in (("KL", view.divergence), ("log loss", view.loss)):
                yield Row.of(f"{said}, {ALL}, {metric}", float(of(common).mean()), "nats", rows[part])
                yield Row.of(f"{said}, {OWN}, {metric}", float(of(own).mean()), "nats", rows[part])
            found = difference_interval(view.divergence(own), view.divergence(common), view.user, 0, sizes.draws)
            yield from interval_rows(f"{said}, {OVER}, KL", found, "nats", len(at))


if __name__ == "__main__":
    run("ranking_market", __doc__, measure, parts=PARTS, keeps=True)
