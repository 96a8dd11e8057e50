"""How fast does the training loop train beside a plain PyTorch DataLoader over rows, and which lever pays?

First a ranker of logged impressions, mmoe_dcn, a row of the plain loop being an impression; then rankers of the heavy
one's lessons, mmoe_dcn and the funnel's own, a row being a pair: an impression or one of its candidates. All of
examples/kuairand/funnel.toml, on its training days; on a simulated market where there is no KuaiRand. The plain loop is
a Dataset whose `__getitem__` makes one row's features as a dict, default collate, AdamW as it comes. The ceilings are
one batch held in memory going forward and backward again and again, and gathering alone. All take turns, round by
round; a number is the median of its rounds, in pairs of a user and an item a second. Ours is the clock over all of
`run`, its files included; only where a table is large are those left out, for their size would be what is told.

The plain loop has a process of its own, whose OpenMP waits as it does by itself, and ours has one that waits as
`prerank train` does (docs/decisions/0002); a third lets its threads sleep between any two operations. Where "a core is
taken" another program computes all the time.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
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
PLAIN_LOOP = "DataLoader"
PLAIN, PLAIN_OURS = f"{PLAIN_LOOP}, batch {USUAL_BATCH}", f"{PLAIN_LOOP}, our batch"
PLAIN_WORKERS, PLAIN_LARGE = f"{PLAIN}, 2 workers", f"{PLAIN}, large table"
OURS, LARGE, LARGE_SPARSE = "ours", "ours, large table", "ours, large table, sparse tables"
_ASLEEP_TOO, _TAKEN = "threads asleep between operations", "a core taken"
ASLEEP, TAKEN, ASLEEP_TAKEN = f"{OURS}, {_ASLEEP_TOO}", f"{OURS}, {_TAKEN}", f"{OURS}, {_ASLEEP_TOO}, {_TAKEN}"
WAITS = (ASLEEP, TAKEN, ASLEEP_TAKEN)

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
    "4 times the batch": (lambda plan: replace(plan, batch=4 * plan.batch), lambda batch: batch),
    "bf16, 4 times the batch": (lambda plan: replace(plan, bf16=True, batch=4 * plan.batch), lambda batch: batch),
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
        job = (data, Path(name), sizes)
        every = every_way(*job)
        turns: Turns = {}
        with ExitStack() as open_now:
            plain, awake, asleep = (open_now.enter_context(_process(job, waits)) for waits in (_ALONE, {}, _ASLEEP))
            for number in range(sizes.rounds):
                for prefix, ways in every.items():
                    for what in (*ways.works(), *WAITS):
                        say(f"training_throughput: round {number + 1} of {sizes.rounds}, {prefix}{what}")
                        ours = asleep if what in (ASLEEP, ASLEEP_TAKEN) else awake
                        where = plain if what.startswith(PLAIN_LOOP) else ours
                        with _a_core_taken() if _TAKEN in what else nullcontext():
                            turn = where.submit(_turn, prefix, OURS if what in WAITS else what).result()
                        turns.setdefault(prefix + what, []).append(turn)
        rows: list[Row] = []
        for prefix, ways in every.items():
            own = {what: turns[prefix + what] for what in (*ways.works(), *WAITS)}
            rows += [_named(row, prefix) for row in _rows(own, ways)]
    about = {"threads": torch.get_num_threads(), **asdict(sizes)}
    about["rankers"] = {
        prefix or "impressions": ways.course.config.to_dict()["ranker"] for prefix, ways in every.items()
    }
    least = {f"{what.replace(' ', '_')}_examples_s": round(_speed(turns[what])) for what in (READY, GATHER)}
    return Measured(rows, about, least)


def every_way(data: Path | None, folder: Path, sizes: Sizes) -> dict[str, Ways]:
    """By what its rows' names begin with. What is prepared and trained first is kept in `folder`."""
    world = World(data, folder, sizes.market_ads)
    found = {"": Ways(world.impressions(sizes.ours, sizes.plain), folder, sizes, lessons=False)}
    for model, course in world.lessons(sizes.lessons, sizes.plain_lessons).items():
        found[f"lessons, {model}: "] = Ways(course, folder, sizes, lessons=True)
    return found


_ALONE, _ASLEEP = {"GOMP_SPINCOUNT": "300000"}, {"OMP_WAIT_POLICY": "PASSIVE"}  # the first is what it is without any
_mine: dict[str, Ways] = {}


@contextmanager
def _process(job: tuple[Path | None, Path, Sizes], waits: Mapping[str, str]) -> Iterator[ProcessPoolExecutor]:
    """One that has every way ready, and whose OpenMP read `waits` and nothing else of how to wait."""
    before = dict(os.environ)
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        os.environ.pop(name, None)
    os.environ.update(waits)
    with ProcessPoolExecutor(1, get_context("spawn"), _open, job) as pool:
        try:
            pool.submit(abs, 0).result()
        finally:
            os.environ.clear()
            os.environ.update(before)
        yield pool


@contextmanager
def _a_core_taken() -> Iterator[None]:
    """Beside another program that computes all the time."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        try:
            yield
        finally:
            other.kill()


def _open(data: Path | None, folder: Path, sizes: Sizes) -> None:
    _mine.update(every_way(data, folder, sizes))


def _turn(prefix: str, what: str) -> Turn:
    return _mine[prefix].works()[what]()


class Ways:
    """Every way to train on one course, and the ceilings."""

    def __init__(self, course: Course, folder: Path, sizes: Sizes, lessons: bool) -> None:
        self.course, self.folder, self.sizes, self.lessons = course, folder, sizes, lessons
        self.order = np.random.default_rng(0).permutation(len(course.many))

    def works(self) -> Works:
        """A turn of each, by name; the ceilings first."""
        found: Works = {
            READY: self.ready,
            GATHER: self.gather,
            PLAIN: partial(self.plain, USUAL_BATCH, 0),
            PLAIN_OURS: partial(self.plain, self.course.batch * self.course.pairs, 0),
            PLAIN_WORKERS: partial(self.plain, USUAL_BATCH, 2),
            OURS: self.ours,
        }
        if self.lessons:
            return found | {f"{OURS}, {lever}": partial(self.ours, *how) for lever, how in LESSON_LEVERS.items()}
        rows = self.course.sizes
        large = {name: max(self.sizes.large_table, rows[name]) for name in LARGE_TABLES if name in rows}
        found |= {f"{OURS}, {lever}": partial(self.ours, change) for lever, change in LEVERS.items()}
        found[PLAIN_LARGE] = partial(self.plain, USUAL_BATCH, 0, large)
        found[LARGE] = partial(self.ours, tables=large)
        found[LARGE_SPARSE] = partial(self.ours, LEVERS["sparse tables"], tables=large)
        return found

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


_UNIT = "examples/s"


def _rows(turns: Turns, ways: Ways) -> Iterator[Row]:
    yield from _common_rows(turns, ways)
    for lever in (_ASLEEP_TOO, _TAKEN, *(LESSON_LEVERS if ways.lessons else LEVERS)):
        yield _lever_row(turns, ways, lever)
    yield _lever_row(turns, ways, f"{_ASLEEP_TOO}, {_TAKEN}", f"{OURS}, {_TAKEN}")
    if not ways.lessons:
        plain, rows = _speed(turns[PLAIN_LARGE]), ways.sizes.large_table
        yield Row.of(PLAIN_LARGE, plain, _UNIT, rows)
        for name in (LARGE, LARGE_SPARSE):
            yield Row.of(name, _speed(turns[name]), _UNIT, rows, PLAIN_LARGE, _speed(turns[name]) / plain)


def _common_rows(turns: Turns, ways: Ways) -> Iterator[Row]:
    """The ceilings, the plain loop, ours, and how long each waited."""
    batch = f"{ways.course.batch:,}" + (f" of {ways.course.pairs} pairs" if ways.lessons else "")
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


def _lever_row(turns: Turns, ways: Ways, lever: str, over: str = OURS) -> Row:
    speed, num = _speed(turns[f"{OURS}, {lever}"]), len(ways.course.many) * ways.course.pairs
    return Row.of(f"{OURS}, {lever}", speed, _UNIT, num, over, speed / _speed(turns[over]))


def _named(row: Row, prefix: str) -> Row:
    return replace(row, name=prefix + row.name, against=prefix + row.against if row.against else "")


def _speed(turns: list[Turn]) -> float:
    return float(np.median([turn.pairs_s for turn in turns]))


if __name__ == "__main__":
    run("training_throughput", __doc__, measure)
