from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from prerank.errors import DataError
from prerank.stores.contexts import UNKNOWN, digest
from prerank.stores.events import EventStore, LiveEvent
from prerank.stores.live import Appended, LiveUsers
from prerank.stores.records import BEFORE_ALL_MS, EXPOSED, UserRecord
from tests.stores.places import Files, Place
from tests.stores.places import place as place
from tests.stores.test_users import event as logged

CLICK, BUY, SHOWN = 1, 2, int(EXPOSED)
UNTIL = 100


@pytest.fixture
def home(place: Place) -> Place:
    """User 7 was shown item 1 at 50, clicked at 60, and item 2 at 90, bought at 140; the log's last is at 100."""
    seven = logged(7, (1, 50, SHOWN | CLICK), (2, 90, SHOWN | BUY))
    seven[3][:] = [60, 140]
    write(place, [seven, logged(8, (5, UNTIL, SHOWN))])
    return place


def write(
    home: Place, events: list, labels: tuple[str, ...] = ("click", "buy"), contexts: tuple[str, ...] = ()
) -> None:
    table = pa.table({"user_id": [7, 8, 9]})
    home.write(table, events, labels=labels, contexts=contexts)


def opened(home: Place) -> LiveUsers:
    return home.live()


@pytest.fixture
def users(home: Place) -> Iterator[LiveUsers]:
    with opened(home) as users:
        yield users


def rows(record: UserRecord | None) -> list[tuple[int, int, int, int]]:
    assert record is not None
    columns = (record.item_ids, record.time_ms, record.known_ms, record.flags)
    return list(zip(*(column.tolist() for column in columns), strict=True))


LOGGED = [(1, 50, 60, SHOWN | CLICK), (2, 90, 140, SHOWN | BUY)]


def test_without_live_events_a_record_is_the_logs(users: LiveUsers) -> None:
    assert rows(users.get(7)) == LOGGED
    assert users.get(10) is None
    assert users.event_names == ("impression", "click", "buy")
    assert users.until_ms == UNTIL


def test_live_events_follow_the_logs_each_known_at_its_own_time(users: LiveUsers) -> None:
    users.record([LiveEvent(7, 3, "click", 130), LiveEvent(7, 3, "impression", 120)])
    assert rows(users.get(7)) == [*LOGGED, (3, 120, 120, SHOWN), (3, 130, 130, CLICK)]


def test_a_user_without_a_profile_has_a_history_from_his_first_event_on(users: LiveUsers) -> None:
    users.record([LiveEvent(10, 3, "impression", 120)])
    record = users.get(10)
    assert record is not None
    assert record.profile == {}
    assert rows(record) == [(3, 120, 120, SHOWN)]


def test_a_known_user_without_events_keeps_his_profile(users: LiveUsers) -> None:
    users.record([LiveEvent(9, 3, "impression", 120)])
    record = users.get(9)
    assert record is not None
    assert record.profile == {"user_id": 9}


def test_until_its_last_exposure_the_log_is_right_for_every_user(users: LiveUsers) -> None:
    events = [LiveEvent(9, 3, "impression", 99), LiveEvent(9, 4, "click", UNTIL), LiveEvent(9, 5, "click", 101)]
    assert users.record(events) == Appended(num_repeated=0, num_logged=2)
    assert rows(users.get(9)) == [(5, 101, 101, CLICK)]
    assert users.record(events[:2]) == Appended(0, 2)


def test_a_label_the_log_knows_from_after_its_last_exposure_counts_once(users: LiveUsers) -> None:
    users.record([LiveEvent(7, 2, "buy", 141), LiveEvent(7, 2, "click", 141), LiveEvent(7, 1, "click", 141)])
    assert rows(users.get(7)) == [*LOGGED, (2, 141, 141, CLICK), (1, 141, 141, CLICK)]


def test_a_label_of_an_exposure_since_then_counts_beside_the_logs(users: LiveUsers) -> None:
    users.record([LiveEvent(7, 2, "impression", 130), LiveEvent(7, 2, "buy", 141)])
    assert rows(users.get(7)) == [*LOGGED, (2, 130, 130, SHOWN), (2, 141, 141, BUY)]


def test_what_a_newer_log_has_does_not_count_twice_and_is_swept(home: Place, users: LiveUsers) -> None:
    users.record(
        [LiveEvent(7, 3, "impression", 120), LiveEvent(7, 3, "click", 130), LiveEvent(7, 4, "impression", 150)]
    )
    newer = [(3, 120, SHOWN | CLICK)]
    seven = logged(7, (1, 50, SHOWN | CLICK), (2, 90, SHOWN | BUY), *newer)
    seven[3][:] = [60, 140, 130]
    write(home, [seven])
    later = opened(home)
    in_log = [*LOGGED, (3, 120, 130, SHOWN | CLICK)]
    assert rows(later.get(7)) == [*in_log, (4, 150, 150, SHOWN)]
    assert rows(users.get(7)) == [*LOGGED, (3, 120, 120, SHOWN), (3, 130, 130, CLICK), (4, 150, 150, SHOWN)]
    users.close()
    assert later.sweep() == 1  # the click is later than the log's last exposure, and stays until the next
    assert rows(later.get(7)) == [*in_log, (4, 150, 150, SHOWN)]
    later.close()


def test_live_events_mean_the_same_under_a_log_with_other_labels(home: Place, users: LiveUsers) -> None:
    users.record([LiveEvent(9, 1, "buy", 120), LiveEvent(9, 2, "click", 130), LiveEvent(9, 3, "impression", 140)])
    write(home, [logged(8, (5, UNTIL, SHOWN))], labels=("like", "buy"))
    other = opened(home)
    assert rows(other.get(9)) == [(1, 120, 120, BUY), (3, 140, 140, SHOWN)]
    other.record([LiveEvent(9, 4, "like", 150)])
    assert rows(other.get(9))[-1] == (4, 150, 150, CLICK)
    other.close()
    assert rows(users.get(9)) == [(1, 120, 120, BUY), (2, 130, 130, CLICK), (3, 140, 140, SHOWN)]


def test_a_live_events_context_follows_the_logs_in_the_order_of_its_columns(home: Place) -> None:
    """Whatever the columns of the log before were."""
    surfaces, tabs = np.array([digest("feed")]), np.array([digest(3)])
    write(home, [(*logged(7, (1, 50, SHOWN)), tabs)], contexts=("tab",))
    with opened(home) as users:
        users.record([LiveEvent(7, 2, "impression", 60, context={"tab": 4, "surface": "feed"})])
        assert contexts(users.get(7)) == [[digest(3)], [digest(4)]]
    write(home, [(*logged(7, (1, 50, SHOWN)), surfaces, tabs)], contexts=("surface", "tab"))
    with opened(home) as users:
        assert users.contexts == ("surface", "tab")
        users.record([LiveEvent(user, 3, "click", 70, context={"surface": "feed"}) for user in (7, 10)])
        assert contexts(users.get(7)) == [
            [digest("feed"), digest(3)],
            [UNKNOWN, digest(4)],
            [digest("feed"), UNKNOWN],
        ]
        assert contexts(users.get(10)) == [[digest("feed"), UNKNOWN]]
    write(home, [logged(7, (1, 50, SHOWN))])
    with opened(home) as users:
        assert contexts(users.get(7)) == [[], [], []]


def contexts(record: UserRecord | None) -> list[list[int]]:
    assert record is not None
    found: list[list[int]] = record.contexts.tolist()
    return found


def test_a_log_without_events_leaves_everything_to_the_live_ones(place: Place) -> None:
    write(place, [])
    with opened(place) as users:
        assert users.until_ms == BEFORE_ALL_MS
        users.record([LiveEvent(7, 1, "impression", 0)])
        assert rows(users.get(7)) == [(1, 0, 0, SHOWN)]
        assert users.sweep() == 0


def test_a_store_of_events_that_cannot_be_opened_leaves_nothing_open(tmp_path: Path) -> None:
    home = Files(tmp_path)
    write(home, [])
    home.events_path.write_bytes(b"hello")
    with pytest.raises(DataError, match=r"events\.lmdb: expected a store of events"):
        opened(home)
    home.events_path.unlink()
    opened(home).close()


def test_events_are_kept_in_a_file_of_their_own(tmp_path: Path) -> None:
    home = Files(tmp_path)
    write(home, [])
    before = home.users_path.read_bytes()
    with opened(home) as users:
        users.record([LiveEvent(7, 3, "impression", 120)])
        assert home.users_path.read_bytes() == before
    events = EventStore.open(home.events_path, [])
    assert len(events.get(7)) == 1
    events.close()
