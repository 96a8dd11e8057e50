"""What a clean deletes, what it never does, and that whoever is killed in it leaves nothing half."""

import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from prerank.bundle.failpoints import CLEAN, VARIABLE
from prerank.bundle.load import load
from prerank.bundle.manifest import verify
from prerank.bundle.publish import publish
from prerank.bundle.registry import Gate, Registry
from prerank.bundle.removed import removals
from prerank.bundle.shard import Place
from prerank.bundle.user_side import load_user_side
from prerank.cli.app import app
from prerank.config import Config
from prerank.errors import ConfigError, PrerankError, RegistryError
from prerank.lifecycle.retention import Policy, clean
from prerank.lifecycle.retrain import Asked, retrain
from prerank.lifecycle.rollout import SinglePointer
from prerank.lifecycle.runs import alone, opened
from prerank.serve.index_host import IndexHost
from prerank.serve.user_towers import UserTowers
from tests.bundle import world as bundles
from tests.lifecycle import world

DAY_S = 86_400.0


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Eight versions, published a minute after each other, none promoted."""
    home, versions = tmp_path_factory.mktemp("eight") / "tiny", []
    for seed in range(8):
        made = publish(home, bundles.parts(num_items=20, seed=seed))
        versions.append(f"20260301T000{seed}{made[13:]}")
        folder = home / "versions" / versions[-1]
        (home / "versions" / made).rename(folder)
        manifest = folder / "manifest.json"
        manifest.write_text(manifest.read_text().replace(made, versions[-1]))
        Registry(home).write_validation(versions[-1], [Gate("golden", "at least 1", 1.0, True)])
    return home, versions


@pytest.fixture
def home(eight: tuple[Path, list[str]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(eight[0], tmp_path / "store" / "tiny"))


@pytest.fixture
def v(eight: tuple[Path, list[str]]) -> list[str]:
    return eight[1]


def promote(home: Path, *versions: str) -> None:
    for version in versions:
        Registry(home).promote(version, "a test", "")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


def old(path: Path, days: float) -> Path:
    """Made, and written to that long ago."""
    if path.suffix:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 1000)
    else:
        (path / "in").mkdir(parents=True)
        (path / "in" / "it.npy").write_bytes(b"x" * 1000)
    at = time.time() - days * DAY_S
    for one in (path, *path.rglob("*")):
        os.utime(one, (at, at))
    return path


def test_the_newest_and_what_was_live_in_the_last_promotes_stay(home: Path, v: list[str]) -> None:
    promote(home, v[0], v[1], v[2], v[4])
    cleaned = clean(home, Policy(keep=2), "a test")
    # 7 and 6 are the newest, 4 is live, and the last two promotes went from 1 to 2 to 4
    assert Registry(home).names() == [v[1], v[2], v[4], v[6], v[7]]
    assert [one.name for one in cleaned.freed] == [f"versions/{one}" for one in (v[0], v[3], v[5])]
    assert not cleaned.spared
    assert sorted(path.name for path in (home / "versions").iterdir()) == Registry(home).names(), "nothing else is left"
    for version in Registry(home).names():
        verify(Registry(home).path(version))
    Registry(home).rollback(None, "a test", "")
    assert Registry(home).live() == v[2]
    assert clean(home, Policy(keep=2), "a test").freed == []


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_the_live_version_and_the_one_before_always_stay(home: Path, v: list[str], keep: int) -> None:
    promote(home, v[0], v[1])
    clean(home, Policy(keep), "a test")
    assert {v[0], v[1], *v[-keep:]} == set(Registry(home).names())
    registry = Registry(home)
    promote(home, v[-1])
    registry.rollback(None, "a test", "")
    clean(home, Policy(1), "a test")
    registry.rollback(None, "a test", "")
    assert registry.live() == v[0], "where a second rollback goes is kept too"


def test_a_dry_run_tells_the_same_and_deletes_nothing(home: Path, v: list[str]) -> None:
    promote(home, v[0], v[1])
    old(home / "work" / "retrieval-0123", 8)
    before = sorted(home.rglob("*"))
    told = clean(home, Policy(1), "a test", is_dry=True)
    assert sorted(home.rglob("*")) == before
    sizes = {one.name: one.num_bytes for one in told.freed}
    assert sizes["work/retrieval-0123"] == 1000
    first = home / told.freed[0].name
    assert sizes[told.freed[0].name] == sum(one.stat().st_size for one in first.rglob("*") if one.is_file())
    assert clean(home, Policy(1), "a test") == told


def test_what_a_process_has_loaded_stays_until_it_lets_go(home: Path, v: list[str]) -> None:
    promote(home, v[5], v[6])
    registry = Registry(home)
    bundle, side, host = load(registry.path(v[0])), load_user_side(registry.path(v[1])), IndexHost(home, Place(0, 1))
    host.load(v[2])
    cleaned = clean(home, Policy(1), "a test")
    assert registry.names() == [v[0], v[1], v[2], v[5], v[6], v[7]]
    assert {(one.name, one.why) for one in cleaned.spared} == {
        (f"versions/{one}", "a process has loaded it") for one in v[:3]
    }
    with pytest.raises(RegistryError, match=f"{v[0]}: a process has loaded it; end that first"):
        registry.remove(v[0], "a test", "")
    assert bundle.version == v[0]
    assert side.version == v[1]
    del bundle, side
    host.close()
    clean(home, Policy(1), "a test")
    assert registry.names() == [v[5], v[6], v[7]]


def test_what_another_process_has_loaded_stays(home: Path, v: list[str]) -> None:
    promote(home, v[5], v[6])
    context = multiprocessing.get_context("forkserver")
    loaded = context.Event()
    process = context.Process(target=hold, args=(Registry(home).path(v[0]), loaded))
    process.start()
    assert loaded.wait(60)
    clean(home, Policy(1), "a test")
    assert v[0] in Registry(home).names()
    process.kill()
    process.join(60)
    clean(home, Policy(1), "a test")
    assert v[0] not in Registry(home).names()


def hold(path: Path, loaded: "multiprocessing.synchronize.Event") -> None:  # type: ignore[name-defined]
    bundle = load(path)
    loaded.set()
    time.sleep(600)
    assert bundle


def test_what_an_index_host_elsewhere_says_it_holds_stays(home: Path, v: list[str]) -> None:
    promote(home, v[5], v[6])
    cleaned = clean(home, Policy(1), "a test", in_use={v[0]})
    assert v[0] in Registry(home).names()
    assert [(one.name, one.why) for one in cleaned.spared] == [(f"versions/{v[0]}", "an index host holds it")]


def test_a_version_that_cannot_be_read_any_more_is_deleted_as_any_other(home: Path, v: list[str]) -> None:
    promote(home, v[5], v[6])
    for version in v[:2]:
        (home / "versions" / version / "manifest.json").unlink()
    (home / "versions" / v[2] / "manifest.json").write_text("{")
    clean(home, Policy(1), "a test")
    assert Registry(home).names() == [v[5], v[6], v[7]]


def test_a_removed_version_is_told_from_one_that_never_was(home: Path, v: list[str]) -> None:
    registry = Registry(home)
    promote(home, *v[:6])
    lines = registry.history()
    clean(home, Policy(1), "ada")
    assert registry.history() == lines
    said = rf"{v[0]} was removed on 20\d\d-.* by ada: neither live, nor among the newest 1, nor live in the last 1 "
    for refused in (lambda: registry.rollback(v[0], "a test", ""), lambda: registry.promote(v[0], "a test", "")):
        with pytest.raises(RegistryError, match=said):
            refused()
    with pytest.raises(RegistryError, match="expected one of the versions"):
        registry.rollback("20200101T0000-000000000000", "a test", "")
    assert registry.live() == v[5]
    told = CliRunner().invoke(app, ["rollback", v[0][:16], "--store", str(home.parent)])
    assert isinstance(told.exception, RegistryError)
    assert "was removed on" in str(told.exception)
    assert run("history", "--store", str(home.parent)).output.count(v[0]) == 1
    assert run("versions", "--store", str(home.parent)).exit_code == 0


def test_one_that_is_being_promoted_is_not_left_without_its_files(
    home: Path, v: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(home)
    promote(home, v[5], v[6])
    monkeypatch.setattr(
        "prerank.bundle.registry.reach",
        lambda name: clean(home, Policy(1), "a test") if name == "promote-verified" else None,
    )
    with pytest.raises(RegistryError, match=f"{v[0]} was removed on"):
        registry.promote(v[0], "a test", "")
    assert registry.live() == v[6]


def test_user_towers_are_not_looked_for_of_versions_that_were_removed(home: Path, v: list[str]) -> None:
    promote(home, *v[:6])
    clean(home, Policy(1), "a test")
    towers = UserTowers(home)
    towers.refresh({})
    assert towers.loaded == (v[5], v[4])


def test_work_goes_when_it_was_not_written_to_for_days(home: Path, v: list[str]) -> None:
    promote(home, v[7])
    work = home / "work"
    gone = [
        old(work / "retrieval-a", 8),
        old(work / "quality-a.json", 8),
        old(work / "tables" / "kuairand-1-a", 9),
        old(work / ".prepared-a", 0.1),
        old(home / "versions" / ".tmp-a", 0.1),
        old(home / "users.lmdb.tmp-12-ab", 0.1),
        old(home / ".live-0123abcd", 0.1),
    ]
    stay = [
        old(work / "retrieval-b", 6),
        old(work / "tables" / "kuairand-1-b", 8),
        old(work / ".prepared-b", 0.01),
        old(home / "versions" / ".tmp-b", 0.01),
    ]
    clean(home, Policy(8), "a test")
    assert not [path for path in gone if path.exists()]
    assert all(path.exists() for path in stay)
    clean(home, Policy(8, work_days=5), "a test")
    assert not stay[0].exists()


def test_what_a_run_that_was_stopped_may_go_on_with_stays(home: Path, v: list[str]) -> None:
    promote(home, v[5], v[6])
    with opened(home) as runs:
        stopped = runs.begin("inputs", "2026-03-09", v[0])
        runs.note(stopped, version=v[1], before=v[2])
    path = old(home / "work" / "retrieval-a", 0)
    clean(home, Policy(1, work_days=0), "a test", now=time.time() + 30 * DAY_S)
    assert path.exists()
    assert set(Registry(home).names()) == {v[0], v[1], v[2], v[5], v[6], v[7]}
    with opened(home) as runs:
        runs.end(stopped, "abandoned", "")
    clean(home, Policy(1, work_days=0), "a test", now=time.time() + 30 * DAY_S)
    assert not path.exists()
    assert Registry(home).names() == [v[5], v[6], v[7]]


def die(home: Path, place: str) -> None:
    os.environ[VARIABLE] = place
    clean(home, Policy(1), "a test")


@pytest.mark.parametrize("place", CLEAN)
def test_whoever_is_killed_leaves_whole_versions_and_the_next_clean_goes_on(
    home: Path, v: list[str], place: str
) -> None:
    registry = Registry(home)
    promote(home, v[5], v[6])
    process = multiprocessing.get_context("forkserver").Process(target=die, args=(home, place))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    for version in registry.names():
        verify(registry.path(version))
    assert registry.live() == v[6]
    assert (v[0] in registry.names()) == (place == "clean-noted")
    assert registry.names()[-5:] == v[3:], "one after another"
    cleaned = clean(home, Policy(1), "a test")
    assert registry.names() == [v[5], v[6], v[7]]
    assert sorted(path.name for path in (home / "versions").iterdir()) == registry.names()
    assert set(removals(home)) == set(v[:5])
    assert any(one.why == "half deleted before" for one in cleaned.freed) == (place != "clean-noted")


def test_a_policy_that_keeps_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="--keep 0: expected 1 or more versions"):
        Policy(0)
    for days in (-1.0, float("nan")):
        with pytest.raises(ConfigError, match="expected 0 or more days"):
            Policy(1, days)


def test_the_command_tells_what_it_frees(home: Path, v: list[str]) -> None:
    promote(home, v[5], v[6])
    where = ["clean", "--store", str(home.parent)]
    told = run(*where, "--keep", "1", "--dry-run")
    assert told.exit_code == 0, told.output
    assert f"versions/{v[0]}" in told.output
    assert "MB would be freed" in told.output
    assert Registry(home).names() == v
    host = IndexHost(home, Place(0, 1))
    host.load(v[1])
    done = run(*where, "--keep", "1")
    assert done.exit_code == 0, done.output
    assert f"spared versions/{v[1]}: a process has loaded it" in done.output
    assert "MB freed" in done.output
    assert Registry(home).names() == [v[1], v[5], v[6], v[7]]
    assert run(*where, "--keep", "0").exit_code == 2
    assert run(*where, "--work-days", "-1").exit_code == 2
    for wrong in (run("clean", "--store", str(home)), run(*where, "--index-hosts", "0=127.0.0.1:9")):
        assert wrong.exit_code == 1
        assert isinstance(wrong.exception, PrerankError)
    assert str(wrong.exception).startswith("nothing is deleted: shard 0 of 1, 127.0.0.1:9: ")
    with alone(home):
        busy = run(*where)
    assert busy.exit_code == 75
    assert "a retrain runs already" in busy.output


def test_a_retrain_that_is_told_to_keeps_so_many(
    small: tuple[Config, Path], retrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Registry(retrained).live()
    stale = old(retrained / "work" / "retrieval-a", 30)
    done = retrain(Asked(*small, retrained, fresh=True, keep=1))
    assert done.run.outcome == "promoted"
    assert not stale.exists()
    assert Registry(retrained).names() == sorted([str(first), done.run.version]), "to go back to"
    with opened(retrained) as runs:
        (step,) = (step for step in runs.steps(done.run) if step.name == "clean")
    assert step.said.startswith("1 things deleted, 0.0 MB")

    def cannot(self: SinglePointer) -> set[str]:
        raise PrerankError("a host does not answer")

    monkeypatch.setattr(SinglePointer, "in_use", cannot)
    last = retrain(Asked(*small, retrained, again=True, fresh=True, keep=1))
    assert last.run.outcome == "promoted", "what is not deleted is no failure"


def test_a_run_that_was_refused_deletes_nothing(small: tuple[Config, Path], retrained: Path) -> None:
    strict = world.config(**world.quick(validate={"retrieval_recall": {"at_least": 1.0}}))
    stale = old(retrained / "work" / "retrieval-a", 30)
    assert retrain(Asked(strict, small[1], retrained, keep=1)).run.outcome == "refused"
    assert stale.exists()
