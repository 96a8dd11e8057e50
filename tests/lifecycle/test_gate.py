"""The gate refuses what would serve worse, saying what failed and by how much, and accepts an honest retrain."""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pytest
import torch

from prerank._tensor_files import read_tensors, write_tensors
from prerank.bundle import index_build, manifest
from prerank.bundle import publish as publishing
from prerank.bundle.golden import Golden
from prerank.bundle.load import load
from prerank.bundle.registry import Gate, Registry
from prerank.config import Bound, HeavyRankerConfig
from prerank.errors import BundleError, GateFailed
from prerank.index.exact import ExactIndex
from prerank.lifecycle.build import load_users
from prerank.lifecycle.training import Trained
from prerank.lifecycle.validate import DEFAULTS, validate
from prerank.models.rankers import build_ranker
from tests.bundle.world import sign_again
from tests.lifecycle import world
from tests.lifecycle.world import Made

Spoil: TypeAlias = Callable[[pa.Table], pa.Table]


@pytest.fixture
def home(live_store: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(live_store, tmp_path / "tastes"))


def judged(home: Path, version: str, made: Made) -> dict[str, Gate]:
    gates = validate(home, version, made.trained.prepared, made.tables)
    assert Registry(home).versions()[-1].gates is not None
    return {gate.name: gate for gate in gates}


def refused(home: Path, version: str, gates: dict[str, Gate], *names: str) -> None:
    """These gates fail, so the version stays unpointed and whoever promotes it is told what failed, and by how much."""
    before = Registry(home).live()
    failed = {name for name, gate in gates.items() if not gate.holds}
    assert set(names) <= failed, gates
    with pytest.raises(GateFailed, match=f"{version}: gate ({'|'.join(failed)}) expected .*, measured "):
        Registry(home).promote(version, "a test", "")
    assert Registry(home).live() == before
    written = json.loads((home / "versions" / version / "validation.json").read_text())["gates"]
    assert {one["name"] for one in written if not one["holds"]} == failed


def trained_on(
    tastes: Path,
    tmp_path: Path,
    spoil: Spoil,
    users: pa.Table | None = None,
    **sections: object,
) -> Made:
    """What a retrain makes of the log as `spoil` leaves it."""
    data = world.write(tmp_path / "spoilt", spoil(world.log()), users)
    return world.made(world.moved(world.config(seed=8, **sections), 1), data, tmp_path / "trained")


def test_an_honest_retrain_is_accepted(home: Path, second: Made) -> None:
    live = Registry(home).live()
    version = second.publish(home)
    gates = judged(home, version, second)
    assert all(gate.holds for gate in gates.values()), gates
    assert set(gates) == {*world.BOUNDS, *DEFAULTS}
    for name in ("retrieval_recall", "normalised_entropy", "latency_ms", "memory_mib"):
        assert gates[name].live is not None, name
    assert 0 < gates["embedding_drift"].measured < 0.8
    Registry(home).promote(version, "a test", "it is better")
    assert Registry(home).live() == version != live


def test_shuffled_labels_are_refused(home: Path, tastes: Path, tmp_path: Path) -> None:
    def shuffle(log: pa.Table) -> pa.Table:
        clicks = np.random.default_rng(0).permutation(log["is_click"].to_numpy())
        return log.set_column(log.schema.get_field_index("is_click"), "is_click", pa.array(clicks))

    spoilt = trained_on(tastes, tmp_path, shuffle)
    version = spoilt.publish(home)
    gates = judged(home, version, spoilt)
    refused(home, version, gates, "normalised_entropy")
    assert gates["normalised_entropy"].off > 0
    assert "too high" in gates["normalised_entropy"].said()


def test_labels_shuffled_in_training_alone_are_refused_against_live(home: Path, tastes: Path, tmp_path: Path) -> None:
    """The newest day is as it was, so the live version still does what the candidate cannot."""

    def shuffle(log: pa.Table) -> pa.Table:
        clicks = log["is_click"].to_numpy().copy()
        until = 6 * world.A_DAY
        clicks[:until] = np.random.default_rng(0).permutation(clicks[:until])
        return log.set_column(log.schema.get_field_index("is_click"), "is_click", pa.array(clicks))

    bounds = {"normalised_entropy": {"not_above_live_by": 0.05}}
    spoilt = trained_on(tastes, tmp_path, shuffle, validate=bounds)
    version = spoilt.publish(home)
    gates = judged(home, version, spoilt)
    refused(home, version, gates, *bounds)
    entropy = gates["normalised_entropy"]
    assert entropy.live is not None
    assert entropy.off == pytest.approx(entropy.measured - (entropy.live + 0.05))
    assert f"{entropy.off:.4g} too high (live has {entropy.live:g})" in entropy.said()


def test_a_day_that_is_missing_is_refused(home: Path, tastes: Path, tmp_path: Path) -> None:
    def without(log: pa.Table) -> pa.Table:
        return pa.concat_tables([log[: 3 * world.A_DAY], log[4 * world.A_DAY :]])

    spoilt = trained_on(tastes, tmp_path, without, **world.quick())
    version = spoilt.publish(home)
    gates = judged(home, version, spoilt)
    refused(home, version, gates, "complete_days")
    assert gates["complete_days"].measured == 0
    assert gates["complete_days"].about == f"{world.day(3)} has 0 impressions, the median day 1,600"


def test_a_feature_that_is_empty_in_the_whole_data_is_refused_against_what_live_was_trained_on(
    home: Path, tastes: Path, tmp_path: Path
) -> None:
    users = world.users()
    users = users.set_column(1, "taste", pa.nulls(world.USERS, pa.int64()))
    spoilt = trained_on(tastes, tmp_path, lambda log: log, users, **world.quick())
    version = spoilt.publish(home)
    gates = judged(home, version, spoilt)
    refused(home, version, gates, "feature_coverage")
    assert "taste is filled on 0.0% of" in gates["feature_coverage"].about
    assert "100.0% of the live version's training impressions" in gates["feature_coverage"].about


def test_a_feature_that_is_empty_since_the_newest_day_is_refused(home: Path, tastes: Path, tmp_path: Path) -> None:
    def empty(log: pa.Table) -> pa.Table:
        is_old = np.arange(log.num_rows) < 6 * world.A_DAY
        hours = pa.array(log["hour"].to_numpy(), mask=~is_old)
        return log.set_column(log.schema.get_field_index("hour"), "hour", hours)

    spoilt = trained_on(tastes, tmp_path, empty, **world.quick())
    version = spoilt.publish(home)
    gates = judged(home, version, spoilt)
    refused(home, version, gates, "feature_coverage")
    assert gates["feature_coverage"].about.startswith(f"hour is filled on 0.0% of the impressions of {world.day(6)}")


def test_a_feature_that_is_empty_in_serving_alone_is_refused(home: Path, second: Made, tmp_path: Path) -> None:
    version = second.publish(home)
    users = world.users().set_column(1, "taste", pa.nulls(world.USERS, pa.int64()))
    tables = world.open_tables(world.config(), world.write(tmp_path / "empty", world.log(), users), tmp_path / "work")
    load_users(second.trained.config, tables, second.trained.prepared, home)
    gates = judged(home, version, second)
    refused(home, version, gates, "feature_coverage", "served_parity")
    assert "taste is filled on 0.0% of requests as served" in gates["feature_coverage"].about
    assert gates["served_parity"].about == "taste differs in 100.0% of requests"


def test_an_index_of_other_towers_is_refused(home: Path, first: Made, second: Made) -> None:
    version = second.publish(home)
    shutil.copy(home / "versions" / str(Registry(home).live()) / manifest.INDEX, home / "versions" / version / "index")
    path = sign_again(home / "versions" / version)
    gates = judged(home, path.name, second)
    refused(home, path.name, gates, "golden")
    assert "its user vectors would be of another space" in gates["golden"].about


def test_an_index_of_other_towers_that_says_it_is_of_these_is_refused(home: Path, second: Made) -> None:
    """Its golden answers are those of that index, so they do not show it."""
    path = home / "versions" / second.publish(home)
    bundle, others = load(path), load(home / "versions" / str(Registry(home).live()))
    user = {n: t.clone() for n, t in Golden.from_tensors(read_tensors(path / manifest.GOLDEN)[0]).user.items()}
    index = ExactIndex(others.index.vectors.clone())  # type: ignore[attr-defined]
    asked = Golden.ask(user, bundle.towers, index, bundle.scorer, keep=50, k=10).to_tensors()
    for name in (manifest.INDEX, manifest.GOLDEN):
        (path / name).unlink()  # and not written over: it is mapped
    write_tensors(path / manifest.GOLDEN, asked, {})
    index.save(path / manifest.INDEX, {"retrieval": manifest.FileEntry.of(path / manifest.RETRIEVAL).model_id})
    version = sign_again(path).name
    gates = judged(home, version, second)
    assert gates["golden"].holds
    refused(home, version, gates, "index_recall")


def test_towers_of_two_trainings_are_refused(home: Path, first: Made, second: Made) -> None:
    def swapped(trained: Trained) -> Trained:
        towers = copy.deepcopy(trained.towers)
        towers.user_tower = first.trained.towers.user_tower
        return replace(trained, towers=towers)

    version = second.publish(home, swapped)
    gates = judged(home, version, second)
    assert gates["golden"].holds
    assert gates["index_recall"].holds
    refused(home, version, gates, "retrieval_recall", "embedding_drift")


def test_weights_that_are_not_finite_are_refused_twice(
    home: Path, second: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At publishing; and by the gate in a version that came another way, where no golden request reads them."""

    def spoilt(trained: Trained) -> Trained:
        towers = copy.deepcopy(trained.towers)
        with torch.no_grad():
            towers.user_tower.encoder.tables["taste"].weight[0] = torch.nan  # type: ignore[union-attr,operator]
        return replace(trained, towers=towers)

    with pytest.raises(BundleError, match=r"weights 'user_tower.encoder.tables.taste.weight': 8 are not finite"):
        second.publish(home, spoilt)
    for where in (publishing, index_build):
        monkeypatch.setattr(where, "refuse_nonfinite", lambda numbers, what: None)
    version = second.publish(home, spoilt)
    gates = judged(home, version, second)
    assert gates["golden"].holds
    refused(home, version, gates, "finite_weights")
    assert gates["finite_weights"].about == "towers: user_tower.encoder.tables.taste.weight is not finite"


@pytest.mark.alone
def test_a_model_five_times_slower_is_refused(home: Path, second: Made) -> None:
    def slow(trained: Trained) -> Trained:
        config = trained.config
        options = replace(config.ranker, model="mmoe_dcn", width=1536, experts=6, cross_layers=3, hidden=(512,))
        slow = replace(config, ranker=options, retrieval=replace(config.retrieval, keep=560))
        return replace(trained, config=slow, ranker=build_ranker(slow, trained.prepared.transforms.sizes()))

    bounds = {"latency_ms": Bound(at_most_of_live=3.0), "memory_mib": Bound(at_most_of_live=1.5)}
    version = second.publish(home, slow, **bounds)
    gates = judged(home, version, second)
    refused(home, version, gates, *bounds)
    latency = gates["latency_ms"]
    assert latency.live is not None
    assert latency.measured > 5 * latency.live


def test_a_live_version_that_cannot_be_measured_holds_up_what_is_bound_to_it(home: Path, second: Made) -> None:
    (home / "versions" / str(Registry(home).live()) / manifest.SCORER).write_bytes(b"cut")
    version = second.publish(home)
    gates = judged(home, version, second)
    refused(home, version, gates, "retrieval_recall", "memory_mib")
    assert "the live version" in gates["retrieval_recall"].about
    assert "scorer.safetensors" in gates["retrieval_recall"].about
    assert "roll back to one that can be" in gates["retrieval_recall"].about
    assert gates["calibration_error"].holds, "it is bound by an absolute number alone"


def test_kl_to_the_teacher_is_of_both_versions_and_needs_the_teacher(home: Path, tastes: Path, tmp_path: Path) -> None:
    heavy = HeavyRankerConfig(width=8, hidden=(8,), experts=1, cross_layers=1, low_rank=2, heads=1, epochs=1, folds=0)
    distillation = {"candidates": 2, "among": 50}
    plain = {"heavy_ranker": json.loads(json.dumps(asdict(heavy))), "distillation": distillation}
    bounds = {"kl_loss": {"at_most": 1.0, "not_above_live_by": 1.0}}
    taught = trained_on(tastes, tmp_path, lambda log: log, **world.quick(**plain, validate=bounds))
    version = taught.publish(home)
    prepared = taught.trained.prepared
    gates = {g.name: g for g in validate(home, version, prepared, taught.tables, taught.trained.heavy)}
    found = gates["kl_loss"]
    assert found.holds, found
    assert 0 < found.measured < 1
    assert found.live is not None
    assert found.live != found.measured
    gates = judged(home, version, taught)
    refused(home, version, gates, "kl_loss")
    assert "the heavy ranker that taught this version is not at hand" in gates["kl_loss"].about


def test_a_gate_that_cannot_be_measured_fails_and_says_why(first: Made, tmp_path: Path) -> None:
    version = first.publish(tmp_path, served_parity=Bound(at_most=0.1))
    (tmp_path / "users.lmdb").unlink()
    gates = judged(tmp_path, version, first)
    assert not gates["served_parity"].holds
    assert "users.lmdb: no user store" in gates["served_parity"].about
    with pytest.raises(GateFailed, match=r"gate served_parity .*, measured nan; .*load the users first"):
        Registry(tmp_path).promote(version, "a test", "")
