"""What a funnel's folder no longer needs: old versions, what training kept in `work`, and what crashes left.

    kept of versions: the live one, the newest, what was live in the last promotes, what anybody has loaded
    kept of work: what was written in the last days, and since a run began that is to go on

Each thing is renamed aside, then deleted; whoever is killed between leaves what the next clean deletes.
"""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from prerank.bundle.durable import sync
from prerank.bundle.failpoints import reach
from prerank.bundle.in_use import unused
from prerank.bundle.manifest import VERSIONS
from prerank.bundle.registry import ASIDE, Registry
from prerank.errors import ConfigError, PrerankError, RegistryError
from prerank.lifecycle.runs import FILE, Run, opened

KEEP, WORK_DAYS = 3, 7.0
_DAY_S, _CRASHED_S = 86_400.0, 3_600.0
_LEFT = ("*.lmdb.tmp-*", ".live-*")
"""Files of a funnel's folder that are written beside what they replace."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How many versions are kept, and for how many days what is in `work`. Raises ConfigError for what is none."""

    keep: int = KEEP
    work_days: float = WORK_DAYS

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ConfigError(f"--keep {self.keep}: expected 1 or more versions to keep beside the live one")
        if not self.work_days >= 0:
            raise ConfigError(f"--work-days {self.work_days:g}: expected 0 or more days")


@dataclass(frozen=True, slots=True)
class Thing:
    """A version, a file or a folder by its `name` in the funnel's folder, its bytes, and why it goes or stays."""

    name: str
    num_bytes: int
    why: str


@dataclass(frozen=True, slots=True)
class Cleaned:
    """What was deleted, or would be; and what should have been and is not, with the reason."""

    freed: list[Thing] = field(default_factory=list)
    spared: list[Thing] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        """All that was freed."""
        return sum(one.num_bytes for one in self.freed)

    def said(self) -> str:
        """In one sentence."""
        spared = f"; spared {', '.join(f'{one.name}: {one.why}' for one in self.spared)}" if self.spared else ""
        return f"{len(self.freed)} things deleted, {self.num_bytes / 1e6:.1f} MB{spared}"


def clean(
    home: Path, policy: Policy, by: str, in_use: Collection[str] = (), is_dry: bool = False, now: float | None = None
) -> Cleaned:
    """Delete what `policy` does not keep of the funnel's folder `home`; with `is_dry` only tell.

    Whoever calls is alone (`runs.alone`). `in_use` are versions that others are known to have loaded; what processes of
    this machine have is seen by itself. Raises PrerankError where something cannot be deleted.
    """
    gc.collect()  # a version that this process let go of, in a cycle, would be spared
    cleaned, at = Cleaned(), time.time() if now is None else now
    try:
        _clean_versions(home, policy, by, in_use, is_dry, cleaned)
        for path, why in _left_and_old(home, policy, at):
            cleaned.freed.append(Thing(str(path.relative_to(home)), _bytes(path), why))
            if not is_dry:
                _remove(path)
    except OSError as error:
        raise PrerankError(f"{home}: not all of it can be deleted: {error}") from error
    return cleaned


def kept_versions(home: Path, keep: int) -> dict[str, str]:
    """Every version that must stay, whether or not it is there, and why."""
    registry = Registry(home)
    live, back, history = registry.live(), registry.before_live(), registry.history()
    kept: dict[str, str] = {}
    promotes = [place for place, event in enumerate(history) if event.action == "promote"]
    since = promotes[-keep] if len(promotes) >= keep else 0
    for event in history[since:]:
        kept |= {one: f"it was live in the last {keep} promotes" for one in (event.source, event.to) if one}
    kept |= dict.fromkeys([n for n in registry.names() if n != live][-keep:], f"it is among the newest {keep}")
    run = _stopped(home)
    if run is not None:
        kept |= {one: f"run {run.id} is to go on with it" for one in (run.version, run.before, run.warm) if one}
    if back is not None:
        kept[back] = "`prerank rollback` goes there"
    if live is not None:
        kept[live] = "it is live"
    return kept


def _clean_versions(
    home: Path, policy: Policy, by: str, in_use: Collection[str], is_dry: bool, cleaned: Cleaned
) -> None:
    registry, kept = Registry(home), kept_versions(home, policy.keep)
    why = f"neither live, nor among the newest {policy.keep}, nor live in the last {policy.keep} promotes"
    for version in registry.names():
        if version in kept:
            continue
        path = registry.path(version)
        thing = Thing(f"{VERSIONS}/{version}", _bytes(path), why)
        if version in in_use:
            cleaned.spared.append(Thing(thing.name, thing.num_bytes, "an index host holds it"))
            continue
        with unused(path) as is_unused:
            if not is_unused:
                cleaned.spared.append(Thing(thing.name, thing.num_bytes, "a process has loaded it"))
                continue
        if not is_dry:
            try:
                _delete(registry.remove(version, by, why))
            except RegistryError as error:  # it went live, or was loaded, just now
                cleaned.spared.append(Thing(thing.name, thing.num_bytes, str(error)))
                continue
        cleaned.freed.append(thing)


def _left_and_old(home: Path, policy: Policy, at: float) -> Iterator[tuple[Path, str]]:
    """What crashes left anywhere, and what is old in `work`, with why it goes."""
    work = home / "work"
    for folder in (home / VERSIONS, work, work / "tables"):
        for path in sorted(folder.glob(".*")):
            if path.name.startswith(ASIDE):
                yield path, "half deleted before"
            elif at - _touched(path) > _CRASHED_S:
                yield path, "half written by what was stopped"
    for path in sorted(one for pattern in _LEFT for one in home.glob(pattern)):
        if at - _touched(path) > _CRASHED_S:
            yield path, "half written by what was stopped"
    run, oldest = _stopped(home), at - policy.work_days * _DAY_S
    if run is not None:
        oldest = min(oldest, datetime.fromisoformat(run.started).timestamp())
    for path in _work(work):
        if _touched(path) < oldest:
            yield path, f"not written to for {policy.work_days:g} days; made again where it is needed"


def _work(work: Path) -> list[Path]:
    """What `work` has that is whole. Of tables that an adapter made not the newest, which logs are read from."""
    found = [path for path in sorted(work.glob("*")) if path.name != "tables" and not path.name.startswith(".")]
    by_adapter: dict[str, list[Path]] = {}
    for path in (work / "tables").glob("[!.]*"):
        by_adapter.setdefault(path.name.partition("-")[0], []).append(path)
    return found + [one for several in by_adapter.values() for one in sorted(several, key=_touched)[:-1]]


def _stopped(home: Path) -> Run | None:
    if not (home / FILE).exists():
        return None
    with opened(home) as runs:
        return runs.unfinished()


def _remove(path: Path) -> None:
    if path.name.startswith(ASIDE) or path.is_symlink() or not path.is_dir():
        _delete(path)
        return
    aside = path.with_name(f"{ASIDE}{path.name}-{time.time_ns():x}")
    path.rename(aside)
    sync(aside.parent)
    _delete(aside)


def _delete(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    for first in [one for one in path.iterdir() if one.is_file()][:1]:
        first.unlink()
        reach("clean-half-deleted")
    shutil.rmtree(path)


def _touched(path: Path) -> float:
    """When anything in it was written last; what goes meanwhile is being written."""
    try:
        within = path.rglob("*") if path.is_dir() else ()
        return float(max(one.lstat().st_mtime for one in (path, *within)))
    except FileNotFoundError:
        return time.time()


def _bytes(path: Path) -> int:
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_size
    return sum(one.lstat().st_size for one in path.rglob("*") if not one.is_dir())
