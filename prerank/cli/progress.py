"""Long work as bars on a terminal, as plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from prerank.types import Report

_QUIET_S = 10.0


class _Rate(ProgressColumn):
    """Things a second, in their own unit."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if not speed else f"{speed:,.0f} {task.fields['unit']}/s", style="dim")


@contextmanager
def progress(console: Console) -> Iterator[Report]:
    """A `Report` that draws; where the console is no terminal, a line when each piece of work begins and ends."""
    if not console.is_terminal:
        yield _Lines(console)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, TaskID] = {}
        known: dict[str, int] = {}

        def report(what: str, done: int, total: int, unit: str) -> None:
            if what not in tasks:
                for shown in tasks.values():
                    bars.update(shown, visible=False)
                # what was done before it began, an epoch's predecessors say, is no speed of its own
                tasks[what] = bars.add_task(what, total=total or None, completed=done, unit=unit)
            elif done < known[what]:  # of the validate days after those of training, say
                bars.reset(tasks[what], completed=done)
            known[what] = done
            bars.update(tasks[what], completed=done, total=total or None)

        yield report


class _Lines:
    """What a log file wants: every piece of work once when it starts, every ten seconds, and when it is done.

    The lines between say the speed since the piece began, and how long the rest takes at it. A piece of which less is
    done than before has begun again.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._began: dict[str, tuple[float, int]] = {}
        self._told: dict[str, float] = {}
        self._done: dict[str, int] = {}

    def __call__(self, what: str, done: int, total: int, unit: str) -> None:
        now = self._clock()
        if done < self._done.get(what, 0):
            for known in (self._began, self._told):
                known.pop(what, None)
        self._done[what] = done
        finished = bool(total) and done >= total
        if not finished and now - self._told.get(what, -_QUIET_S) < _QUIET_S:
            return
        self._told[what] = now
        of = f" of {total:,}" if total else ""
        line = f"{what}: {done:,}{of} {unit}".rstrip() + self._pace(what, now, done, total, unit)
        self._console.print(line, highlight=False, soft_wrap=True)

    def _pace(self, what: str, now: float, done: int, total: int, unit: str) -> str:
        """ ", 5,000 examples/s, 0:01:23 left", as far as that is known."""
        began, before = self._began.setdefault(what, (now, done))
        speed = (done - before) / (now - began) if now > began else 0.0
        if speed <= 0:
            return ""
        said = f", {speed:,.0f} {unit}/s" if unit.isalpha() else ""  # per cent a second say nothing
        return said + (f", {timedelta(seconds=round((total - done) / speed))} left" if done < total else "")
