"""What training saw of a logged row is what serving makes of it: zero difference, feature by feature."""

from dataclasses import dataclass, replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from prerank.bundle.item_table import ItemTable
from prerank.bundle.load import load
from prerank.config import Config, load_config
from prerank.data.logs import Tables, open_tables
from prerank.lifecycle.build import USERS, load_users
from prerank.schema import IMPRESSION, Category, Counter
from prerank.serve.expand import ExpandUser
from prerank.stores.events import LiveEvent
from prerank.stores.live import LiveUsers
from prerank.stores.records import UserRecord
from prerank.stores.users import UserStore
from prerank.train.examples import UserExamples
from prerank.train.prepare import Prepared, prepare
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
        stored, made = bundle.scorer.item_side.tensors(), trained.ranker.item_side(items)
        assert set(stored) == set(made)
        torch.testing.assert_close(stored, made, rtol=1e-5, atol=1e-6)


@pytest.mark.realdata
def test_real_logged_rows_replayed_through_serving_are_what_training_saw(kuairand, tmp_path):
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
    """The rows of the last day, as training saw them, from a store that ends before each."""
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
            past = record.time_ms < time_ms
            columns = (record.item_ids, record.time_ms, record.known_ms, record.flags, record.contexts)
            cut = UserRecord(record.profile, *(column[past] for column in columns))
            logged = raw[(user_id, time_ms, int(prepared.item_ids[log["item"][event]]))]
            context = {name: logged[name] for name in config.features.columns("context")}
            served, _ = expand.expand(cut, Request(user_id=user_id, k=1, time_ms=time_ms, context=context))
            for name in [*config.features.histories(), *config.features.interaction]:
                assert torch.equal(served[name][0].int(), features[name][row].int())
    assert pq.read_metadata(world.data / "impressions.parquet").num_rows == len(log["day"])


@dataclass(frozen=True)
class Late:
    """The world's log with labels known up to three hours after their impressions, and counters of every kind.

    Some are on the surface, and some on a second feature of it that knows the two most frequent of the four alone.
    """

    config: Config
    tables: Tables
    prepared: Prepared
    days: tuple[np.ndarray, np.ndarray]  # the events before the last day, and those of it
    raw: dict

    def examples(self) -> UserExamples:
        return UserExamples(self.prepared, self.config.features)

    def request(self, event) -> Request:
        user_id, time_ms, _ = self.key(event)
        return Request(user_id=user_id, k=1, time_ms=time_ms, context=self.context(event))

    def context(self, event) -> dict:
        return {name: self.raw[self.key(event)][name] for name in self.config.features.columns("context")}

    def key(self, event) -> tuple[int, int, int]:
        log, prepared = self.prepared.events, self.prepared
        user, item = prepared.user_ids[log["user"][event]], prepared.item_ids[log["item"][event]]
        return int(user), int(log["time_ms"][event]), int(item)

    def shown(self, event) -> LiveEvent:
        user_id, time_ms, item_id = self.key(event)
        return LiveEvent(user_id, item_id, IMPRESSION, time_ms, context=self.context(event))

    def labelled(self, event) -> list[LiveEvent]:
        """One live event a label that holds, at the moment it was known."""
        user_id, _, item_id = self.key(event)
        log, labels = self.prepared.events, self.prepared.labels
        holds = [label for bit, label in enumerate(labels) if log["flags"][event] >> np.uint32(bit) & 1]
        known_ms, context = int(log["known_ms"][event]), self.context(event)
        return [LiveEvent(user_id, item_id, label, known_ms, context=context) for label in holds]


@pytest.fixture(scope="module")
def late(world, tmp_path_factory) -> Late:
    lately = ({"window": "10m"}, {"window": "1d"}, {"last": 5})
    counters = {
        f"{count}_{by}_{n}": Counter(count, by, length=8, **when)
        for count in (IMPRESSION, "is_click")
        for by in ("", "advertiser_id", "category")
        for n, when in enumerate(lately)
    }
    counters |= {f"share_{n}": Counter("is_click", share=True, **when) for n, when in enumerate(lately)}
    counters |= {
        f"{name}_on_{on}": replace(counter, on=on)
        for name, counter in counters.items()
        for on in ("surface", "often")
        if counter.window != "10m"
    }
    often = Category(column="surface", min_count=1500)
    features = replace(world.config.features, context={**world.config.features.context, "often": often})
    config = replace(world.config, features=replace(features, interaction=counters))
    work = tmp_path_factory.mktemp("late")
    tables = open_tables(config, world.data, work)
    prepared = prepare(config, tables, work)
    assert prepared.transforms.sizes()["context.often"] == 1 + 2
    time_ms = np.asarray(prepared.events["time_ms"])
    delays = np.random.default_rng(3).integers(-3_600_000, 3 * 3_600_000, len(time_ms)).clip(0)
    prepared = replace(prepared, events={**prepared.events, "known_ms": time_ms + delays})
    last = prepared.of_days(config.data.days("test"))
    days = np.flatnonzero(~last), np.flatnonzero(last)
    return Late(config, tables, prepared, days, logged_rows(tables, config))


def same(late: Late, trained_on: UserExamples, users, events) -> int:
    """Whether serving gives for the moments of `events` what training saw; how many counters had something to count."""
    items = ItemTable.build(late.prepared.item_ids, late.prepared.items)
    expand, examples = ExpandUser(users, late.prepared.transforms, items), trained_on.at(np.array(events))
    counted = 0
    for row, event in enumerate(events):
        request = late.request(event)
        served, notes = expand.expand(users.get(request.user_id), request)
        assert not notes
        assert set(served) == set(examples)
        for name, column in served.items():
            assert torch.equal(column[0].to(examples[name].dtype), examples[name][row]), f"{name} of {event}"
        counted += sum(int((served[name].flatten()[-1:] > 0).any()) for name in late.config.features.interaction)
    return counted


def test_labels_known_late_and_counters_are_served_as_trained(late, tmp_path):
    load_users(late.config, late.tables, late.prepared, tmp_path)
    events = np.random.default_rng(4).choice(len(late.prepared.events["day"]), 300, replace=False)
    with UserStore.open(tmp_path / USERS) as users:
        assert same(late, late.examples(), users, events) > 300


@pytest.mark.parametrize(("delayed", "twice"), [(True, False), (True, True), (False, False)])
def test_events_posted_one_by_one_are_served_as_trained(late, tmp_path, delayed, twice):
    """The last day comes live: impressions at their time, labels when they are known, requests in between.

    `delayed`: labels are known up to three hours after their impressions, as they are in `late`, or else at once.
    `twice`: what the log has from the day before and after is posted too, and changes nothing.
    """
    if not delayed:
        late = replace(late, prepared=at_once(late.prepared))
    before, after = late.days
    log, trained_on = late.prepared.events, late.examples()
    loaded = replace(late.prepared, events={name: np.asarray(column)[before] for name, column in log.items()})
    load_users(late.config, late.tables, loaded, tmp_path)
    asked = set(np.random.default_rng(5).choice(after, 150, replace=False).tolist())
    with LiveUsers.open(tmp_path / USERS, tmp_path / "events.lmdb") as users:
        posts = [late.shown(event) for event in after] + [one for event in after for one in late.labelled(event)]
        if twice:
            posts += in_the_log_too(late, users.until_ms)
        # posted before it is asked, what happens in the very millisecond of a request must not count
        steps = [(one.time_ms, 0, one) for one in posts] + [(int(log["time_ms"][event]), 1, event) for event in asked]
        counted = 0
        for _, is_asked, what in sorted(steps, key=lambda step: step[:2]):
            if is_asked:
                counted += same(late, trained_on, users, [what])
            else:
                users.record([what])
        assert counted > 150
        assert same(late, trained_on, users, sorted(asked)) == counted, "what came later changes nothing"


def at_once(prepared: Prepared) -> Prepared:
    return replace(prepared, events={**prepared.events, "known_ms": prepared.events["time_ms"]})


def in_the_log_too(late: Late, until_ms: int) -> list[LiveEvent]:
    """Exposures of the log's last day, and labels it knows from after its last exposure, unless shown again since."""
    before, after = late.days
    log = late.prepared.events
    shown_again = {(one.user_id, one.item_id) for one in map(late.shown, after)}
    labels = [one for event in before if log["known_ms"][event] > until_ms for one in late.labelled(event)]
    labels = [one for one in labels if (one.user_id, one.item_id) not in shown_again]
    assert labels
    return [late.shown(event) for event in before[-200:]] + labels
