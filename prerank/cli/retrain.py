"""`prerank retrain`, `status` and `history`: new versions by themselves, and what became of them."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from prerank.bundle.registry import Event, Registry
from prerank.cli.options import (
    CONFIG,
    DATA,
    STORE,
    ConfigPath,
    DataFolder,
    FunnelName,
    HostsCa,
    HostsCert,
    HostsKey,
    StoreFolder,
    TailUrl,
    Teacher,
    UsersUrl,
    err,
    found_in,
    out,
)
from prerank.cli.progress import progress
from prerank.config import Config, load_config
from prerank.errors import AlreadyRunning, ConfigError, PrerankError
from prerank.lifecycle.retrain import Asked, Retrained
from prerank.lifecycle.retrain import retrain as retrain_once
from prerank.lifecycle.rollout import Rollout, SinglePointer
from prerank.lifecycle.runs import FILE, Run, Step, opened, running
from prerank.lifecycle.shard_rollout import ShardByShard
from prerank.lifecycle.watching import Limits, Watch, metrics_of
from prerank.serve.host_tls import CallerTls

CODES = {"promoted": 0, "failed": 1, "abandoned": 1, "refused": 3, "rolled back": 4}
"""The exit code of each outcome; 75 (EX_TEMPFAIL of sysexits.h) where another process retrains."""
BUSY = 75
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_MOST_RUNS = 20
_MARKS = ("versions", FILE)
"""What a funnel's folder has: a version, or that a retrain has begun."""
_HOSTS = "Load it on these first, shard by shard: 0=host:port|host:port,1=... or a file with a shard a line."

_SERVER = "A server that follows the store, http://127.0.0.1:8000; repeat for each. One that breaks rolls back all."
_KEEP = "Once it is live, delete older versions and old work, as `prerank clean --keep`; by default nothing is."


def seconds(said: str) -> float:
    """The seconds of "30s", "5m", "6h" or "1d". Raises ConfigError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", said)
    if found is None or not float(found[1]):
        raise ConfigError(f"expected a time such as 30s, 5m, 6h or 1d, got {said!r}")
    return float(found[1]) * _UNITS[found[2]]


retraining = typer.Typer()


@retraining.command()
def retrain(
    config: ConfigPath = CONFIG,
    data: DataFolder = DATA,
    store: StoreFolder = STORE,
    every: Annotated[str, typer.Option(help="Again and again, each so long after the last began: 6h, 1d.")] = "",
    day: Annotated[str, typer.Option(help="The newest day, such as 2026-01-13; by default the log's.")] = "",
    fresh: Annotated[bool, typer.Option("--fresh", help="Train from nothing, not from the live weights.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Also where the same was done before.")] = False,
    index_hosts: Annotated[str, typer.Option(help=_HOSTS)] = "",
    hosts_ca: HostsCa = None,
    hosts_cert: HostsCert = None,
    hosts_key: HostsKey = None,
    pause: Annotated[str, typer.Option(help="How long to wait after each shard, before the next.")] = "10s",
    keep: Annotated[int | None, typer.Option(min=1, help=_KEEP)] = None,
    watch_url: Annotated[list[str], typer.Option(help=_SERVER)] = [],  # noqa: B006 - typer reads the default
    watch: Annotated[str, typer.Option(help="How long their metrics are watched.")] = "5m",
    most_errors: Annotated[float, typer.Option(min=0, max=1, help="Roll back above this share of 5xx.")] = 0.01,
    most_degraded: Annotated[float, typer.Option(min=0, max=1, help="... of degraded answers.")] = 0.05,
    most_p99_ms: Annotated[
        float | None, typer.Option(min=0, help="... where p99 is above; by default [serve].deadline_ms.")
    ] = None,
    tail: TailUrl = None,
    users: UsersUrl = None,
    teacher: Teacher = None,
) -> None:
    """Train for the newest day, validate beside the live version, roll out, watch, and roll back what breaks.

    One that was stopped is taken up. Exit code 0: live, or nothing is new; 3: the gate refused it; 4: rolled back;
    75: another process retrains; 1: an error.
    """
    funnel, period_s = load_config(config), seconds(every) if every else 0.0
    watched = _watch(funnel, watch_url, seconds(watch), most_errors, most_degraded, most_p99_ms)
    home = store / funnel.name
    asked = Asked(funnel, data, home, day, fresh, again, watched, tail, teacher, users, keep)
    tls = CallerTls.read(hosts_ca, hosts_cert, hosts_key)
    rollout = rollout_of(Registry(home), index_hosts, seconds(pause), tls)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    while True:
        began = time.monotonic()
        code = _once(asked, rollout)
        if not every:
            raise typer.Exit(code)
        time.sleep(max(began + period_s - time.monotonic(), 0.0))


@retraining.command()
def status(
    store: StoreFolder = STORE,
    funnel: FunnelName = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell what is live, where a retrain is, and how the last one ended.

    Exit code 0 where the last one was promoted or goes on, else that of its outcome; see `prerank retrain`.
    """
    home = found_in(store, funnel, _MARKS, "has no funnel yet")
    live, pid = Registry(home).live(), running(home)
    with opened(home) as runs:
        last = runs.latest()
        steps = runs.steps(last[0]) if last else []
    if as_json:
        told = {"live": live, "running": pid, "run": asdict(last[0]) if last else None}
        print(json.dumps({**told, "steps": [asdict(step) for step in steps]}, indent=1))
    else:
        out.print(_status(live, pid, last[0] if last else None, steps))
    raise typer.Exit(CODES.get(last[0].outcome, 0) if last else 0)


@retraining.command()
def history(
    store: StoreFolder = STORE,
    funnel: FunnelName = "",
) -> None:
    """Tell which version was live from when to when and why, and which retrains came to nothing."""
    home = found_in(store, funnel, _MARKS, "has no funnel yet")
    with opened(home) as runs:
        nothing = [run for run in runs.latest(_MOST_RUNS) if run.outcome not in ("", "promoted")]
    out.print(Group(_periods(Registry(home).history()), *([_nothing(nothing)] if nothing else [])))


def rollout_of(registry: Registry, hosts: str, pause_s: float, tls: CallerTls | None = None) -> Rollout:
    """Shard by shard where there are index hosts."""
    if not hosts:
        return SinglePointer(registry)
    from prerank.serve.exposure import TOKEN_VARIABLE  # Flight and the HTTP stack are only needed here
    from prerank.serve.index_flight import open_hosts

    return ShardByShard(registry, open_hosts(hosts, os.environ.get(TOKEN_VARIABLE), tls), pause_s)


def _once(asked: Asked, rollout: Rollout) -> int:
    try:
        with progress(err) as report:
            done = retrain_once(asked, rollout, report)
    except AlreadyRunning as error:
        tell_error(error)
        return BUSY
    except PrerankError as error:
        tell_error(error)
        return CODES["failed"]
    out.print(_told(done), highlight=False, soft_wrap=True)
    return CODES[done.run.outcome]


def tell_error(error: PrerankError) -> None:
    """As `main` tells one, for a command that ends with a code of its own."""
    err.print("error:", style="bold red", end=" ")
    err.print(str(error), highlight=False, markup=False, soft_wrap=True)


def _told(done: Retrained) -> Text:
    run = done.run
    what = f"run {run.id}, {run.day}: {run.version} {_OUTCOMES[run.outcome]}: {run.why}"
    return Text(what if done.is_new else f"nothing is new since {what}; --again does it again")


_OUTCOMES = {
    "promoted": "is live",
    "refused": "stays unpointed",
    "rolled back": "was rolled back",
    "failed": "failed",
    "abandoned": "was abandoned",
}


def _watch(
    config: Config, urls: list[str], for_s: float, errors: float, degraded: float, p99_ms: float | None
) -> Watch | None:
    if not urls:
        return None
    limits = Limits(errors, degraded, config.serve.deadline_ms if p99_ms is None else p99_ms)
    return Watch({url: metrics_of(url) for url in urls}, for_s, limits)


def _status(live: str | None, pid: str, run: Run | None, steps: list[Step]) -> RenderableType:
    lines = [f"live: {live or 'nothing'}"]
    if run is None:
        return Text("\n".join([*lines, "no retrain was begun yet"]))
    at = steps[-1] if steps else None
    if run.outcome:
        lines.append(f"run {run.id} of {run.day} {run.outcome} at {run.ended}: {run.why}")
    elif pid:
        where = f"{at.name} since {at.started}" if at else f"begins since {run.started}"
        lines.append(f"run {run.id} of {run.day}: {where}, {pid}")
    else:
        lines.append(
            f"run {run.id} of {run.day} was stopped at {at.name if at else 'its begin'} and nobody goes on with it; "
            "the next `prerank retrain` does"
        )
    table = _table("", "step", "began", "ended", "")
    for step in steps:
        table.add_row(step.name, _short(step.started), _short(step.ended), Text(step.said))
    return Group(Text("\n".join(lines)), table)


def _periods(events: list[Event]) -> RenderableType:
    table = _table("who was live", "version", "from", "until", "for", "by", "why")
    ends = [event.time for event in events[1:]]
    for event, end in zip(events, [*ends, ""], strict=True):
        until = datetime.fromisoformat(end) if end else datetime.now(UTC)
        lasted = str(until - datetime.fromisoformat(event.time)).partition(".")[0]
        why = f"rolled back from {event.source}: {event.why}" if event.action == "rollback" else event.why
        table.add_row(event.to, _short(event.time), _short(end) or "now", lasted, event.by, Text(why))
    return table


def _nothing(found: list[Run]) -> RenderableType:
    table = _table("retrains that did not stay live", "run", "day", "version", "outcome", "at", "why")
    for run in found:
        table.add_row(str(run.id), run.day, run.version, run.outcome, _short(run.ended), Text(run.why))
    return table


def _table(title: str, *columns: str) -> Table:
    """Times are UTC; only the last column, in words, may take several lines."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=title or None, title_justify="left")
    for name in columns:
        is_last = name == columns[-1]
        table.add_column(name, overflow="fold", no_wrap=not is_last)
    return table


def _short(time: str | None) -> str:
    """An ISO time as "2026-01-13 04:05:06"."""
    return (time or "")[:19].replace("T", " ")
