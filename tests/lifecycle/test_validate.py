"""A version may serve only if every gate of its own funnel file holds, measured on its published files."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from prerank.bundle.registry import Registry
from prerank.config import GATES, Bound
from prerank.errors import GateFailed
from prerank.lifecycle.build import Quality, evaluate, publish_trained
from prerank.lifecycle.training import train
from prerank.lifecycle.validate import MEASURES, validate


def published_with(world, trained, home, bounds: dict[str, Bound]) -> str:
    config = replace(world.config, validate=bounds)
    return publish_trained(replace(trained, config=config), world.tables(), home, {})


def test_every_gate_a_funnel_file_may_bound_is_measured():
    assert set(MEASURES) == set(GATES)


def test_gates_that_hold_let_a_version_be_promoted(world, trained, tmp_path):
    bounds = {
        "retrieval_recall": Bound(at_least=0.0),
        "recall_over_popularity": Bound(at_least=0.0),
        "normalised_entropy": Bound(at_most=5.0),
        "calibration_error": Bound(at_least=0.0, at_most=1.0),
        "golden": Bound(at_least=1.0),
    }
    version = published_with(world, trained, tmp_path, bounds)
    gates = validate(tmp_path, version, trained.prepared, world.tables())
    assert [g.name for g in gates] == [*bounds, "finite_weights", "index_recall", "complete_days", "feature_coverage"]
    assert all(g.holds for g in gates)
    assert gates[3].bound == "at least 0, at most 1"
    Registry(tmp_path).promote(version, by="test", why="")
    assert Registry(tmp_path).live() == version


def test_one_gate_that_fails_leaves_the_version_unpointed_and_says_by_how_much(world, trained, tmp_path):
    version = published_with(world, trained, tmp_path, {"retrieval_recall": Bound(at_least=1.0)})
    gate = validate(tmp_path, version, trained.prepared, world.tables())[0]
    assert (gate.name, gate.holds) == ("retrieval_recall", False)
    assert gate.off == gate.measured - 1
    with pytest.raises(GateFailed, match="retrieval_recall"):
        Registry(tmp_path).promote(version, by="test", why="")
    assert Registry(tmp_path).live() is None
    written = json.loads((tmp_path / "versions" / version / "validation.json").read_text())
    assert "retrieval_recall" in json.dumps(written)


def test_a_damaged_version_fails_its_golden_gate(world, trained, tmp_path):
    version = published_with(world, trained, tmp_path, {"golden": Bound(at_least=1.0)})
    path = tmp_path / "versions" / version / "scorer.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    (gate,) = validate(tmp_path, version, trained.prepared, world.tables())
    assert (gate.name, gate.holds) == ("golden", False)
    assert "scorer.safetensors" in gate.about


def test_untrained_towers_do_not_beat_popularity(world, trained, tmp_path):
    torch.manual_seed(0)
    spoilt = replace(trained, towers=type(trained.towers)(
        world.config.features, trained.prepared.transforms.sizes(), world.config.retrieval))  # fmt: skip
    with torch.no_grad():
        spoilt.towers.popularity_weight.zero_()
    version = published_with(world, spoilt, tmp_path, {"recall_over_popularity": Bound(at_least=1.2)})
    assert not validate(tmp_path, version, trained.prepared, world.tables())[0].holds


def test_a_second_training_finds_everything_done(world, trained):
    again = train(world.config, world.tables(), world.home)
    assert again.run == trained.run
    assert again.retrieval_epochs == trained.retrieval_epochs
    for name, tensor in trained.towers.state_dict().items():
        assert torch.equal(tensor, again.towers.state_dict()[name])


def test_the_same_training_publishes_the_same_version(world, trained, published):
    assert publish_trained(trained, world.tables(), world.home, {}) == published


def test_quality_is_measured_once_and_read_back_the_same(world, trained, tmp_path):
    (tmp_path / "work").mkdir()
    first = evaluate(trained, tmp_path)
    assert isinstance(first, Quality)
    assert evaluate(trained, tmp_path) == first


def test_popularity_of_a_version_is_that_of_the_whole_log(world, trained, published, tmp_path):
    shutil.copytree(world.home / "versions" / published, tmp_path / published)
    from prerank.bundle.load import load

    bias = load(tmp_path / published).index.vectors[:, -1]
    log = trained.prepared.events
    late = np.bincount(log["item"][log["day"] == log["day"].max()], minlength=len(bias))
    assert np.corrcoef(bias.numpy() * trained.towers.popularity_weight[0].item(), late)[0, 1] > 0.2
