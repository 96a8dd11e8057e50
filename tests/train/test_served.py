"""Features of many logged requests at once are those that serving made of each."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from prerank.stores.records import EXPOSED, UserRecord
from prerank.stores.requests import LoggedRequest, as_of
from prerank.train.served import ServedFeatures
from tests.serve import world
from tests.serve.test_past import CONFIG, CONTEXTS, ITEMS, LABELS, TRANSFORMS, Context, Row, contexts, events, record
from tests.serve.test_past import served as served_one
from tests.serve.world import T0
from tests.stores.test_requests import ROW

SERVED = ServedFeatures(TRANSFORMS, world.items()["item_id"].to_numpy(), TRANSFORMS.encode("item", world.items()))
CONTEXT: Context = {"hour": 1, "surface": "feed"}


def logged(known: UserRecord | None, time_ms: int, context: Context) -> LoggedRequest:
    cut = None if known is None else as_of(known, time_ms)
    said = {"labels": LABELS, "context_columns": CONTEXTS, "context": context}
    return replace(ROW, user_id=1, time_ms=time_ms, record=cut, **said)


@given(st.lists(st.tuples(events, st.integers(0, 18_000), contexts), min_size=1, max_size=6))
def test_of_each_request_they_are_what_serving_makes_of_it_alone(asked: list[tuple[list[Row], int, Context]]) -> None:
    assert {one.on for one in CONFIG.features.interaction.values()} == {"", "surface", "hour"}
    made = SERVED.encode([logged(record(rows), T0 + after_ms, context) for rows, after_ms, context in asked])
    assert len(made.requests) == len(asked)
    assert not made.skipped
    for at, (rows, after_ms, context) in enumerate(asked):
        alone = served_one(record(rows), T0 + after_ms, context)
        assert set(alone) == set(made.features)
        for name, feature in alone.items():
            found = torch.from_numpy(made.features[name][at : at + 1])
            assert found.dtype == feature.dtype, name
            assert torch.equal(found, feature), name


def test_nobody_and_one_of_whom_only_events_are_known_are_new_users() -> None:
    rows: list[Row] = [(101, 1, 0, int(EXPOSED) | 1, CONTEXT)]
    events_alone = replace(record(rows), profile={})
    made = SERVED.encode([logged(None, T0 + 9000, CONTEXT), logged(events_alone, T0 + 9000, CONTEXT)])
    assert made.features["country"].tolist() == [0, 0]
    assert (made.features["clicks"] >= 0).sum(1).tolist() == [0, 1]
    empty = SERVED.encode([logged(None, T0 + 9000, CONTEXT)])
    assert (empty.features["clicks"] == -1).all()


def test_labels_and_contexts_in_another_order_are_the_same_features() -> None:
    rows: list[Row] = [(101, 1, 0, int(EXPOSED) | 1, CONTEXT), (102, 2, 0, int(EXPOSED) | 2, CONTEXT)]
    one = logged(record(rows), T0 + 9000, CONTEXT)
    assert one.record is not None
    flags = one.record.flags
    other = flags & EXPOSED | (flags & np.uint32(1)) << np.uint32(2) | flags >> np.uint32(1) & np.uint32(1)
    moved = replace(
        one,
        labels=("is_like", "other", "is_click"),
        context_columns=("hour", "surface"),
        record=replace(one.record, flags=other, contexts=one.record.contexts[:, ::-1]),
    )
    # and both at once, for each request says its own order
    made = SERVED.encode([one, moved])
    for name, column in made.features.items():
        np.testing.assert_array_equal(column[0], column[1], err_msg=name)
    assert (made.features["clicks"][0] >= 0).sum() == 1


def test_a_request_of_which_something_was_not_logged_is_left_out_and_counted() -> None:
    whole = logged(record([(101, 1, 0, int(EXPOSED), CONTEXT)]), T0 + 9000, CONTEXT)
    assert whole.record is not None
    made = SERVED.encode(
        [
            whole,
            replace(whole, labels=("is_like",)),
            replace(whole, context_columns=("surface", "minute")),
            replace(whole, record=replace(whole.record, profile={"age": 3})),
            replace(whole, context={"hour": 1}),
            whole,
        ]
    )
    assert list(made.requests) == [whole, whole]
    assert all(len(column) == 2 for column in made.features.values())
    missing = next(why for why in made.skipped if why.startswith("context.surface: missing"))
    assert made.skipped == {
        "no label 'is_click' was logged": 1,
        "no context column 'hour' was logged": 1,
        "no column of the user 'country' was logged": 1,
        missing: 1,
    }
    assert not SERVED.encode([]).features


def test_an_item_that_is_gone_is_the_unknown_one_and_one_that_came_since_is_known() -> None:
    rows: list[Row] = [(999, 1, 0, int(EXPOSED), CONTEXT), (100, 2, 0, int(EXPOSED), CONTEXT)]
    one = logged(record(rows), T0 + 9000, CONTEXT)
    columns = {name: column.numpy() for name, column in ITEMS.features().items()}
    fewer = ServedFeatures(TRANSFORMS, ITEMS.item_ids.numpy()[1:], {n: c[1:] for n, c in columns.items()})
    more = ServedFeatures(
        TRANSFORMS, np.array([*range(100, 108), 999]), {n: c[[*range(8), 0]] for n, c in columns.items()}
    )
    genre = int(columns["genre"][0])
    for served, expected in ((SERVED, [0, genre]), (fewer, [0, 0]), (more, [genre, genre])):
        found = served.encode([one]).features["seen"][0]
        assert found[found >= 0].tolist() == expected
