"""The log of tastes, a version of it that is live, and an honest retrain a day later."""

import shutil
from pathlib import Path

import pytest

from prerank.bundle.registry import Registry
from prerank.config import Config
from prerank.lifecycle.retrain import Asked, retrain
from prerank.lifecycle.validate import validate
from tests.lifecycle import world
from tests.lifecycle.world import Made


@pytest.fixture(scope="session")
def tastes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the log's tables."""
    return world.write(tmp_path_factory.mktemp("tastes"), world.log())


@pytest.fixture(scope="session")
def first(tastes: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """What the live version was made of."""
    return world.made(world.config(), tastes, tmp_path_factory.mktemp("first"))


@pytest.fixture(scope="session")
def second(tastes: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """An honest retrain: another seed, and every window a day later."""
    return world.made(world.moved(world.config(seed=8), 1), tastes, tmp_path_factory.mktemp("second"))


@pytest.fixture(scope="session")
def live_store(first: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A funnel's folder of a store with the first version live: copy it, do not write into it."""
    home = tmp_path_factory.mktemp("live") / "tastes"
    version = first.publish(home)
    gates = validate(home, version, first.trained.prepared, first.tables)
    assert all(gate.holds for gate in gates), gates
    Registry(home).promote(version, "a test", "the first")
    return home


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    """A funnel that trains in a second, and its tables."""
    config = world.config(**world.quick(validate={"golden": {"at_least": 1.0}}))
    return config, world.write(tmp_path_factory.mktemp("small") / "data", world.thin(world.log()))


@pytest.fixture(scope="session")
def done(small: tuple[Config, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store where the first retrain has run: copy it."""
    home = tmp_path_factory.mktemp("done") / "tastes"
    assert retrain(Asked(*small, home, day=world.day(6))).run.outcome == "promoted"
    return home


@pytest.fixture
def retrained(done: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(done, tmp_path / "store" / "tastes"))
