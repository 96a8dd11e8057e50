"""A retrain moves the window, begins with the live weights, and every step may be killed."""

import fcntl
import re
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from prerank.bundle.load import Bundle, load
from prerank.bundle.registry import Registry
from prerank.config import Config
from prerank.errors import AlreadyRunning, BundleError, ConfigError, DataError, PrerankError
from prerank.features.transforms import Transforms
from prerank.lifecycle.retrain import Asked, retrain
from prerank.lifecycle.runs import LOCK, opened, running
from prerank.lifecycle.watching import Limits, Sample, Watch
from prerank.lifecycle.window import moved, newest_complete_day
from prerank.models.rankers import build_ranker
from prerank.models.towers import build_towers
from prerank.train.warm import WarmStart
from tests.lifecycle import world
from tests.lifecycle.server import Server
from tests.lifecycle.world import Made


@pytest.fixture
def world_version(world, published) -> Bundle:  # type: ignore[no-untyped-def]
    return load(world.home / "versions" / published)


def test_the_newest_day_is_the_last_that_the_log_has_whole(small: tuple[Config, Path], tmp_path: Path) -> None:
    config, _ = small
    whole, noon = world.log(), world.log()[: -world.A_DAY // 2]
    for log, day in ((whole, world.day(7)), (noon, world.day(6))):
        tables = world.open_tables(config, world.write(tmp_path / day, log), tmp_path / "work")
        assert newest_complete_day(config, tables) == day
    tables = world.open_tables(config, world.write(tmp_path / "short", whole[: 5 * world.A_DAY]), tmp_path / "work")
    with pytest.raises(
        DataError, match=f"is {world.day(4)}, and .data..validate ends on {world.day(5)}: .*bring the log"
    ):
        newest_complete_day(config, tables)


def test_every_window_moves_by_as_many_days_and_keeps_its_length(small: tuple[Config, Path]) -> None:
    config, _ = small
    data = moved(config, world.day(7)).data
    assert data.train == (world.day(2), world.day(6))
    assert data.validate == (world.day(7), world.day(7))
    assert data.test == (world.day(8), world.day(8))
    assert moved(config, config.data.validate[1]) == config
    with pytest.raises(ConfigError, match=f"expected a day such as {world.day(5)}, got 'monday'"):
        moved(config, "monday")


def test_a_table_that_is_moved_to_another_vocabulary_keeps_each_values_row(second: Made, tmp_path: Path) -> None:
    """The live version knew other values, so the same value has another row now."""
    bundle = load(tmp_path / "versions" / second.publish(tmp_path))
    warm = WarmStart.of(bundle)
    names = bundle.transforms.names("user", "taste")
    assert names == tuple(range(8))
    fewer = pa.table({"taste": [7, 3, 99], "age": [20.0, 30.0, 40.0]})
    items, ones = world.items(), torch.ones(world.ITEMS, dtype=torch.int64).numpy()
    context = [pa.table({"hour": list(range(24))})]
    other = Transforms.fit(bundle.config.features, users=(fewer, ones[:3]), items=(items, ones), context=context)
    towers = build_towers(bundle.config, other.sizes())
    fresh = towers.user_tower.encoder.tables["taste"].weight.detach().clone()  # type: ignore[union-attr,operator]
    assert warm.give("towers", towers, bundle.config, other) == ""
    now = towers.user_tower.encoder.tables["taste"].weight  # type: ignore[union-attr,operator]
    old = bundle.towers.user_tower.encoder.tables["taste"].weight  # type: ignore[union-attr,operator]
    for row, value in enumerate((3, 7), start=1):
        assert torch.equal(now[row], old[1 + value])
    assert torch.equal(now[3], fresh[3]), "99 is new"
    assert torch.equal(now[0], old[0])
    for name, weight in towers.state_dict().items():
        if "taste" not in name:
            assert torch.equal(weight, bundle.towers.state_dict()[name]), name


def test_every_kind_of_model_begins_where_the_live_one_ended(world_version: Bundle) -> None:
    """Attention, counters, hashed tables, bags that share a table: of the market's funnel."""
    bundle = world_version
    warm, sizes = WarmStart.of(bundle), bundle.transforms.sizes()
    models = {"towers": build_towers(bundle.config, sizes), "ranker": build_ranker(bundle.config, sizes)}
    for part, model in models.items():
        assert isinstance(model, torch.nn.Module)
        assert warm.give(part, model, bundle.config, bundle.transforms) == ""  # type: ignore[arg-type]
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, warm.weights[part][name]), name  # type: ignore[index]


def test_weights_that_do_not_fit_are_left_alone_and_told(second: Made, tmp_path: Path) -> None:
    bundle = load(tmp_path / "versions" / second.publish(tmp_path))
    warm, sizes = WarmStart.of(bundle), bundle.transforms.sizes()
    config = bundle.config
    other = replace(config, retrieval=replace(config.retrieval, hidden=(17,)))
    towers = build_towers(other, sizes)
    before = {name: weight.clone() for name, weight in towers.state_dict().items()}
    assert "is [16" in warm.give("towers", towers, other, bundle.transforms)
    assert all(torch.equal(weight, before[name]) for name, weight in towers.state_dict().items())
    tasks = replace(config, tasks={"view": next(iter(config.tasks.values()))})
    assert "its tasks are ['click']" in warm.give("ranker", towers, tasks, bundle.transforms)
    deeper = replace(config, retrieval=replace(config.retrieval, hidden=(16, 16)))
    assert "is of one of them only" in warm.give("towers", build_towers(deeper, sizes), deeper, bundle.transforms)


def test_a_retrain_goes_live_for_the_newest_day_and_begins_with_the_live_weights(
    small: tuple[Config, Path], retrained: Path
) -> None:
    before = Registry(retrained).live()
    made = retrain(Asked(*small, retrained))
    assert made.is_new
    assert (made.run.outcome, made.run.day, made.run.warm, made.run.before) == (
        "promoted", world.day(7), before, before
    )  # fmt: skip
    assert Registry(retrained).live() == made.run.version != before
    assert load(Registry(retrained).path(made.run.version)).config.data.validate[1] == world.day(7)
    with opened(retrained) as runs:
        steps = {step.name: step.said for step in runs.steps(made.run)}
    assert list(steps) == ["check", "train", "publish", "validate", "roll out"]
    assert steps["train"] == f"from the weights of {before}"
    assert Registry(retrained).history()[-1].why == f"run {made.run.id}: every gate holds on {world.day(7)}"
    again = retrain(Asked(*small, retrained))
    assert (again.is_new, again.run) == (False, made.run)


def test_fresh_begins_from_nothing_and_is_another_run(small: tuple[Config, Path], retrained: Path) -> None:
    made = retrain(Asked(*small, retrained, day=world.day(6), fresh=True))
    assert made.is_new
    assert made.run.warm == ""
    assert made.run.why == "it is what is live already", "the first one began from nothing too"


def test_a_live_version_that_is_damaged_is_no_start(small: tuple[Config, Path], retrained: Path) -> None:
    (Registry(retrained).path(str(Registry(retrained).live())) / "retrieval.safetensors").write_bytes(b"cut")
    made = retrain(Asked(*small, retrained))
    assert made.run.outcome == "promoted"
    with opened(retrained) as runs:
        said = runs.steps(made.run)[1].said
    assert said.startswith("from nothing: the live version cannot be loaded: ")
    assert "retrieval.safetensors" in said


def test_a_version_the_gate_refuses_stays_unpointed_and_is_not_trained_again(
    small: tuple[Config, Path], retrained: Path
) -> None:
    live = Registry(retrained).live()
    strict = replace(small[0], validate=world.config(validate={"retrieval_recall": {"at_least": 1.0}}).validate)
    made = retrain(Asked(strict, small[1], retrained))
    assert made.run.outcome == "refused"
    assert made.run.why.startswith("retrieval_recall: expected at least 1, measured 0.")
    assert Registry(retrained).live() == live
    again = retrain(Asked(strict, small[1], retrained))
    assert (again.is_new, again.run.outcome) == (False, "refused")
    assert retrain(Asked(strict, small[1], retrained, again=True)).is_new


def test_data_with_errors_is_not_trained_on(small: tuple[Config, Path], retrained: Path, tmp_path: Path) -> None:
    log = pa.concat_tables([world.log()[: 3 * world.A_DAY], world.log()[4 * world.A_DAY :]])
    with pytest.raises(DataError, match=f"data.train: day without rows: .*{world.day(3)}"):
        retrain(Asked(small[0], world.write(tmp_path / "bad", log), retrained))
    with opened(retrained) as runs:
        assert runs.latest()[0].outcome == "failed"
        assert world.day(3) in runs.latest()[0].why


def test_two_retrainers_cannot_run_at_once(small: tuple[Config, Path], retrained: Path) -> None:
    with (retrained / LOCK).open("w") as file:
        file.write("12345\n")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        assert running(retrained) == "process 12345"
        with pytest.raises(AlreadyRunning, match="a retrain runs already, process 12345; two would undo each other"):
            retrain(Asked(*small, retrained))
    assert running(retrained) == ""


@pytest.mark.parametrize(
    ("server", "why"),
    [
        ({"bad": 5.0}, "5.0% of 100 requests were errors, expected at most 1.0%"),
        ({"slow": True}, r"p99 is \d+ ms over 100 requests, expected at most 1000 ms"),
        ({"loads": False}, "the server could not load"),
    ],
)
def test_a_version_that_breaks_while_it_is_watched_is_rolled_back_by_itself(
    small: tuple[Config, Path], retrained: Path, server: dict[str, float], why: str
) -> None:
    before = Registry(retrained).live()
    made = retrain(Asked(*small, retrained, watch=Server(retrained, **server).watch()))  # type: ignore[arg-type]
    assert made.run.outcome == "rolled back"
    assert re.search(why, made.run.why)
    assert Registry(retrained).live() == before
    last = Registry(retrained).history()[-1]
    assert (last.action, last.by, last.why) == ("rollback", "prerank retrain", f"run {made.run.id}: {made.run.why}")
    assert not retrain(Asked(*small, retrained)).is_new, "it would be the same again"


def test_a_version_that_holds_is_watched_to_the_end(small: tuple[Config, Path], retrained: Path) -> None:
    server = Server(retrained)
    made = retrain(Asked(*small, retrained, watch=server.watch(for_s=20.0)))
    assert made.run.outcome == "promoted"
    assert server.at == pytest.approx(20.0)
    assert "watched for 20 s: 500 requests, 0 errors, p99 10 ms" in made.run.why


def test_what_cannot_be_watched_is_not_begun(small: tuple[Config, Path], retrained: Path) -> None:
    def gone() -> Sample:
        raise PrerankError("nobody answers")

    live = Registry(retrained).live()
    with pytest.raises(PrerankError, match="nobody answers"):
        retrain(Asked(*small, retrained, watch=Watch({"gone": gone}, 1.0, Limits())))
    assert Registry(retrained).live() == live
    assert len(Registry(retrained).versions()) == 1


def test_a_first_version_that_breaks_stays_for_there_is_nothing_to_go_back_to(
    small: tuple[Config, Path], tmp_path: Path
) -> None:
    home = tmp_path / "tastes"
    with pytest.raises(BundleError, match=r"is broken \(server: 5.0% of .*there is nothing to roll back to"):
        retrain(Asked(*small, home, watch=Server(home, bad=5.0).watch()))
    with opened(home) as runs:
        (run,) = runs.latest()
    assert (run.outcome, Registry(home).live()) == ("failed", run.version)


def test_a_version_before_that_is_damaged_is_not_rolled_back_to(small: tuple[Config, Path], retrained: Path) -> None:
    before = Registry(retrained).path(str(Registry(retrained).live()))

    class Spoils(Server):
        def __call__(self) -> Sample:
            found = super().__call__()
            if found.errors:
                (before / "scorer.safetensors").write_bytes(b"cut")
            return found

    with pytest.raises(BundleError, match=r"scorer\.safetensors: expected \d+ bytes, found 3"):
        retrain(Asked(*small, retrained, watch=Spoils(retrained, bad=5.0).watch()))
    with opened(retrained) as runs:
        run = runs.latest()[0]
        assert run.outcome == "failed"
        assert [step.name for step in runs.steps(run)][-2:] == ["watch", "roll back"]
    assert Registry(retrained).live() == run.version
