"""What a user did lately, against a loop over the events."""

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prerank.features.counters import Pairs, counted, encode
from prerank.features.histories import Timeline
from prerank.schema import IMPRESSION, Counter

NUM_USERS, NUM_SURFACES = 3, 3
CLICK = "is_click"
GENRE = np.array([0, 1, 2, 2, 3], dtype=np.int32)  # of each item; 0 is the unknown one
TOPICS = np.array([[1, -1], [-1, -1], [2, 3], [3, 0], [1, 1]], dtype=np.int32)
CODES = {"": None, "genre": GENRE, "topics": TOPICS}
COUNTERS = {
    f"{count}, by {by!r} on {on!r}, {when}": Counter(count, by, on, length=3, **when)
    for count in (IMPRESSION, CLICK)
    for by in CODES
    for on in ("", "surface")
    for when in ({"window": "1s"}, {"window": "5s"}, {"last": 1}, {"last": 3})
} | {
    f"share of {CLICK} on {on!r}, {when}": Counter(CLICK, on=on, share=True, **when)
    for on in ("", "surface")
    for when in ({"window": "5s"}, {"last": 1}, {"last": 3})
}


class Event(NamedTuple):
    """An impression, seconds after zero; its click, if it was one, was known `late` seconds after."""

    user: int
    second: int
    late: int
    item: int
    surface: int
    clicked: bool


class Moment(NamedTuple):
    user: int
    second: int
    surface: int


users, seconds, surfaces = st.integers(0, NUM_USERS - 1), st.integers(0, 12), st.integers(0, NUM_SURFACES - 1)
logs = st.lists(
    st.builds(Event, users, seconds, st.integers(0, 4), st.integers(0, len(GENRE) - 1), surfaces, st.booleans()),
    max_size=30,
)
moments = st.lists(st.builds(Moment, st.integers(-1, NUM_USERS - 1), st.integers(-1, 20), surfaces), max_size=8)


def known(event, count):
    """When an event counts from: an impression at its own time, a click when it was known."""
    return event.second + (event.late if count == CLICK else 0)


def array(values):
    return np.array(values, dtype=np.int64)


def encoded(counter, log, moments, num_users=NUM_USERS):
    """The counter at each moment, by the code that trains and serves."""
    pairs = Pairs.build(array([e.user for e in log]), array([e.surface for e in log]), NUM_SURFACES)
    alike = counter.on != ""
    num_users = len(pairs.keys) if alike else num_users

    def who(rows):
        user = array([row.user for row in rows])
        return pairs.place(user, array([row.surface for row in rows])) if alike else user

    happened = [e for e in log if counter.count == IMPRESSION or e.clicked]
    item, codes = array([e.item for e in happened]), CODES[counter.by]
    when = 1000 * array([known(e, counter.count) for e in happened])
    line = counted(counter, num_users, who(happened), when, None if codes is None else codes[item])
    found = who(log)
    named = found >= 0
    when = 1000 * array([e.second for e in log])
    shown = Timeline.build(num_users, found[named], when[named], np.zeros(named.sum(), np.int32))
    return encode(counter, line, shown, who(moments), 1000 * array([m.second for m in moments]))


def by_hand(counter, log, moment):
    """One counter at one moment: a loop over the events."""
    if moment.user < 0 or (counter.on and moment.surface == 0):
        log = []
    mine = [e for e in log if e.user == moment.user and (not counter.on or e.surface == moment.surface)]
    shown = sorted(e.second for e in mine if e.second < moment.second)
    if counter.window:
        since = moment.second - counter.window_ms // 1000
    else:
        since = shown[-counter.last] if len(shown) >= counter.last else -100
    lately = [e for e in mine if since <= known(e, counter.count) < moment.second]
    lately = [e for e in lately if counter.count == IMPRESSION or e.clicked]
    if counter.share:
        missed = max(sum(since <= second for second in shown) - len(lately), 0)
        return float(np.float32(np.log((len(lately) + 0.5) / (missed + 0.5))))
    if not counter.by:
        return len(lately)
    lately.sort(key=lambda e: known(e, counter.count))
    codes = [code for e in lately for code in np.atleast_1d(CODES[counter.by][e.item]).tolist() if code >= 0]
    codes = codes[-counter.length :]
    return [-1] * (counter.length - len(codes)) + codes


@pytest.mark.parametrize("name", COUNTERS)
@given(logs, moments)
def test_a_counter_is_what_a_loop_over_the_events_counts(name, log, moments):
    counter = COUNTERS[name]
    found = encoded(counter, log, moments)
    assert found.dtype == (np.float32 if counter.share else np.int32)
    assert found.shape == ((len(moments), counter.length) if counter.by else (len(moments),))
    assert found.tolist() == [by_hand(counter, log, moment) for moment in moments]


@given(logs, logs, moments)
def test_an_event_at_the_moment_or_after_it_never_counts(log, planted, moments):
    latest = max((m.second for m in moments), default=0)
    future = [event._replace(second=latest + event.second) for event in planted]
    for name, counter in COUNTERS.items():
        np.testing.assert_array_equal(encoded(counter, log + future, moments), encoded(counter, log, moments), name)


@given(logs, logs, moments)
def test_a_label_known_only_later_never_counts(log, planted, moments):
    """The impression is of the past and counts; its click is of the future and does not."""
    latest = max((m.second for m in moments), default=0)
    late = [event._replace(late=latest + 1, clicked=True) for event in planted]
    unclicked = [event._replace(clicked=False) for event in late]
    for name, counter in COUNTERS.items():
        found = (encoded(counter, log + more, moments) for more in (late, unclicked))
        np.testing.assert_array_equal(*found, name)


@given(logs, moments)
def test_one_user_alone_has_the_counters_he_has_among_all(log, moments):
    """Serving's one-user path, and training's over everybody."""
    asked = [m for m in moments if m.user == 1]
    alone = [e._replace(user=0) for e in log if e.user == 1]
    for name, counter in COUNTERS.items():
        one = encoded(counter, alone, [m._replace(user=0) for m in asked], num_users=1)
        np.testing.assert_array_equal(one, encoded(counter, log, asked), name)


@given(logs, moments)
def test_what_other_users_do_never_counts(log, moments):
    for user in range(NUM_USERS):
        asked = [m for m in moments if m.user == user]
        mine = [e for e in log if e.user == user]
        for name, counter in COUNTERS.items():
            np.testing.assert_array_equal(encoded(counter, mine, asked), encoded(counter, log, asked), name)


def test_nobody_did_nothing():
    log = [Event(0, 1, 0, 2, 1, True)]
    for counter in COUNTERS.values():
        for many in (1, NUM_USERS):
            assert (encoded(counter, log, [Moment(-1, 9, 1)], many) == (-1 if counter.by else 0)).all()
        assert (encoded(counter, [], [Moment(0, 9, 1), Moment(-1, 9, 1)]) == (-1 if counter.by else 0)).all()


def test_a_window_reaches_back_to_its_first_millisecond_and_ends_before_the_moment():
    line = Timeline.build(1, array([0]), array([5000]), array([7]))
    for moment, count in ((5000, 0), (5001, 1), (6000, 1), (6001, 0)):
        assert encode(Counter(window="1s"), line, line, array([0]), array([moment])).tolist() == [count]


def test_a_share_is_the_log_odds_of_the_impressions_that_had_the_label():
    log = [Event(0, second, 0, 1, 1, second == 1) for second in (1, 2, 3)]
    for last, odds in ((2, 0.5 / 2.5), (3, 1.5 / 2.5)):
        found = encoded(Counter(CLICK, last=last, share=True), log, [Moment(0, 9, 1)])
        np.testing.assert_allclose(found, [np.log(odds)], rtol=1e-6)


def test_a_share_of_labels_whose_impressions_are_older_than_the_window_is_finite():
    log = [Event(0, second, 4, 1, 1, True) for second in (1, 2)]
    found = encoded(Counter(CLICK, window="2s", share=True), log, [Moment(0, 7, 1)])
    np.testing.assert_allclose(found, [np.log(2.5 / 0.5)], rtol=1e-6)


def test_the_last_impressions_are_the_users_own_not_the_events_counted():
    """Of three impressions the first was clicked: among the last two there is no click, among the last three one."""
    log = [Event(0, second, 0, 1, 1, second == 1) for second in (1, 2, 3)]
    for last, clicks in ((1, 0), (2, 0), (3, 1), (9, 1)):
        assert encoded(Counter(CLICK, last=last), log, [Moment(0, 9, 1)]).tolist() == [clicks]


def test_a_label_counts_among_the_last_impressions_if_it_was_known_since_they_began():
    """Clicked at second 1, known at 4: since the last impression (3) began, though that is not the one clicked."""
    log = [Event(0, 1, 3, 1, 1, True), Event(0, 3, 0, 2, 1, False)]
    assert encoded(Counter(CLICK, last=1), log, [Moment(0, 4, 1), Moment(0, 5, 1)]).tolist() == [0, 1]


def test_no_more_than_the_latest_members_count():
    log = [Event(0, second, 0, item, 1, False) for second, item in ((1, 2), (2, 3), (3, 4))]
    assert encoded(Counter(by="topics", window="1h", length=3), log, [Moment(0, 9, 1)]).tolist() == [[0, 1, 1]]
    assert encoded(Counter(by="genre", window="1h", length=3), log, [Moment(0, 9, 1)]).tolist() == [[2, 2, 3]]


def test_a_counter_on_a_context_counts_in_that_context_alone():
    log = [Event(0, second, 0, 1, surface, False) for second, surface in ((1, 1), (2, 2), (3, 1), (4, 0))]
    asked = [Moment(0, 9, surface) for surface in (1, 2, 0)]
    assert encoded(Counter(window="1h"), log, asked).tolist() == [4, 4, 4]
    assert encoded(Counter(window="1h", on="surface"), log, asked).tolist() == [2, 1, 0]


def test_the_length_is_of_a_counter_by_something_alone():
    log = [Event(0, 1, 0, 1, 1, False)] * 9
    assert encoded(Counter(window="1h", length=1), log, [Moment(0, 9, 1)]).tolist() == [9]


@pytest.mark.parametrize("number", [1, 2, 5])
@given(logs, moments)
def test_the_moment_of_the_last_is_that_of_the_last_but_so_many(number, log, moments):
    line = Timeline.build(
        NUM_USERS, array([e.user for e in log]), array([e.second for e in log]), array([0] * len(log))
    )
    found = line.moment_of_last(array([m.user for m in moments]), array([m.second for m in moments]), number)
    for moment, at in zip(moments, found.tolist(), strict=True):
        before = sorted(e.second for e in log if e.user == moment.user and e.second < moment.second)
        assert at == (before[-number] if len(before) >= number else at)
        assert len(before) >= number or at < -(10**15), "before anything that could have happened"
