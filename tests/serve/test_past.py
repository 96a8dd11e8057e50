"""Histories and counters of one user, against loops over his events, and against the code that trains on everyone's."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prerank.bundle.item_table import ItemTable
from prerank.config import Config
from prerank.errors import SchemaMismatch
from prerank.schema import IMPRESSION, Counter, History
from prerank.serve.expand import ExpandUser
from prerank.serve.past import Past
from prerank.stores.contexts import digest
from prerank.stores.events import LiveEvent
from prerank.stores.live import LiveUsers
from prerank.stores.records import EXPOSED, UserRecord
from prerank.stores.users import UserStore
from prerank.types import Array, Features, Request, Scalar
from tests.serve import world
from tests.serve.world import T0

LABELS = ("is_click", "is_like")
CONTEXTS = ("surface", "hour")  # another order than the schema's


def counting_on() -> Config:
    """The counters of `world.counting`, and some on either context feature."""
    config = world.counting()
    on = {
        f"{name}_on_{feature}": replace(counter, on=feature)
        for name, counter in config.features.interaction.items()
        for feature in CONTEXTS
        if counter.by != "genre" and counter.window != "1h"
    }
    return replace(config, features=replace(config.features, interaction={**config.features.interaction, **on}))


CONFIG = counting_on()
TRANSFORMS = world.transforms(CONFIG)
ITEMS = ItemTable.build(world.items()["item_id"].to_numpy(), TRANSFORMS.encode("item", world.items()))
COUNTERS = dict(CONFIG.features.interaction)
CONTEXT: dict[str, Scalar] = {"hour": 1, "surface": "feed"}
KNOWN = {"surface": ("feed", "search"), "hour": (0, 1, 2)}

contexts = st.fixed_dictionaries(
    {"surface": st.sampled_from([*KNOWN["surface"], "story", None]), "hour": st.sampled_from([0, 1, 7, None])}
)
Context: TypeAlias = dict[str, Scalar]
Row: TypeAlias = tuple[int, int, int, int, Context]

# item (999 is in no version), second, seconds until labels were known, flags: an exposure with labels, or one label
events = st.lists(
    st.tuples(
        st.sampled_from([*range(100, 108), 999]),
        st.integers(0, 12),
        st.integers(0, 4),
        st.sampled_from([0, 1, 2, 3]).map(lambda labels: labels | int(EXPOSED)) | st.sampled_from([1, 2]),
        contexts,
    ),
    max_size=25,
).map(lambda rows: sorted(rows, key=lambda row: row[1]))


def digests(all_of_them: list[Context]) -> Array:
    return np.array([[digest(one[c]) for c in CONTEXTS] for one in all_of_them], np.int64).reshape(-1, len(CONTEXTS))


def record(rows: list[Row]) -> UserRecord:
    columns = np.array([row[:4] for row in rows], np.int64).reshape(-1, 4).T
    time_ms = T0 + 1000 * columns[1]
    known_ms, flags = time_ms + 1000 * columns[2], columns[3].astype(np.uint32)
    return UserRecord({"country": "de"}, columns[0], time_ms, known_ms, flags, digests([row[4] for row in rows]))


@dataclass(frozen=True)
class NoUsers:
    """A store of nobody, for records that are given."""

    columns: tuple[str, ...] = ("country",)
    labels: tuple[str, ...] = LABELS
    contexts: tuple[str, ...] = CONTEXTS

    def get(self, user_id: int) -> UserRecord | None:
        return None


def served(whole: UserRecord, time_ms: int, context: Context) -> Features:
    features, _ = ExpandUser(NoUsers(), TRANSFORMS, ITEMS).expand(whole, Request(1, 1, time_ms, context))
    return features


def happened(rows: list[Row], event: str, moment_ms: int) -> list[tuple[int, int]]:
    """When each event before the moment became known, and its item; in that order."""
    bit = int(EXPOSED) if event == IMPRESSION else 1 << LABELS.index(event)
    late = 0 if event == IMPRESSION else 1
    found = [(T0 + 1000 * (second + late * after), item) for item, second, after, flags, _ in rows if flags & bit]
    return sorted((one for one in found if one[0] < moment_ms), key=lambda one: one[0])


def codes(item: int, by: str) -> list[int]:
    if item == 999:
        return [] if by == "topics" else [0]
    found = np.atleast_1d(ITEMS.features()[by][item - 100].numpy()).tolist()
    return [code for code in found if by != "topics" or code >= 0]


def padded(values: list[int], length: int) -> list[int]:
    kept = values[-length:]
    return [-1] * (length - len(kept)) + kept


def by_hand(counter: Counter, rows: list[Row], moment_ms: int, context: Context) -> list[int] | list[float]:
    if counter.on:
        value = context[counter.on]
        rows = [row for row in rows if row[4][counter.on] == value and value in KNOWN[counter.on]]
    shown = [time_ms for time_ms, _ in happened(rows, IMPRESSION, moment_ms)]
    if counter.window:
        since = moment_ms - counter.window_ms
    else:
        since = shown[-counter.last] if len(shown) >= counter.last else 0
    lately = [item for time_ms, item in happened(rows, counter.count, moment_ms) if time_ms >= since]
    if counter.share:
        missed = max(sum(time_ms >= since for time_ms in shown) - len(lately), 0)
        return [float(np.float32(np.log((len(lately) + 0.5) / (missed + 0.5))))]
    if not counter.by:
        return [len(lately)]
    return padded([code for item in lately for code in codes(item, counter.by)], counter.length)


@given(events, st.integers(0, 18_000), contexts)
def test_a_counter_is_what_a_loop_over_the_events_counts(rows: list[Row], after_ms: int, context: Context) -> None:
    features = served(record(rows), T0 + after_ms, context)
    for name, counter in COUNTERS.items():
        found = features[name]
        assert found.dtype == (torch.float32 if counter.share else torch.int32)
        assert found.shape == ((1, counter.length) if counter.by else (1,))
        assert found.reshape(-1).tolist() == by_hand(counter, rows, T0 + after_ms, context), name


@given(events, st.integers(0, 18_000))
def test_a_history_is_what_a_loop_over_the_events_gives(rows: list[Row], after_ms: int) -> None:
    past = Past(record(rows), LABELS, ITEMS, T0 + after_ms)
    for event in (IMPRESSION, *LABELS):
        lately = [codes(item, "genre")[0] for _, item in happened(rows, event, T0 + after_ms)]
        assert past.history(History("genre", event, 4))[0].tolist() == padded(lately, 4), event


def test_a_label_counts_from_when_it_was_known_and_an_impression_from_its_own_time() -> None:
    clicked = record([(100, 1, 5, int(EXPOSED) | 1, CONTEXT)])
    for second, shown, clicks in ((1, 0, 0), (2, 1, 0), (6, 1, 0), (7, 1, 1)):
        past = Past(clicked, LABELS, ITEMS, T0 + 1000 * second)
        assert past.counter(Counter(window="1h")).tolist() == [shown]
        assert past.counter(Counter("is_click", window="1h")).tolist() == [clicks]


def test_a_label_that_came_alone_is_no_second_impression() -> None:
    past = Past(record([(100, 1, 0, int(EXPOSED), CONTEXT), (100, 4, 0, 1, CONTEXT)]), LABELS, ITEMS, T0 + 9000)
    assert past.counter(Counter(window="1h")).tolist() == [1]
    assert past.counter(Counter("is_click", window="1h")).tolist() == [1]
    assert (past.history(History("item_id", length=5)) >= 0).sum() == 1


def test_a_store_without_the_context_that_counters_are_on_is_refused_before_any_request() -> None:
    for contexts in ((), ("hour",)):
        says = (
            rf"no context column 'surface' that this version's features read; it has {re.escape(str(list(contexts)))}"
        )
        with pytest.raises(SchemaMismatch, match=says):
            ExpandUser(NoUsers(contexts=contexts), TRANSFORMS, ITEMS)


def test_a_new_user_has_done_nothing() -> None:
    features = served(record([]), T0, CONTEXT)
    for name, counter in COUNTERS.items():
        assert features[name].tolist() == ([[-1] * 4] if counter.by else [0])


def test_a_counter_on_a_context_field_counts_only_what_happened_in_the_requests_own_value() -> None:
    surfaces = ("feed", "search", "feed", "search", None, "story")
    rows = [(100 + n, n, 0, int(EXPOSED), {"surface": surface, "hour": 1}) for n, surface in enumerate(surfaces)]
    for surface, shown in (("feed", 2), ("search", 2), ("story", 0), (None, 0)):
        features = served(record(rows), T0 + 9000, {"surface": surface, "hour": 1})
        assert features["impression_any_2_on_surface"].tolist() == [shown]
        assert features["impression_any_2_on_hour"].tolist() == [3]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """User 1 has a log that ends at T0 + 4 s, on two surfaces in turn; the live store is each test's own."""
    home = tmp_path_factory.mktemp("past")
    events = [(*one, *digests(logged_contexts(len(one[1]))).T) for one in world.events()]
    UserStore.write(home / "users.lmdb", world.users(), events, labels=LABELS, contexts=CONTEXTS)
    return home


def logged_contexts(number: int) -> list[Context]:
    return [{"surface": ("feed", "search")[n % 2], "hour": 1} for n in range(number)]


def expanded(home: Path, happened: list[LiveEvent], user_id: int, time_ms: int, folder: Path) -> Features:
    with LiveUsers.open(home / "users.lmdb", folder / "events.lmdb") as users:
        if happened:
            users.record(happened)
        expand = ExpandUser(users, TRANSFORMS, ITEMS)
        return expand.expand(users.get(user_id), Request(user_id, 1, time_ms, CONTEXT))[0]


live_events = st.lists(
    st.builds(
        LiveEvent,
        user_id=st.sampled_from([1, 3, 9]),
        item_id=st.sampled_from([*range(100, 108), 999]),
        event=st.sampled_from([IMPRESSION, *LABELS]),
        time_ms=st.integers(T0, T0 + 20_000),
        context=st.just({}) | contexts,
    ),
    max_size=12,
)


@given(live_events, live_events, st.sampled_from([1, 3, 9]), st.integers(T0, T0 + 20_000))
def test_what_happens_at_or_after_the_moment_changes_nothing(
    home: Path,
    tmp_path_factory: pytest.TempPathFactory,
    before: list[LiveEvent],
    planted: list[LiveEvent],
    user_id: int,
    time_ms: int,
) -> None:
    later = [one for one in planted if one.time_ms >= time_ms]
    folders = [tmp_path_factory.mktemp("live") for _ in range(2)]
    without = expanded(home, before, user_id, time_ms, folders[0])
    having = expanded(home, before + later, user_id, time_ms, folders[1])
    assert set(without) == set(having)
    for name, feature in without.items():
        assert torch.equal(feature, having[name]), name


@given(live_events, st.sampled_from([1, 3, 9]), st.integers(T0 + 4001, T0 + 20_000))
def test_events_recorded_live_count_as_those_that_a_log_has(
    home: Path, tmp_path_factory: pytest.TempPathFactory, happened: list[LiveEvent], user_id: int, time_ms: int
) -> None:
    mine = sorted((one for one in happened if one.user_id == user_id and one.time_ms > world.UNTIL), key=_when)
    rows = [(one.item_id, one.time_ms, one.time_ms, _flags(one.event)) for one in mine]
    logged = [
        (int(i), int(t), int(k), int(f))
        for user, *columns in world.events()
        for i, t, k, f in zip(*columns, strict=True)
        if user == user_id
    ]
    columns = np.array(logged + rows, np.int64).reshape(-1, 4).T
    nothing: Context = dict.fromkeys(CONTEXTS)
    told = digests([*logged_contexts(len(logged)), *(nothing | dict(one.context) for one in mine)])
    whole = UserRecord({"country": "de"}, columns[0], columns[1], columns[2], columns[3].astype(np.uint32), told)
    once = served(whole, time_ms, CONTEXT)
    live = expanded(home, happened, user_id, time_ms, tmp_path_factory.mktemp("live"))
    for name in [*COUNTERS, *CONFIG.features.histories()]:
        assert torch.equal(live[name], once[name]), name


def _when(one: LiveEvent) -> int:
    return one.time_ms


def _flags(event: str) -> int:
    return int(EXPOSED) if event == IMPRESSION else 1 << LABELS.index(event)
