"""Examples see only what came before them, and the two losses train towers that resume exactly."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from prerank.config import Popularity
from prerank.models.towers import build_towers
from prerank.train.checkpoint import CHECKPOINT
from prerank.train.examples import UserExamples, item_tensors
from prerank.train.losses import sampled_softmax_loss
from prerank.train.retrieval import WARM_UP, Groups, ItemPopularity, train_retrieval
from prerank.types import day_number


def test_a_group_is_one_user_one_day_and_at_most_group_events(world, trained):
    prepared, config = trained.prepared, world.config
    groups = Groups.build(prepared, config)
    log = prepared.events
    for start, end in zip(groups.start, groups.end, strict=True):
        events = groups.events[start:end]
        assert 0 < len(events) <= config.retrieval.group
        assert len(np.unique(log["user"][events])) == len(np.unique(log["day"][events])) == 1
        assert (np.diff(log["time_ms"][events]) >= 0).all()
    assert log["day"][groups.events].max() == day_number(config.data.train[1])


def test_weights_are_the_largest_target_of_an_event_and_known_items_are_no_targets(world, trained):
    prepared, config = trained.prepared, world.config
    groups = Groups.build(prepared, config)
    clicked = prepared.happened("is_click")[groups.events]
    np.testing.assert_allclose(groups.weight, np.where(clicked, 1.0, 0.1), rtol=1e-6)
    log, had = prepared.events, {}
    left_out = []
    for event in range(len(log["day"])):
        pair = (int(log["user"][event]), int(log["item"][event]))
        if pair in had and had[pair] < log["time_ms"][event]:
            left_out.append(event)
        if prepared.happened("is_click")[event]:
            had.setdefault(pair, log["time_ms"][event])
    assert left_out
    assert not np.isin(left_out, groups.events).any()


def test_histories_hold_only_what_lies_strictly_before(world, trained):
    """Every history equals the user's earlier events in plain Python."""
    prepared, config = trained.prepared, world.config
    chosen = np.random.default_rng(0).choice(len(prepared.events["day"]), 200, replace=False)
    features = UserExamples(prepared, config.features).at(chosen)
    log = {name: np.asarray(column) for name, column in prepared.events.items()}
    advertiser = prepared.items["advertiser_id"]
    length = config.features.histories()["clicks"].length
    for row, event in enumerate(chosen):
        mine = (log["user"] == log["user"][event]) & (log["time_ms"] < log["time_ms"][event])
        earlier = advertiser[log["item"][mine & prepared.happened("is_click")]][-length:]
        expected = np.concatenate([np.full(length - len(earlier), -1), earlier])
        np.testing.assert_array_equal(features["clicks"][row].numpy(), expected)


def test_popularity_of_a_day_counts_earlier_days_only(world, trained):
    prepared, config = trained.prepared, world.config
    counted = ItemPopularity(prepared, config)
    first_day = config.data.train[0]
    assert torch.equal(counted.at(first_day), torch.zeros_like(counted.at(first_day)))
    log = prepared.events
    on_first = np.bincount(log["item"][log["day"] == day_number(first_day)], minlength=len(prepared.item_ids))
    on_second = np.bincount(log["item"][log["day"] == day_number(first_day) + 1], minlength=len(prepared.item_ids))
    second = counted.table[1, :, 0].numpy()
    assert np.corrcoef(np.argsort(np.argsort(second)), on_first)[0, 1] > 0.3
    assert second[on_first == 0].max() == second[on_first == 0].min()
    assert (on_second[on_first == 0] > 0).any()


MIXED = {"loss": "sampled_softmax", "uniform_negatives": 50, "cached_batches": 3}


@pytest.mark.parametrize(
    "options", [{"loss": "softmax"}, {"loss": "sampled_softmax"}, {"loss": "in_batch_softmax"}, MIXED]
)
def test_towers_of_one_seed_are_the_same_also_when_training_was_stopped(world, trained, tmp_path, options):
    config = replace(world.config, retrieval=replace(world.config.retrieval, **options, epochs=2))
    straight, records = train_retrieval(trained.prepared, config, tmp_path / "straight", "id")

    class Stopped(Exception):
        pass

    def stop(what, done, total, unit):
        if "epoch 2" in what:
            raise Stopped

    with pytest.raises(Stopped):
        train_retrieval(trained.prepared, config, tmp_path / "stopped", "id", report=stop)
    assert (tmp_path / "stopped" / CHECKPOINT).exists()
    resumed, again = train_retrieval(trained.prepared, config, tmp_path / "stopped", "id")
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert records[-1]["loss"] < records[0]["loss"]
    assert [r["loss"] for r in records] == [r["loss"] for r in again]


def test_similarity_is_a_plain_dot_product_with_everything_folded_in(world, trained):
    options = replace(world.config.retrieval, normalise=True, temperature=0.1, popularity=Popularity(half_life_days=()))
    config = replace(world.config, retrieval=options)
    towers = build_towers(config, trained.prepared.transforms.sizes()).eval()
    users = UserExamples(trained.prepared, config.features).at(np.arange(5))
    none = torch.zeros(len(trained.prepared.item_ids), 0)
    user_BD, item_ID = towers.user_side(users), towers.item_side(item_tensors(trained.prepared), none)
    torch.testing.assert_close(user_BD[:, :-1].norm(dim=1), torch.full((5,), 10.0))
    torch.testing.assert_close(item_ID[:, :-1].norm(dim=1), torch.ones(len(item_ID)))
    assert (user_BD[:, -1] == 1).all()
    assert (item_ID[:, -1] == 0).all()
    assert user_BD.shape[1] == item_ID.shape[1] == towers.width


def test_each_kind_of_negatives_trains_other_towers(world, trained, tmp_path):
    """An option that changed nothing would be a name only."""
    found = {}
    for name, options in {
        "softmax": {"loss": "softmax"},
        "none": {"loss": "in_batch_softmax"},
        "batch": {"loss": "sampled_softmax"},
        "uniform": {"loss": "sampled_softmax", "uniform_negatives": 50},
        "cached": {"loss": "sampled_softmax", "cached_batches": 3},
        "both": MIXED,
    }.items():
        config = replace(world.config, retrieval=replace(world.config.retrieval, **options))
        towers, _ = train_retrieval(trained.prepared, config, tmp_path / name, "id")
        found[name] = towers.user_tower.scale.tolist()
    assert len({tuple(scale) for scale in found.values()}) == len(found), found


def test_all_items_drawn_is_the_full_softmax_of_the_same_seed(world, trained, tmp_path):
    """Dropout is drawn an item, and the order of items is the same, so are the weights but for rounding."""
    records = {}
    for name, options in {
        "softmax": {"loss": "softmax"},
        "drawn": {"loss": "sampled_softmax", "uniform_negatives": len(trained.prepared.item_ids)},
    }.items():
        config = replace(world.config, retrieval=replace(world.config.retrieval, **options))
        _, records[name] = train_retrieval(trained.prepared, config, tmp_path / name, "id")
    assert records["drawn"][0]["loss"] == pytest.approx(records["softmax"][0]["loss"], rel=1e-3)


@pytest.mark.parametrize("options", [{"uniform_negatives": 50}, MIXED])
def test_columns_over_their_probability_count_every_item_once_on_average(
    world, trained, tmp_path, monkeypatch, options
):
    """The sum of 1 / q over a step's columns has the number of items as its mean, whatever made them columns."""
    counts, num_columns = [], []

    def seen(logits, columns, log_q, positives, excluded):
        counts.append(float((-log_q).exp().sum()))
        num_columns.append(len(columns))
        return sampled_softmax_loss(logits, columns, log_q, positives, excluded)

    monkeypatch.setattr("prerank.train.retrieval.sampled_softmax_loss", seen)
    sampled = replace(world.config.retrieval, **{"loss": "sampled_softmax", **options}, batch=32)
    train_retrieval(trained.prepared, replace(world.config, retrieval=sampled), tmp_path, "id")
    after = round(WARM_UP * len(counts)) + options.get("cached_batches", 0)
    assert np.mean(counts[after:-1]) == pytest.approx(len(trained.prepared.item_ids), rel=0.05)
    if "cached_batches" in options:
        before = int(after - options["cached_batches"])
        assert np.mean(num_columns[after:-1]) > 1.5 * np.mean(num_columns[:before])
