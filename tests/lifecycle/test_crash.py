"""Killed by SIGKILL at each step of publish, promote and retrain: what serves goes on, and the next run recovers."""

import os
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from prerank.bundle.failpoints import NAMES, PROMOTE, PUBLISH, RETRAIN, VARIABLE, reach
from prerank.bundle.manifest import VERSION, verify
from prerank.bundle.registry import Registry
from prerank.config import Config
from prerank.lifecycle.retrain import Asked, retrain
from prerank.lifecycle.runs import opened, running
from prerank.serve.watch import VersionWatch
from prerank.types import Request
from tests.lifecycle import world
from tests.lifecycle.server import Server
from tests.processes import forked

ASKED = Request(user_id=3, k=5, time_ms=0, context={"hour": 1})
ROLLING = ("retrain-rolling-back", "retrain-rolled-back")
MOVED = ("promote-moved", "retrain-promoted", "retrain-watching", "retrain-rolling-back")
"""The pointer is at the new version when these are reached."""


def die(config: Config, data: Path, home: Path, place: str, bad: float) -> None:
    """Retrain, and be killed at `place`; a child process's work."""
    os.environ[VARIABLE] = place
    retrain(Asked(config, data, home, watch=Server(home, bad).watch()))


def killed(config: Config, data: Path, home: Path, place: str, bad: float) -> None:
    process = forked(die, config, data, home, place, bad)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


@pytest.fixture
def serving(retrained: Path) -> Iterator[VersionWatch]:
    """A server of the store, from before anything happens."""
    with closing(VersionWatch.open(retrained, workers=0)) as watch:
        yield watch


@pytest.mark.parametrize("place", [*PUBLISH, *PROMOTE, *RETRAIN])
def test_whoever_is_killed_leaves_what_serves_and_the_next_run_recovers(
    small: tuple[Config, Path], retrained: Path, serving: VersionWatch, place: str
) -> None:
    config, data = small
    bad = 5.0 if place in ROLLING else 0.0
    registry = Registry(retrained)
    old = registry.live()
    killed(config, data, retrained, place, bad)

    live = registry.live()
    assert live is not None
    assert (live == old) == (place not in MOVED)
    for folder in (retrained / "versions").iterdir():
        if VERSION.fullmatch(folder.name):
            verify(folder)  # whatever could be pointed at is whole
    serving.look()
    answer = serving.live.recommend(ASKED)
    assert (answer.version, len(answer.winners)) == (live, 5)
    assert running(retrained) == "", "the lock died with its process"

    server = Server(retrained, bad)
    server.first = str(old)
    made = retrain(Asked(config, data, retrained, watch=server.watch()))
    assert made.run.outcome == ("rolled back" if bad else "promoted"), made.run
    assert registry.live() == (old if bad else made.run.version)
    moves = [(event.action, event.to) for event in registry.history()]
    wanted = [("promote", old), ("promote", made.run.version), *([("rollback", old)] if bad else [])]
    assert moves == wanted, "every move once"
    with opened(retrained) as runs:
        assert runs.unfinished() is None
        assert [run.outcome for run in runs.latest(9)] == [made.run.outcome, "promoted"]
    assert {info.version for info in registry.versions()} == {old, made.run.version}
    serving.look()
    assert serving.live.recommend(ASKED).version == registry.live()
    assert not retrain(Asked(config, data, retrained)).is_new, "it is done"


def test_a_run_that_was_stopped_is_left_where_the_data_is_newer(
    small: tuple[Config, Path], retrained: Path, tmp_path: Path
) -> None:
    config, _ = small
    before = world.write(tmp_path / "data", world.thin(world.log()[: -world.A_DAY // 2]))
    (retrained / "live").unlink()  # so that the same day is to be done
    killed(config, before, retrained, "retrain-trained", 0.0)
    world.write(tmp_path / "data", world.thin(world.log()))
    made = retrain(Asked(config, before, retrained))
    assert (made.run.outcome, made.run.day) == ("promoted", world.day(7))
    with opened(retrained) as runs:
        assert [run.outcome for run in runs.latest(2)] == ["promoted", "abandoned"]


def test_what_somebody_else_made_live_meanwhile_is_left_alone(small: tuple[Config, Path], retrained: Path) -> None:
    config, data = small
    registry = Registry(retrained)
    old = str(registry.live())
    killed(config, data, retrained, "retrain-rolling-back", 5.0)
    new = registry.live()
    assert new != old
    registry.rollback(None, "ada", "by hand")
    made = retrain(Asked(config, data, retrained))
    assert (made.run.outcome, registry.live()) == ("rolled back", old), "it was on its way there"
    assert len(registry.history()) == 3


def test_a_place_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "promote-noticed")
    with pytest.raises(ValueError, match=f"{VARIABLE}: expected one of {NAMES[0]}, .*, got 'promote-noticed'"):
        reach("promote-noted")
