"""What happened strictly before a moment, against five lines of Python."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prerank.features.histories import Timeline

NUM_USERS = 5
EVENTS = st.lists(st.tuples(st.integers(0, NUM_USERS - 1), st.integers(0, 12), st.integers(0, 99)), max_size=40)
MOMENTS = st.lists(st.tuples(st.integers(-1, NUM_USERS - 1), st.integers(-1, 14)), max_size=12)


def timeline(events, num_users=NUM_USERS) -> Timeline:
    user, time_ms, values = (np.array([e[n] for e in events], dtype=np.int64) for n in range(3))
    return Timeline.build(num_users, user, time_ms, values.astype(np.int32))


def asked(moments) -> tuple[np.ndarray, np.ndarray]:
    return np.array([m[0] for m in moments], dtype=np.int64), np.array([m[1] for m in moments], dtype=np.int64)


def expected(events, user, time_ms, length) -> list[int]:
    own = [e for e in events if e[0] == user and e[1] < time_ms]
    values = [e[2] for e in sorted(own, key=lambda e: e[1])][-length:] if length else []
    return [-1] * (length - len(values)) + values


@given(EVENTS, MOMENTS, st.integers(0, 7))
def test_before_gives_the_last_values_strictly_before(events, moments, length):
    found = timeline(events).before(*asked(moments), length)
    assert found.shape == (len(moments), length)
    assert found.dtype == np.int32
    assert found.tolist() == [expected(events, *moment, length) for moment in moments]


@given(EVENTS, MOMENTS)
def test_ends_are_positions_within_the_users_own_slice(events, moments):
    line = timeline(events)
    for (user, time_ms), end in zip(moments, line.ends(*asked(moments)), strict=True):
        if user == -1:
            assert end == 0
        else:
            seen = sum(e[0] == user and e[1] < time_ms for e in events)
            assert end == line.offsets[user] + seen


@given(EVENTS)
def test_offsets_cut_the_events_into_users_in_time_order(events):
    line = timeline(events)
    assert line.offsets[0] == 0
    assert line.offsets[-1] == len(events) == len(line.time_ms) == len(line.values)
    for user in range(NUM_USERS):
        own = sorted((e for e in events if e[0] == user), key=lambda e: e[1])
        piece = slice(line.offsets[user], line.offsets[user + 1])
        assert line.time_ms[piece].tolist() == [e[1] for e in own]
        assert line.values[piece].tolist() == [e[2] for e in own]


@given(EVENTS, MOMENTS, EVENTS)
def test_a_planted_future_event_changes_nothing(events, moments, planted):
    latest = max((m[1] for m in moments), default=0)
    future = [(user, latest + time_ms, value) for user, time_ms, value in planted]
    before = timeline(events).before(*asked(moments), 4)
    np.testing.assert_array_equal(timeline(events + future).before(*asked(moments), 4), before)


@given(EVENTS, st.integers(0, NUM_USERS - 1), st.integers(0, 14))
def test_a_timeline_of_one_user_answers_as_the_timeline_of_all(events, user, time_ms):
    alone = timeline([(0, t, v) for u, t, v in events if u == user], num_users=1)
    moment = np.array([time_ms])
    np.testing.assert_array_equal(
        alone.before(np.array([0]), moment, 3), timeline(events).before(np.array([user]), moment, 3)
    )


def test_an_event_of_the_same_millisecond_is_not_seen():
    line = timeline([(0, 1000, 7)])
    user = np.zeros(3, dtype=np.int64)
    assert line.before(user, np.array([999, 1000, 1001]), 1).ravel().tolist() == [-1, -1, 7]


def test_nobody_and_a_user_without_events_have_only_padding():
    line = timeline([(1, 5, 7)])
    assert line.before(np.array([-1, 0, 1]), np.full(3, 9), 2).tolist() == [[-1, -1], [-1, -1], [-1, 7]]
    empty = timeline([])
    assert empty.before(np.array([-1, 2]), np.array([9, 9]), 2).tolist() == [[-1, -1], [-1, -1]]


def test_pieces_of_a_large_question_meet():
    rng = np.random.default_rng(0)
    line = Timeline.build(50, rng.integers(0, 50, 3000), rng.integers(0, 10**6, 3000), np.arange(3000))
    user, time_ms = rng.integers(-1, 50, 30_000), rng.integers(0, 10**6, 30_000)
    whole = line.before(user, time_ms, 50)  # more cells than one piece
    for row in rng.integers(0, 30_000, 50):
        np.testing.assert_array_equal(whole[row], line.before(user[[row]], time_ms[[row]], 50)[0])


def test_a_user_that_is_not_in_the_timeline_is_our_mistake():
    line = timeline([(0, 1, 1)])
    for user in (-2, NUM_USERS):
        with pytest.raises(AssertionError, match="a user is a position"):
            line.ends(np.array([user]), np.array([1]))
    with pytest.raises(AssertionError, match="every event is some user's"):
        Timeline.build(1, np.array([1]), np.array([0]), np.array([0]))
