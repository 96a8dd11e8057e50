"""A version that served a log gives the same winners to it again; what changed since is told."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from prerank.errors import RequestError, SchemaMismatch
from prerank.serve.funnel import Funnel
from prerank.serve.replaying import LoggedUsers, Replaying
from prerank.stores.events import LiveEvent
from prerank.stores.records import EXPOSED
from prerank.stores.requests import LoggedRequest
from prerank.stores.users import UserStore
from prerank.types import Array, ItemChange
from tests.serve import world
from tests.serve.conftest import publish_live
from tests.serve.logs import BODY, NOW, log, read
from tests.serve.test_generators import publish
from tests.serve.test_tail import published as with_a_tail


@pytest.fixture
def counting(tmp_path: Path) -> Iterator[Funnel]:
    with Funnel.open(publish_live(tmp_path / "counting", world.counting())) as funnel:
        yield funnel


def assert_same(rows: list[LoggedRequest], replaying: Replaying) -> None:
    assert rows
    for row in rows:
        asked = replaying.ask(row)
        assert asked.item_ids.tolist() == row.item_ids.tolist()
        np.testing.assert_array_equal(asked.utility, row.utility)
        assert asked.digest == row.digest
        assert not asked.degraded
        assert asked.ms > 0


def test_the_version_that_served_gives_the_same_winners_and_utilities(funnel: Funnel, tmp_path: Path) -> None:
    log(funnel, tmp_path)
    assert_same(read(tmp_path), Replaying(funnel))


def test_of_a_user_who_is_forgotten_or_another_today_the_log_is_asked(store: Path, tmp_path: Path) -> None:
    """The store is emptied and the users did more meanwhile; the answers stay."""
    with Funnel.open(store) as funnel:
        log(funnel, tmp_path)
        more = [LiveEvent(1, 105, "is_click", world.UNTIL + 1), LiveEvent(404, 100, "impression", world.UNTIL + 2)]
        funnel.record(more)
        user = funnel._users.get(1)
        assert user is not None
        assert user.item_ids[-1] == 105
        log(funnel, tmp_path / "after", [BODY])
        (before, *_), (after,) = read(tmp_path), read(tmp_path / "after")
        assert before.digest != after.digest
    UserStore.write(store / "users.lmdb", world.users().slice(2), [], labels=["is_click", "is_like"])
    with Funnel.open(store) as funnel:
        assert_same(read(tmp_path), Replaying(funnel))


def test_counters_of_the_log_are_those_that_were_served(counting: Funnel, tmp_path: Path) -> None:
    counting.record([LiveEvent(1, 101, "is_like", world.UNTIL + 1)])
    log(counting, tmp_path)
    assert_same(read(tmp_path), Replaying(counting))


def test_generators_find_the_same_again(tmp_path: Path) -> None:
    with Funnel.open(publish(tmp_path / "tiny", keep=2)) as funnel:
        log(funnel, tmp_path / "log")
        assert_same(read(tmp_path / "log"), Replaying(funnel))


def test_items_that_are_not_resident_are_waited_for(tmp_path: Path) -> None:
    """They are in memory while the log is made, and not when it is asked again; a request waits almost nothing."""
    store = with_a_tail(tmp_path / "tiny", fetch_ms=200.0)
    with Funnel.open(store) as funnel:
        log(funnel, tmp_path / "first")
        log(funnel, tmp_path / "log")
    with Funnel.open(store) as funnel:
        assert_same(read(tmp_path / "log"), Replaying(funnel))


def test_how_items_stand_today(store: Path) -> None:
    with Funnel.open(store) as funnel:
        funnel.change([ItemChange(100, on=False), ItemChange(101, pacing=0.25, values={"bid_micros": 9.0})])
        stands = Replaying(funnel).standing(np.array([100, 101, 102, 999]))
    assert stands.is_known.tolist() == [True, True, True, False]
    assert stands.is_on.tolist()[:3] == [False, True, True]
    assert stands.pacing.tolist()[:3] == [1.0, 0.25, 1.0]
    assert stands.values["bid_micros"].tolist()[:3] == [1000.0, 9.0, 3000.0]


def test_what_a_version_reads_and_nobody_logged_is_refused_by_name(funnel: Funnel, tmp_path: Path) -> None:
    log(funnel, tmp_path, [BODY])
    (row,) = read(tmp_path)
    replaying = Replaying(funnel)
    with pytest.raises(SchemaMismatch, match="no label 'is_click', which the version reads, was logged"):
        replaying.ask(replace(row, labels=("is_like",)))
    assert row.record is not None
    without = replace(row.record, profile={"user_id": 1})
    with pytest.raises(SchemaMismatch, match="no column of the user 'country', which the version reads, was logged"):
        replaying.ask(replace(row, record=without))
    with pytest.raises(RequestError, match=r"context.surface: missing"):
        replaying.ask(replace(row, context={"hour": 1}))


def test_labels_and_contexts_may_have_been_logged_in_another_order(funnel: Funnel, tmp_path: Path) -> None:
    """As a user store of other tables has them."""
    log(funnel, tmp_path, [BODY])
    (row,) = read(tmp_path)
    assert row.record is not None
    flags = row.record.flags
    clicks, likes = flags & np.uint32(1), flags >> np.uint32(1) & np.uint32(1)
    assert clicks.any()
    assert (clicks != likes).any()
    other = flags & EXPOSED | likes | clicks << np.uint32(2)
    moved = replace(row, labels=("is_like", "is_shared", "is_click"), record=replace(row.record, flags=other))
    assert_same([moved], Replaying(funnel))
    users = LoggedUsers(funnel.ranking.transforms, None)
    users.take(moved)
    found = users.get(1)
    assert found is not None
    assert users.labels == ("is_click",)
    assert found.flags.tolist() == (flags & EXPOSED | clicks).tolist()


def test_nobody_and_one_of_events_alone_are_as_the_store_told(funnel: Funnel, tmp_path: Path) -> None:
    log(funnel, tmp_path, [{**BODY, "user_id": 404}])
    (row,) = read(tmp_path)
    users = LoggedUsers(funnel.ranking.transforms, None)
    users.take(row)
    assert (users.get(404), users.profile(404)) == (None, None)
    none: Array = np.zeros(0, np.int64)
    record = replace(_record(funnel), profile={}, item_ids=none, time_ms=none, known_ms=none)
    users.take(replace(row, record=record))
    assert users.get(404) is not None
    assert users.profile(404) is None


def _record(funnel: Funnel):  # type: ignore[no-untyped-def]
    found = funnel._users.get(3)
    assert found is not None
    return replace(found, contexts=np.zeros((0, 0), np.int64), flags=np.zeros(0, np.uint32))


def test_the_moment_asked_about_is_that_of_the_log(funnel: Funnel, tmp_path: Path) -> None:
    log(funnel, tmp_path, [{**BODY, "time_ms": world.T0}])
    (row,) = read(tmp_path)
    later = Replaying(funnel).ask(replace(row, time_ms=NOW))
    assert later.digest == row.digest, "there is nothing to know that came after"
    assert row.record is not None
    assert not len(row.record.item_ids)
    shutil.rmtree(tmp_path)
