"""What training saw of a logged row is what serving makes of it: zero difference, feature by feature."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from prerank.bundle.load import load
from prerank.config import load_config
from prerank.data.logs import open_tables
from prerank.lifecycle.build import USERS, load_users
from prerank.serve.stages import ExpandUser
from prerank.stores.users import UserStore
from prerank.train.examples import UserExamples
from prerank.train.prepare import prepare
from prerank.types import Request
from tests.conftest import ROOT


def replay(expand: ExpandUser, config, prepared, raw, events) -> int:
    """Every feature of `events`, served from their raw log rows, against training's; returns how many rows."""
    trained_on = UserExamples(prepared, config.features).at(events)
    names = config.features.columns("context")
    for row, event in enumerate(events):
        user_id = int(prepared.user_ids[prepared.events["user"][event]])
        time_ms = int(prepared.events["time_ms"][event])
        logged = raw[(user_id, time_ms, int(prepared.item_ids[prepared.events["item"][event]]))]
        context = {name: logged[name] for name in names}
        request = Request(user_id=user_id, k=1, time_ms=time_ms, context=context)
        served, notes = expand.expand(expand.users.get(user_id), request)
        assert not notes
        assert set(served) == set(trained_on)
        for name, column in served.items():
            torch.testing.assert_close(
                column[0].to(trained_on[name].dtype), trained_on[name][row], rtol=0, atol=0, msg=f"{name} of {event}"
            )
    return len(events)


def logged_rows(tables, config):
    data, names = config.data, config.features.columns("context")
    keys = [data.user_id, data.time, data.item_id]
    batches = tables.impressions([*keys, *names])
    return {tuple(row[key] for key in keys): row for batch in batches for row in batch.to_pylist()}


def test_logged_rows_replayed_through_serving_are_what_training_saw(world, trained, published):
    bundle = load(world.home / "versions" / published)
    with UserStore.open(world.home / USERS) as users:
        expand = ExpandUser(users, bundle.transforms, bundle.scorer.items)
        events = np.random.default_rng(1).choice(len(trained.prepared.events["day"]), 500, replace=False)
        raw = logged_rows(world.tables(), world.config)
        assert replay(expand, world.config, trained.prepared, raw, events) == 500


def test_the_published_models_are_the_trained_ones(world, trained, published):
    """Weights bit for bit; answers up to rounding, for mapped memory is aligned otherwise and sums in another order."""
    bundle = load(world.home / "versions" / published)
    user = UserExamples(trained.prepared, world.config.features).at(np.arange(50))
    for loaded, model in ((bundle.towers, trained.towers), (bundle.scorer.ranker, trained.ranker)):
        for name, weights in model.state_dict().items():
            assert torch.equal(weights, loaded.state_dict()[name]), name
        with torch.inference_mode():
            torch.testing.assert_close(loaded.user_side(user), model.user_side(user), rtol=1e-5, atol=1e-6)
    with torch.inference_mode():
        items = bundle.scorer.items.features()
        torch.testing.assert_close(bundle.scorer.item_side, trained.ranker.item_side(items), rtol=1e-5, atol=1e-6)


@pytest.mark.realdata
def test_real_logged_rows_replayed_through_serving_are_what_training_saw(kuairand, tmp_path):
    from prerank.bundle.item_table import ItemTable

    config = load_config(ROOT / "examples" / "kuairand" / "funnel.toml")
    tables = open_tables(config, kuairand, tmp_path)
    prepared = prepare(config, tables, tmp_path)
    load_users(config, tables, prepared, tmp_path)
    items = ItemTable.build(prepared.item_ids, prepared.items)
    logged = np.flatnonzero(prepared.events["logged"])
    events = np.random.default_rng(2).choice(logged, 1000, replace=False)
    with UserStore.open(tmp_path / USERS) as users:
        expand = ExpandUser(users, prepared.transforms, items)
        assert replay(expand, config, prepared, logged_rows(tables, config), events) == 1000


def test_a_future_event_changes_nothing_served_or_trained(world, trained, published):
    """The rows of the last day, as training saw them, from a store that ends before that day."""
    prepared, config = trained.prepared, world.config
    bundle = load(world.home / "versions" / published)
    last = np.flatnonzero(prepared.of_days(config.data.days("test")))[:50]
    features = UserExamples(prepared, config.features).at(last)
    log = prepared.events
    with UserStore.open(world.home / USERS) as users:
        expand = ExpandUser(users, bundle.transforms, bundle.scorer.items)
        raw = logged_rows(world.tables(), config)
        for row, event in enumerate(last):
            user_id, time_ms = int(prepared.user_ids[log["user"][event]]), int(log["time_ms"][event])
            record = users.get(user_id)
            known = record.time_ms < time_ms
            cut = type(record)(record.profile, record.item_ids[known], record.time_ms[known], record.flags[known])
            logged = raw[(user_id, time_ms, int(prepared.item_ids[log["item"][event]]))]
            context = {name: logged[name] for name in config.features.columns("context")}
            served, _ = expand.expand(cut, Request(user_id=user_id, k=1, time_ms=time_ms, context=context))
            for name in config.features.histories():
                assert torch.equal(served[name][0].int(), features[name][row].int())
    assert pq.read_metadata(world.data / "impressions.parquet").num_rows == len(log["day"])
