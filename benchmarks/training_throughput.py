"""How fast does the training loop train beside a plain PyTorch DataLoader over rows, and which lever pays?

First a ranker of logged impressions, mmoe_dcn, a row of the plain loop being an impression; then rankers of the heavy
one's lessons, mmoe_dcn and the funnel's own, a row being a pair: an impression or one of its candidates. All of
examples/kuairand/funnel.toml, on its training days; on a simulated market where there is no KuaiRand. The plain loop is
a Dataset whose `__getitem__` makes one row's features as a dict, default collate, AdamW as it comes. The ceilings are
one batch held in memory going forward and backward again and again, and gathering alone. All take turns, round by
round, in this process; a number is the median of its rounds, in pairs of a user and an item a second. Ours is the clock
over all of `run`, its files included; only where a table is large are those left out, for their size would be what is
told.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.machine import say
from benchmarks.result import Row
from benchmarks.run import Measured, Options, run
from benchmarks.training_courses import Course, World, items_apart, users_apart
from prerank.train.loop import run as train
from prerank.train.optimisers import lookup_tables
from prerank.train.plan import Plan

USUAL_BATCH = 512
BAR = 5.0  # times the plain loop's pairs a second
LARGE_TABLES = ("item.author_id", "item.campaign_id")  # KuaiRand's and the market's, no history's
READY, GATHER = "forward and backward of a batch in memory", "gathering alone"
PLAIN, PLAIN_OURS = f"DataLoader, batch {USUAL_BATCH}", "DataLoader, our batch"
PLAIN_WORKERS, PLAIN_LARGE = f"{PLAIN}, 2 workers", f"{PLAIN}, large table"
OURS, LARGE, LARGE_SPARSE = "ours", "ours, large table", "ours, large table, sparse tables"

LEVERS: dict[str, Callable[[Plan], Plan]] = {
    "nothing made ahead": lambda plan: replace(plan, prefetch=0),
    "bf16": lambda plan: replace(plan, bf16=True),
    "AdamW not fused": lambda plan: replace(plan, fused=False),
    "sparse tables": lambda plan: replace(plan, sparse=True),
    "averaged": lambda plan: replace(plan, average=0.999),
    f"batch {USUAL_BATCH}": lambda plan: replace(plan, batch=USUAL_BATCH),
    "batch 8,192": lambda plan: replace(plan, batch=8192),
    "bf16, batch 8,192": lambda plan: replace(plan, bf16=True, batch=8192),
}
LESSON_LEVERS: dict[str, tuple[Callable[[Plan], Plan], Callable[[Any], Any]]] = {
    "users made a pair": (lambda plan: plan, users_apart),
    "items made a pair": (lambda plan: plan, items_apart),
    "users and items made a pair": (lambda plan: plan, lambda batch: items_apart(users_apart(batch))),
    "bf16": (LEVERS["bf16"], lambda batch: batch),
}


@dataclass(frozen=True, slots=True)
class Sizes:
    """Examples of a turn of ours (-1 is all), of the plain loop and with a large table; its rows; and rounds.

    `lessons` are those of a turn of ours, `plain_lessons` those whose pairs are the plain loop's.
    """

    ready_steps: int = 32
    ours: int = 65_536
    plain: int = 16_384
    lessons: int = 16_384
    plain_lessons: int = 4_096
    large_table: int = 1_000_000
    rounds: int = 2
    market_ads: int = 20_000


QUICK = Sizes(
    ready_steps=8, ours=16_384, plain=2_048, lessons=2_048, plain_lessons=256, large_table=100_000, rounds=1,
    market_ads=2_000,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn: pairs a second, and the share of its time spent on waiting for a batch."""

    pairs_s: float
    waited: float = math.nan


Turns: TypeAlias = dict[str, list[Turn]]
Works: TypeAlias = dict[str, Callable[[], Turn]]


def measure(options: Options, ceilings: Mapping[str, float]) -> Measured:
    measured = throughput(options.data, QUICK if options.quick else Sizes())
    # a smaller training is not what the bar is asked of
    rows = [replace(row, bar=None, holds=None) if options.quick else row for row in measured.rows]
    return replace(measured, rows=rows)


def throughput(data: Path | None, sizes: Sizes) -> Measured:
    """Every row, with the ceilings; `data` is the folder of KuaiRand, None a simulated market."""
    with TemporaryDirectory() as name:
        say("training_throughput: preparing")
        world = World(data, Path(name), sizes.market_ads)
        ways = Ways(world.impressions(sizes.ours, sizes.plain), Path(name), sizes)
        lessons = {
            f"lessons, {model}: ": Ways(course, Path(name), sizes)
            for model, course in world.lessons(sizes.lessons, sizes.plain_lessons).items()
        }
        works = ways.of_impressions()
        for prefix, some in lessons.items():
            works |= {prefix + what: work for what, work in some.of_lessons().items()}
        turns: Turns = {what: [] for what in works}
        for number in range(sizes.rounds):
            for what, work in works.items():
                say(f"training_throughput: round {number + 1} of {sizes.rounds}, {what}")
                turns[what].append(work())
        rows = list(_impression_rows(turns, ways))
        for prefix, some in lessons.items():
            own = {what.removeprefix(prefix): some for what, some in turns.items() if what.startswith(prefix)}
            rows += [_renamed(row, prefix) for row in _lesson_rows(own, some)]
    about = {"funnel": world.config.to_dict(), "threads": torch.get_num_threads(), **asdict(sizes)}
    least = {f"{what.replace(' ', '_')}_examples_s": round(_speed(turns[what])) for what in (READY, GATHER)}
    return Measured(rows, about, least)


class Ways:
    """Every way to train on one course, and the ceilings."""

    def __init__(self, course: Course, folder: Path, sizes: Sizes) -> None:
        self.course, self.folder, self.sizes = course, folder, sizes
        self.order = np.random.default_rng(0).permutation(len(course.many))

    def of_impressions(self) -> Works:
        """A turn of each, by name; the ceilings first."""
        rows = self.course.sizes
        large = {name: max(self.sizes.large_table, rows[name]) for name in LARGE_TABLES if name in rows}
        found: Works = {
            READY: self.ready,
            GATHER: self.gather,
            PLAIN: partial(self.plain, USUAL_BATCH, 0),
            PLAIN_OURS: partial(self.plain, self.course.batch, 0),
            PLAIN_WORKERS: partial(self.plain, USUAL_BATCH, 2),
            OURS: self.ours,
        }
        found |= {f"{OURS}, {lever}": partial(self.ours, change) for lever, change in LEVERS.items()}
        found[PLAIN_LARGE] = partial(self.plain, USUAL_BATCH, 0, large)
        found[LARGE] = partial(self.ours, tables=large)
        found[LARGE_SPARSE] = partial(self.ours, LEVERS["sparse tables"], tables=large)
        return found

    def of_lessons(self) -> Works:
        """As `of_impressions`."""
        found: Works = {
            READY: self.ready,
            GATHER: self.gather,
            PLAIN: partial(self.plain, USUAL_BATCH, 0),
            PLAIN_OURS: partial(self.plain, self.course.batch * self.course.pairs, 0),
            PLAIN_WORKERS: partial(self.plain, USUAL_BATCH, 2),
            OURS: self.ours,
        }
        return found | {f"{OURS}, {lever}": partial(self.ours, *how) for lever, how in LESSON_LEVERS.items()}

    def ready(self) -> Turn:
        """The ceiling of computing."""
        ranker, batch = self.course.ranker(), self.course.many.batch(self.order[: self.course.batch])
        loss_of = cast(Callable[[nn.Module], Tensor], batch.loss)
        _backward(ranker, loss_of)
        started = perf_counter()
        for _ in range(self.sizes.ready_steps):
            _backward(ranker, loss_of)
        done = self.sizes.ready_steps * len(self.order[: self.course.batch])
        return Turn(done * self.course.pairs / (perf_counter() - started))

    def gather(self) -> Turn:
        """The ceiling of the host's own work."""
        started = perf_counter()
        for start in range(0, len(self.order), self.course.batch):
            self.course.many.batch(self.order[start : start + self.course.batch])
        return Turn(len(self.order) * self.course.pairs / (perf_counter() - started))

    def plain(self, batch: int, workers: int, tables: Mapping[str, int] | None = None) -> Turn:
        """A DataLoader over rows."""
        ranker, options = self.course.ranker(tables), self.course.config.ranker
        loader = DataLoader(self.course.rows, batch, shuffle=True, num_workers=workers)
        optimiser = torch.optim.AdamW(ranker.parameters(), options.learning_rate, weight_decay=options.weight_decay)
        waited, rows = 0.0, 0
        started = asked = perf_counter()
        for row in loader:
            waited += perf_counter() - asked
            optimiser.zero_grad()
            loss = self.course.plain_loss(ranker, row)  # type: ignore[arg-type]
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            rows += len(next(iter(row["user"].values())))
            asked = perf_counter()
        return Turn(rows / (asked - started), waited / (asked - started))

    def ours(
        self,
        lever: Callable[[Plan], Plan] = lambda plan: plan,
        made: Callable[[Any], Any] = lambda batch: batch,
        tables: Mapping[str, int] | None = None,
    ) -> Turn:
        """`prerank.train.loop`, its plan changed by `lever` and its batches by `made`."""
        course = self.course
        ranker, examples = course.ranker(tables), course.few if tables else course.many
        plan = replace(Plan.of(course.config.ranker, "throughput", len(examples), course.config.seed), epochs=1)
        with TemporaryDirectory(dir=self.folder) as folder:
            started = perf_counter()
            [record] = train(
                ranker,
                lever(plan),
                lambda chosen, draw: made(examples.batch(chosen)),
                lambda batch: batch.loss(ranker),
                Path(folder),
                lookup_tables=lookup_tables(ranker, course.config.features),
            )
            seconds = record["seconds"] if tables else perf_counter() - started
        return Turn(len(examples) * course.pairs / seconds, record["waited_s"] / seconds)


def _backward(ranker: nn.Module, loss_of: Callable[[nn.Module], Tensor]) -> None:
    for weight in ranker.parameters():
        weight.grad = None
    loss_of(ranker).backward()  # type: ignore[no-untyped-call]


def _impression_rows(turns: Turns, ways: Ways) -> Iterator[Row]:
    yield from _common_rows(turns, ways, f"{ways.course.batch:,}")
    for lever in LEVERS:
        yield _lever_row(turns, ways, lever)
    plain, rows = _speed(turns[PLAIN_LARGE]), ways.sizes.large_table
    yield Row.of(PLAIN_LARGE, plain, _UNIT, rows)
    for name in (LARGE, LARGE_SPARSE):
        yield Row.of(name, _speed(turns[name]), _UNIT, rows, PLAIN_LARGE, _speed(turns[name]) / plain)


def _lesson_rows(turns: Turns, ways: Ways) -> Iterator[Row]:
    yield from _common_rows(turns, ways, f"{ways.course.batch:,} of {ways.course.pairs} pairs")
    for lever in LESSON_LEVERS:
        yield _lever_row(turns, ways, lever)


_UNIT = "examples/s"


def _common_rows(turns: Turns, ways: Ways, batch: str) -> Iterator[Row]:
    """The ceilings, the plain loop, ours, and how long each waited."""
    num, few = (len(one) * ways.course.pairs for one in (ways.course.many, ways.course.few))
    plain, ours = _speed(turns[PLAIN]), _speed(turns[OURS])
    yield Row.of(f"{READY}, batch {batch}", _speed(turns[READY]), _UNIT, num)
    yield Row.of(f"{GATHER}, batch {batch}", _speed(turns[GATHER]), _UNIT, num)
    yield Row.of(PLAIN, plain, _UNIT, few)
    for name in (PLAIN_OURS, PLAIN_WORKERS):
        yield Row.of(name, _speed(turns[name]), _UNIT, few, PLAIN, _speed(turns[name]) / plain)
    row = Row.of(f"{OURS}, batch {batch}", ours, _UNIT, num, PLAIN, ours / plain)
    yield replace(row, bar=BAR, holds=ours / plain >= BAR)
    yield Row.of(f"{OURS}: of the ceiling", 100 * ours / _speed(turns[READY]), "%", num)
    for name in (PLAIN, PLAIN_OURS, PLAIN_WORKERS, OURS, f"{OURS}, nothing made ahead"):
        if name in turns:
            waited = float(np.median([turn.waited for turn in turns[name]]))
            yield Row.of(f"{name}: waiting for data", 100 * waited, "%", num if name.startswith(OURS) else few)


def _lever_row(turns: Turns, ways: Ways, lever: str) -> Row:
    speed, num = _speed(turns[f"{OURS}, {lever}"]), len(ways.course.many) * ways.course.pairs
    return Row.of(f"{OURS}, {lever}", speed, _UNIT, num, OURS, speed / _speed(turns[OURS]))


def _renamed(row: Row, prefix: str) -> Row:
    return replace(row, name=prefix + row.name)


def _speed(turns: list[Turn]) -> float:
    return float(np.median([turn.pairs_s for turn in turns]))


if __name__ == "__main__":
    run("training_throughput", __doc__, measure)
