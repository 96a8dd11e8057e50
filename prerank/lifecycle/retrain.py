"""A retrain from the window to a version that serves, or does not: every step may be stopped, and is taken up again.

    check ─▶ train ─▶ publish ─▶ validate ─▶ roll out ─▶ watch ─▶ promoted
                                    │ refused              │ rolled back

Training goes on from its checkpoint, publishing the same content gives the same version, gates are measured again, and
whether the pointer moved is asked of the registry and not remembered. So a run that was stopped is run again from the
start, in the time of what was left of it; once its version is live, only what follows is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog

import prerank
from prerank.bundle.failpoints import reach
from prerank.bundle.load import load
from prerank.bundle.registry import Registry
from prerank.config import Config
from prerank.data.check import check
from prerank.data.logs import Tables, open_tables
from prerank.errors import BundleError, DataError, PrerankError
from prerank.lifecycle.build import load_tail, load_users, publish_trained
from prerank.lifecycle.retention import Policy, clean
from prerank.lifecycle.rollout import Rollout, SinglePointer
from prerank.lifecycle.runs import Run, Runs, alone, opened
from prerank.lifecycle.training import Trained, train
from prerank.lifecycle.user_shelves import check_answers
from prerank.lifecycle.validate import validate
from prerank.lifecycle.watching import Sample, Watch
from prerank.lifecycle.window import moved, newest_complete_day
from prerank.train.warm import WarmStart
from prerank.types import Report, silent

_log = structlog.get_logger(__name__)
BY = "prerank retrain"


@dataclass(frozen=True, slots=True)
class Asked:
    """What to retrain: the funnel file's `config` on the tables in `data`, into the funnel's folder `home` of a store.

    `day` is the newest day, an ISO day; by default the newest that is complete in the log. `fresh` trains from nothing
    and not from the live version's weights; `again` also where the same was done before. `watch` watches what was
    rolled out. `tail`, `teacher` and `users` are as `prerank publish` takes them. `keep` versions are kept, where it is
    given, once another is live; see `retention`.
    """

    config: Config
    data: Path
    home: Path
    day: str = ""
    fresh: bool = False
    again: bool = False
    watch: Watch | None = None
    tail: str | None = None
    teacher: Path | None = None
    users: str | None = None
    keep: int | None = None


@dataclass(frozen=True, slots=True)
class Retrained:
    """The run, and whether it was made now; one that was made before, of the same, is told again."""

    run: Run
    is_new: bool


def retrain(asked: Asked, rollout: Rollout | None = None, report: Report = silent) -> Retrained:
    """One run, or the end of one that was stopped; by default the pointer is moved for all servers at once.

    A version that the gate refuses, or that was rolled back, is an outcome and no error. Raises AlreadyRunning where
    another process retrains the same funnel, and whatever keeps a step from being done; the run is then "failed", and
    the next one begins anew with what is done so far.
    """
    with alone(asked.home), opened(asked.home) as runs:
        chosen = SinglePointer(Registry(asked.home)) if rollout is None else rollout
        done = _Retraining(asked, runs, chosen, report).run()
        if asked.keep is not None and done.is_new and done.run.outcome == "promoted":
            with runs.step(done.run, "clean") as said:
                said.append(_cleaned(asked, chosen, asked.keep))
        return done


class _Retraining:
    """One call of `retrain`."""

    def __init__(self, asked: Asked, runs: Runs, rollout: Rollout, report: Report) -> None:
        self.asked, self.runs, self.rollout, self.report = asked, runs, rollout, report
        self.registry = Registry(asked.home)
        self._before: dict[str, Sample] = {}

    def run(self) -> Retrained:
        stopped = self.runs.unfinished()
        if stopped is not None and self._went_live(stopped):
            return Retrained(self._ended(stopped, self._after), True)
        stopped = self.runs.unfinished()  # none, where somebody else made another version live since
        tables = open_tables(self.asked.config, self.asked.data, self.asked.home / "work")
        day = self.asked.day or newest_complete_day(self.asked.config, tables)
        config = moved(self.asked.config, day)
        inputs = _inputs(config, tables, self.asked)
        if stopped is not None and stopped.inputs != inputs:
            self.runs.end(stopped, "abandoned", "it was stopped, and the data or the funnel file are others since")
            stopped = None
        if stopped is None:
            known = self._known(inputs)
            if known is not None:
                return Retrained(known, False)
            warm = "" if self.asked.fresh else self.registry.live() or ""
            stopped = self.runs.begin(inputs, day, warm)
            reach("retrain-begun")
        return Retrained(self._ended(stopped, lambda run: self._all(run, config, tables)), True)

    def _ended(self, run: Run, steps: Callable[[Run], Run]) -> Run:
        try:
            return steps(run)
        except PrerankError as error:
            self.runs.end(run, "failed", str(error))
            raise

    def _known(self, inputs: str) -> Run | None:
        """The last run that did the same and came to a verdict."""
        if self.asked.again:
            return None
        last = [run for run in self.runs.latest(1000) if run.inputs == inputs and run.outcome in _VERDICTS]
        return last[0] if last else None

    def _went_live(self, run: Run) -> bool:
        """Whether a stopped run had rolled its version out; what somebody else made live since is left alone."""
        begun = {step.name for step in self.runs.steps(run)}
        if "roll out" not in begun:
            return False
        live = self.registry.live()
        if live == run.version or "roll back" in begun:
            return True
        if live != (run.before or None):
            self.runs.end(run, "abandoned", f"it was stopped, and {live} was made live since")
        return False

    def _all(self, run: Run, config: Config, tables: Tables) -> Run:
        if self.asked.watch is not None:
            self.asked.watch.look()  # what cannot be watched later is not begun
        if self.asked.users is not None:
            check_answers(self.asked.users)
        self.rollout.ready()
        with self.runs.step(run, "check"):
            _checked(config, tables)
        trained = self._trained(run, config, tables)
        reach("retrain-trained")
        run = self._published(run, trained, tables)
        reach("retrain-published")
        if run.version == self.registry.live():
            return self.runs.end(run, "promoted", "it is what is live already")
        with self.runs.step(run, "validate") as said:
            home, users = self.asked.home, self.asked.users
            gates = validate(home, run.version, trained.prepared, tables, trained.heavy, self.report, users)
            failed = [f"{gate.name}: {gate.said()}" for gate in gates if not gate.holds]
            said += failed or [f"all {len(gates)} gates hold"]
        reach("retrain-validated")
        if failed:
            return self.runs.end(run, "refused", "; ".join(failed))
        return self._after(self._rolled_out(run, config))

    def _trained(self, run: Run, config: Config, tables: Tables) -> Trained:
        with self.runs.step(run, "train") as said:
            warm = self._warm(run, said)
            trained = train(config, tables, self.asked.home, self.report, self.asked.teacher, warm)
            said += [f"{part} from nothing: {why}" for part, why in trained.fresh.items()]
            return trained

    def _warm(self, run: Run, said: list[str]) -> WarmStart | None:
        if not run.warm:
            said.append("from nothing: " + ("--fresh" if self.asked.fresh else "no version is live"))
            return None
        try:
            bundle = load(self.registry.path(run.warm))
        except BundleError as error:
            said.append(f"from nothing: the live version cannot be loaded: {error}")
            return None
        said.append(f"from the weights of {run.warm}")
        return WarmStart.of(bundle)

    def _published(self, run: Run, trained: Trained, tables: Tables) -> Run:
        with self.runs.step(run, "publish") as said:
            home, config = self.asked.home, trained.config
            load_users(config, tables, trained.prepared, home, self.report, self.asked.users)
            load_tail(config, tables, trained.prepared, home, self.asked.tail, self.report)
            metrics = {"retrain": {"run": run.id, "warm": run.warm, "fresh": dict(trained.fresh)}}
            version = publish_trained(trained, tables, home, metrics)
            said.append(version)
            return self.runs.note(run, version=version)

    def _rolled_out(self, run: Run, config: Config) -> Run:
        if self.asked.watch is not None:
            self._before = self.asked.watch.look()
        run = self.runs.note(run, before=self.registry.live() or "")
        with self.runs.step(run, "roll out"):
            reach("retrain-promoting")
            first, last = config.data.validate
            days = last if first == last else f"{first} to {last}"
            self.rollout.roll_out(run.version, BY, f"run {run.id}: every gate holds on {days}")
        reach("retrain-promoted")
        return run

    def _after(self, run: Run) -> Run:
        """Watch what was rolled out, and roll it back if it breaks, or finish rolling it back."""
        begun = [step for step in self.runs.steps(run) if step.name == "roll back"]
        if begun:
            return self._rolled_back(run, begun[-1].said or run.why)
        watch = self.asked.watch
        if watch is None:
            return self.runs.end(run, "promoted", "every gate holds; nobody watched it")
        with self.runs.step(run, "watch") as said:
            watched = watch.over(run.version, self._before, lambda: reach("retrain-watching"))
            why = watched.why
            said.append(why or watched.said())
        if not why:
            return self.runs.end(run, "promoted", f"every gate holds; watched for {watch.for_s:.0f} s: {said[-1]}")
        return self._rolled_back(run, why)

    def _rolled_back(self, run: Run, why: str) -> Run:
        if not run.before:
            raise BundleError(
                f"{run.version} is broken ({why}), and nothing was live before it: there is nothing to roll back to"
            )
        if self.registry.live() not in (run.version, run.before):
            return self.runs.end(run, "abandoned", f"{self.registry.live()} was made live while it was watched; {why}")
        with self.runs.step(run, "roll back", why):
            reach("retrain-rolling-back")
            self.rollout.roll_back(run.before, BY, f"run {run.id}: {why}")
        reach("retrain-rolled-back")
        return self.runs.end(run, "rolled back", why)


def _cleaned(asked: Asked, rollout: Rollout, keep: int) -> str:
    """What was deleted, in a sentence; what keeps it from that is no failure of the run."""
    try:
        return clean(asked.home, Policy(keep), BY, rollout.in_use()).said()
    except PrerankError as error:
        _log.warning("old versions and work are not deleted", error=str(error))
        return f"nothing more is deleted: {error}"


_VERDICTS = ("promoted", "refused", "rolled back")


def _inputs(config: Config, tables: Tables, asked: Asked) -> str:
    """16 hex digits of all that a run is made from, beside the version it begins with."""
    said = [config.to_dict(), tables.fingerprint(), prerank.__version__, asked.fresh, str(asked.teacher or "")]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def _checked(config: Config, tables: Tables) -> None:
    """Raises DataError for the first errors of the tables. The test days come after the log, and are not asked for."""
    found = [one for one in check(config, tables) if one.severity == "error" and one.where != "data.test"]
    if found:
        first = "; ".join(f"{one.where}: {one.what}: expected {one.expected}, found {one.found}" for one in found[:3])
        raise DataError(f"the data has {len(found)} errors: {first}; mend them, or see `prerank check`")
