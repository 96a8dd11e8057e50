"""What every retrain did, step by step, in the funnel's retrain.sqlite; and that one runs at a time.

A run without an outcome was stopped before its end: killed, or its machine. The next one takes it up.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypeAlias

from prerank.errors import AlreadyRunning, PrerankError

FILE = "retrain.sqlite"
LOCK = ".retrain.lock"
Outcome: TypeAlias = Literal["promoted", "refused", "rolled back", "failed", "abandoned"]
_SCHEMA = """
create table if not exists runs (
    id integer primary key, started text not null, ended text, inputs text not null, day text not null,
    warm text not null default '', version text not null default '', before text not null default '',
    outcome text not null default '', why text not null default ''
);
create table if not exists steps (
    run integer not null references runs (id), name text not null, started text not null, ended text,
    said text not null default ''
);
"""
_FIELDS = "id, started, ended, inputs, day, warm, version, before, outcome, why"


@dataclass(frozen=True, slots=True)
class Run:
    """One retrain.

    `inputs` says what it was made from, `day` its newest day, `warm` the version it began with, `version` what it
    published, `before` what was live when that was rolled out. Times are UTC in ISO form; `ended` None and an empty
    `outcome` are of one that goes on, or was stopped.
    """

    id: int
    started: str
    ended: str | None
    inputs: str
    day: str
    warm: str
    version: str
    before: str
    outcome: str
    why: str


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a run, and what it said at its end."""

    name: str
    started: str
    ended: str | None
    said: str


class Runs:
    """The runs of one funnel's folder. What is noted is on the disk when a method returns."""

    def __init__(self, home: Path) -> None:
        self.path = home / FILE
        home.mkdir(parents=True, exist_ok=True)
        try:
            self._database = sqlite3.connect(self.path, isolation_level=None, timeout=10.0)
            self._database.execute("pragma synchronous = full")
            self._database.executescript(_SCHEMA)
        except sqlite3.DatabaseError as error:
            raise PrerankError(f"{self.path}: not what a retrain keeps its state in: {error}; move it away") from None

    def begin(self, inputs: str, day: str, warm: str) -> Run:
        """A new run."""
        values = (_now(), inputs, day, warm)
        made = self._database.execute("insert into runs (started, inputs, day, warm) values (?, ?, ?, ?)", values)
        assert made.lastrowid is not None
        return self.get(made.lastrowid)

    def get(self, number: int) -> Run:
        """The run of this number."""
        row = self._database.execute(f"select {_FIELDS} from runs where id = ?", (number,)).fetchone()
        return Run(*row)

    def latest(self, most: int = 1) -> list[Run]:
        """The last runs, the newest first."""
        rows = self._database.execute(f"select {_FIELDS} from runs order by id desc limit ?", (most,)).fetchall()
        return [Run(*row) for row in rows]

    def unfinished(self) -> Run | None:
        """The run that was stopped before its end, or goes on now."""
        row = self._database.execute(f"select {_FIELDS} from runs where outcome = '' order by id desc").fetchone()
        return None if row is None else Run(*row)

    def note(self, run: Run, *, version: str | None = None, before: str | None = None, warm: str | None = None) -> Run:
        """Remember what a run published, what was live before it, or what it began with."""
        for column, value in {"version": version, "before": before, "warm": warm}.items():
            if value is not None:
                self._database.execute(f"update runs set {column} = ? where id = ?", (value, run.id))
        return self.get(run.id)

    def end(self, run: Run, outcome: Outcome, why: str) -> Run:
        """The run is over."""
        self._database.execute(
            "update runs set ended = ?, outcome = ?, why = ? where id = ?", (_now(), outcome, why, run.id)
        )
        return self.get(run.id)

    @contextmanager
    def step(self, run: Run, name: str, why: str = "") -> Iterator[list[str]]:
        """A step of the run, for as long as this lasts; what is appended to the list is kept as what it said.

        `why` it is done is kept from its beginning.
        """
        made = self._database.execute(
            "insert into steps (run, name, started, said) values (?, ?, ?, ?)", (run.id, name, _now(), why)
        )
        said = [why] if why else []
        try:
            yield said
        except Exception as error:
            said.append(str(error))
            self._end_step(made.lastrowid, said)
            raise
        self._end_step(made.lastrowid, said)

    def steps(self, run: Run) -> list[Step]:
        """Every step that was begun, in order; one that was taken up after a crash is there twice."""
        rows = self._database.execute(
            "select name, started, ended, said from steps where run = ? order by rowid", (run.id,)
        ).fetchall()
        return [Step(*row) for row in rows]

    def close(self) -> None:
        """Let go of the file."""
        self._database.close()

    def _end_step(self, row: int | None, said: list[str]) -> None:
        self._database.execute("update steps set ended = ?, said = ? where rowid = ?", (_now(), "; ".join(said), row))


@contextmanager
def opened(home: Path) -> Iterator[Runs]:
    """The runs of a funnel's folder, closed afterwards."""
    with closing(Runs(home)) as runs:
        yield runs


@contextmanager
def alone(home: Path) -> Iterator[None]:
    """Be the one retrainer of a funnel's folder; a dead one's place is free at once.

    Raises AlreadyRunning, naming the process, where there is another. The lock is `flock`: on a network file system it
    holds only as far as that file system keeps it.
    """
    home.mkdir(parents=True, exist_ok=True)
    with (home / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AlreadyRunning(
                f"{home}: a retrain runs already, {_said(file.name)}; two would undo each other"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def running(home: Path) -> str:
    """Which process retrains this folder now, in words; "" for none."""
    path = home / LOCK
    if not path.exists():
        return ""
    with path.open("r") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _said(str(path))
    return ""


def _said(path: str) -> str:
    pid = Path(path).read_text().strip()
    return f"process {pid}" if pid else "a process that has just begun"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
