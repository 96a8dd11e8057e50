"""How fast does the training loop train beside a plain PyTorch DataLoader over rows, and which lever pays?

One ranker, mmoe_dcn of examples/kuairand/funnel.toml, on its training days; on a simulated market where there is no
KuaiRand. The plain loop is a Dataset whose `__getitem__` makes one row's features as a dict, default collate, AdamW as
it comes. The ceilings are one batch held in memory going forward and backward again and again, and gathering alone.
All take turns, round by round, in this process; a number is the median of its rounds. Ours is the clock over all of
`run`, its files included; only where a table is large are those left out, for their size would be what is told.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import TypeAlias

import numpy as np
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader, Dataset

from benchmarks.machine import REPOSITORY, say
from benchmarks.result import Row
from benchmarks.run import Measured, Options, run
from prerank.config import Config, RankerConfig, load_config
from prerank.data.logs import open_tables
from prerank.market.generate import generate_market
from prerank.models.ranker import Ranker
from prerank.models.rankers import build_ranker
from prerank.train.loop import run as train
from prerank.train.optimisers import lookup_tables
from prerank.train.plan import Plan
from prerank.train.prepare import Prepared, prepare
from prerank.train.ranking import Batch, Impressions
from prerank.types import Array

KUAIRAND_FUNNEL = REPOSITORY / "examples" / "kuairand" / "funnel.toml"
MARKET_FUNNEL = REPOSITORY / "funnel.toml"
USUAL_BATCH = 512
BAR = 5.0  # times the plain loop's examples a second
LARGE_TABLES = ("item.author_id", "item.campaign_id")  # KuaiRand's and the market's, no history's
READY, GATHER = "forward and backward of a batch in memory", "gathering alone"
PLAIN, PLAIN_OURS = f"DataLoader, batch {USUAL_BATCH}", "DataLoader, our batch"
PLAIN_WORKERS, PLAIN_LARGE = f"{PLAIN}, 2 workers", f"{PLAIN}, large table"
OURS, LARGE, LARGE_SPARSE = "ours", "ours, large table", "ours, large table, sparse tables"

Lever: TypeAlias = Callable[[Plan], Plan]
LEVERS: dict[str, Lever] = {
    "nothing made ahead": lambda plan: replace(plan, prefetch=0),
    "bf16": lambda plan: replace(plan, bf16=True),
    "AdamW not fused": lambda plan: replace(plan, fused=False),
    "sparse tables": lambda plan: replace(plan, sparse=True),
    "averaged": lambda plan: replace(plan, average=0.999),
    f"batch {USUAL_BATCH}": lambda plan: replace(plan, batch=USUAL_BATCH),
    "batch 8,192": lambda plan: replace(plan, batch=8192),
    "bf16, batch 8,192": lambda plan: replace(plan, bf16=True, batch=8192),
}


@dataclass(frozen=True, slots=True)
class Sizes:
    """Examples of a turn of ours (-1 is all), of the plain loop and with a large table; its rows; and rounds."""

    ready_steps: int = 32
    ours: int = 65_536
    plain: int = 16_384
    large_table: int = 1_000_000
    rounds: int = 2
    market_ads: int = 20_000


QUICK = Sizes(ready_steps=16, ours=32_768, plain=2_048, large_table=100_000, rounds=1, market_ads=2_000)


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn: examples a second, and the share of its time spent on waiting for a batch."""

    examples_s: float
    waited: float = math.nan


Turns: TypeAlias = dict[str, list[Turn]]


def measure(options: Options, ceilings: Mapping[str, float]) -> Measured:
    measured = throughput(options.data, QUICK if options.quick else Sizes())
    # a smaller training is not what the bar is asked of
    rows = [replace(row, bar=None, holds=None) if options.quick else row for row in measured.rows]
    return replace(measured, rows=rows)


def throughput(data: Path | None, sizes: Sizes) -> Measured:
    """Every row, with the ceilings; `data` is the folder of KuaiRand, None a simulated market."""
    with TemporaryDirectory() as name:
        say("training_throughput: preparing")
        world = World.build(data, Path(name), sizes)
        works = world.works()
        turns: Turns = {what: [] for what in works}
        for number in range(sizes.rounds):
            for what, work in works.items():
                say(f"training_throughput: round {number + 1} of {sizes.rounds}, {what}")
                turns[what].append(work())
    about = {"funnel": world.config.to_dict(), "threads": torch.get_num_threads(), **asdict(sizes)}
    least = {f"{what.replace(' ', '_')}_examples_s": round(_speed(turns[what])) for what in (READY, GATHER)}
    return Measured(list(_rows(turns, world)), about, least)


class World:
    """One prepared log, the examples of a turn, and every way to train on them."""

    def __init__(self, config: Config, prepared: Prepared, folder: Path, sizes: Sizes) -> None:
        self.config, self.prepared, self.folder, self.sizes = config, prepared, folder, sizes
        events = np.flatnonzero(prepared.of_days(config.data.days("train")))
        self.many = Impressions(prepared, config, _some(events, sizes.ours))
        self.few = Impressions(prepared, config, _some(events, sizes.plain))
        self.runs = 0

    @classmethod
    def build(cls, data: Path | None, folder: Path, sizes: Sizes) -> World:
        """Of KuaiRand in `data`, or of a market made in `folder`."""
        config = load_config(KUAIRAND_FUNNEL if data else MARKET_FUNNEL)
        # counters and rates would need a plain version too, and mmoe_dcn crosses nothing with them
        config = replace(config, features=config.features.lasting(), ranker=RankerConfig(model="mmoe_dcn"))
        if data is None:
            data = folder / "market"
            generate_market(data, num_ads=sizes.market_ads, num_impressions=10 * sizes.market_ads)
        work = folder / "work"
        return cls(config, prepare(config, open_tables(config, data, work), work), folder, sizes)

    def works(self) -> dict[str, Callable[[], Turn]]:
        """A turn of each, by name; the ceilings first."""
        batch = self.config.ranker.batch
        rows = self.prepared.transforms.sizes()
        large = {name: max(self.sizes.large_table, rows[name]) for name in LARGE_TABLES if name in rows}
        found: dict[str, Callable[[], Turn]] = {
            READY: self._ready,
            GATHER: self._gather,
            PLAIN: partial(self._plain, USUAL_BATCH, 0),
            PLAIN_OURS: partial(self._plain, batch, 0),
            PLAIN_WORKERS: partial(self._plain, USUAL_BATCH, 2),
            OURS: self._ours,
        }
        found |= {f"{OURS}, {lever}": partial(self._ours, change) for lever, change in LEVERS.items()}
        found[PLAIN_LARGE] = partial(self._plain, USUAL_BATCH, 0, large)
        found[LARGE] = partial(self._ours, tables=large)
        found[LARGE_SPARSE] = partial(self._ours, LEVERS["sparse tables"], large)
        return found

    def ranker(self, tables: Mapping[str, int] | None = None) -> Ranker:
        """As drawn; `tables` are rows of some that differ from the prepared ones'."""
        torch.manual_seed(self.config.seed)
        return build_ranker(self.config, {**self.prepared.transforms.sizes(), **(tables or {})})

    def _ready(self) -> Turn:
        ranker, num = self.ranker(), self.config.ranker.batch
        chosen, steps = np.random.default_rng(0).permutation(len(self.many.events))[:num], self.sizes.ready_steps
        batch = self.many.batch(chosen)
        _backward(ranker, batch)
        started = perf_counter()
        for _ in range(steps):
            _backward(ranker, batch)
        return Turn(steps * len(chosen) / (perf_counter() - started))

    def _gather(self) -> Turn:
        order, num = np.random.default_rng(0).permutation(len(self.many.events)), self.config.ranker.batch
        started = perf_counter()
        for start in range(0, len(order), num):
            self.many.batch(order[start : start + num])
        return Turn(len(order) / (perf_counter() - started))

    def _plain(self, batch: int, workers: int, tables: Mapping[str, int] | None = None) -> Turn:
        ranker, options = self.ranker(tables), self.config.ranker
        rows = Rows(self.few)
        loader = DataLoader(rows, batch, shuffle=True, num_workers=workers)
        weights = _module(ranker).parameters()
        optimiser = torch.optim.AdamW(weights, options.learning_rate, weight_decay=options.weight_decay)
        waited = 0.0
        started = asked = perf_counter()
        for row in loader:
            waited += perf_counter() - asked
            _backward(ranker, Batch(row["user"], row["item"], row["labels"]))
            optimiser.step()
            asked = perf_counter()
        return Turn(len(rows) / (asked - started), waited / (asked - started))

    def _ours(self, lever: Lever = lambda plan: plan, tables: Mapping[str, int] | None = None) -> Turn:
        ranker, impressions = self.ranker(tables), self.few if tables else self.many
        num = len(impressions.events)
        plan = lever(replace(Plan.of(self.config.ranker, "throughput", num, self.config.seed), epochs=1))
        self.runs += 1
        started = perf_counter()
        [record] = train(
            _module(ranker),
            plan,
            lambda examples, draw: impressions.batch(examples),
            partial(loss_of, ranker),
            self.folder / f"run-{self.runs}",
            lookup_tables=lookup_tables(_module(ranker), self.config.features),
        )
        seconds = record["seconds"] if tables else perf_counter() - started
        return Turn(num / seconds, record["waited_s"] / seconds)


def _module(ranker: Ranker) -> nn.Module:
    assert isinstance(ranker, nn.Module)
    return ranker


def _backward(ranker: Ranker, batch: Batch) -> None:
    for weight in _module(ranker).parameters():
        weight.grad = None
    loss_of(ranker, batch).backward()  # type: ignore[no-untyped-call]


def loss_of(ranker: Ranker, batch: Batch) -> torch.Tensor:
    """As `prerank.train.ranking` has it."""
    return binary_cross_entropy_with_logits(batch.logits(ranker), batch.labels)


class Rows(Dataset[dict[str, object]]):
    """Impressions one by one, as a dataset is commonly written: everything in memory, a history a search in it."""

    def __init__(self, impressions: Impressions) -> None:
        prepared, users = impressions.users.prepared, impressions.users
        self.events, self.labels = impressions.events, impressions.labels.numpy()
        self.log = {name: np.array(prepared.events[name]) for name in ("user", "item", "time_ms", *users.context)}
        self.users = {name: np.array(prepared.users[name]) for name in users.profile}
        self.items = {name: np.array(column) for name, column in prepared.items.items()}
        self.context = users.context
        self.histories = {
            name: (line.offsets, line.time_ms, line.values, users.lengths[name])
            for name, line in users.timelines.items()
        }

    def __len__(self) -> int:
        return len(self.events)

    def __getitem__(self, position: int) -> dict[str, object]:
        event = self.events[position]
        user, item, moment = (self.log[name][event] for name in ("user", "item", "time_ms"))
        features = {name: column[user] for name, column in self.users.items()}
        features |= {name: self.log[name][event] for name in self.context}
        features |= {name: self._history(name, user, moment) for name in self.histories}
        items = {name: column[item] for name, column in self.items.items()}
        return {"user": features, "item": items, "labels": self.labels[position]}

    def _history(self, name: str, user: int, moment: int) -> Array:
        offsets, time_ms, values, length = self.histories[name]
        start, stop = offsets[user], offsets[user + 1]
        end = start + np.searchsorted(time_ms[start:stop], moment)
        taken = values[max(start, end - length) : end]
        out = np.full(length, -1, dtype=np.int32)
        if len(taken):
            out[-len(taken) :] = taken
        return out


def _rows(turns: Turns, world: World) -> Iterator[Row]:
    num, few, batch = len(world.many.events), len(world.few.events), world.config.ranker.batch
    plain, ours, unit = _speed(turns[PLAIN]), _speed(turns[OURS]), "examples/s"
    yield Row.of(f"{READY}, batch {batch:,}", _speed(turns[READY]), unit, num)
    yield Row.of(f"{GATHER}, batch {batch:,}", _speed(turns[GATHER]), unit, num)
    yield Row.of(PLAIN, plain, unit, few)
    for name in (PLAIN_OURS, PLAIN_WORKERS):
        yield Row.of(name, _speed(turns[name]), unit, few, PLAIN, _speed(turns[name]) / plain)
    row = Row.of(f"{OURS}, batch {batch:,}", ours, unit, num, PLAIN, ours / plain)
    yield replace(row, bar=BAR, holds=ours / plain >= BAR)
    yield Row.of(f"{OURS}: of the ceiling", 100 * ours / _speed(turns[READY]), "%", num)
    for name in (PLAIN, PLAIN_OURS, PLAIN_WORKERS, OURS, f"{OURS}, nothing made ahead"):
        waited = float(np.median([turn.waited for turn in turns[name]]))
        yield Row.of(f"{name}: waiting for data", 100 * waited, "%", num if name.startswith(OURS) else few)
    for lever in LEVERS:
        speed = _speed(turns[f"{OURS}, {lever}"])
        yield Row.of(f"{OURS}, {lever}", speed, unit, num, OURS, speed / ours)
    plain, rows = _speed(turns[PLAIN_LARGE]), world.sizes.large_table
    yield Row.of(PLAIN_LARGE, plain, unit, rows)
    for name in (LARGE, LARGE_SPARSE):
        yield Row.of(name, _speed(turns[name]), unit, rows, PLAIN_LARGE, _speed(turns[name]) / plain)


def _speed(turns: list[Turn]) -> float:
    return float(np.median([turn.examples_s for turn in turns]))


def _some(events: Array, count: int) -> Array:
    """`count` of them, ascending, drawn so that they are as far apart as all are; all where it is -1."""
    if count < 0 or count >= len(events):
        return events
    return np.sort(np.random.default_rng(0).choice(events, count, replace=False))


if __name__ == "__main__":
    run("training_throughput", __doc__, measure)
