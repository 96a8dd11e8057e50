"""Long work as bars on a terminal, as plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

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

        def report(what: str, done: int, total: int, unit: str) -> None:
            if what not in tasks:
                for shown in tasks.values():
                    bars.update(shown, visible=False)
                tasks[what] = bars.add_task(what, total=total or None, unit=unit)
            bars.update(tasks[what], completed=done, total=total or None)

        yield report


class _Lines:
    """What a log file wants: every piece of work once when it starts, every ten seconds, and when it is done."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._told: dict[str, float] = {}

    def __call__(self, what: str, done: int, total: int, unit: str) -> None:
        now = time.monotonic()
        finished = bool(total) and done >= total
        if not finished and now - self._told.get(what, -_QUIET_S) < _QUIET_S:
            return
        self._told[what] = now
        of = f" of {total:,}" if total else ""
        self._console.print(f"{what}: {done:,}{of} {unit}".rstrip(), highlight=False)
