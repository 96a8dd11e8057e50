"""A log of requests beside the tables: no skew where both knew the same, and each that is planted is found by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from prerank.evaluate.feature_words import Words
from prerank.evaluate.skew import NUM_WORST, Skew, audit_skew
from prerank.lifecycle.build import USERS, load_users
from prerank.stores.records import EXPOSED
from prerank.stores.requests import LoggedRequest, as_of
from prerank.stores.users import UserStore
from prerank.train.prepare import Prepared, prepare
from tests.stores.test_requests import ROW

NUM = 200


@pytest.fixture(scope="module")
def prepared(world, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(world.config, world.tables(), tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def rows(world, prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> list[LoggedRequest]:
    """Requests at moments of the log, each with what a store of the same tables knows of the user before it."""
    home = tmp_path_factory.mktemp("store")
    load_users(world.config, world.tables(), prepared, home)
    keys = ["user_id", "time_ms", "surface", "hour"]
    log = [row for batch in world.tables().impressions(keys) for row in batch.to_pylist()]
    with UserStore.open(home / USERS) as users:
        return [
            logged(users, row["user_id"], row["time_ms"], {"surface": row["surface"], "hour": row["hour"]}, f"r{n}")
            for n, row in enumerate(log[:: len(log) // NUM][:NUM])
        ]


def logged(users: UserStore, user_id: int, time_ms: int, context: dict, request_id: str) -> LoggedRequest:
    record = users.get(user_id)
    assert record is not None
    said = {"labels": users.labels, "context_columns": users.contexts, "context": context, "request_id": request_id}
    return replace(ROW, user_id=user_id, time_ms=time_ms, record=as_of(record, time_ms), **said)


def different(told: Skew) -> set[str]:
    return {one.name for one in told.features if one.num_same < one.num_compared}


def test_where_both_knew_the_same_there_is_no_skew(rows: list[LoggedRequest], prepared: Prepared) -> None:
    told = audit_skew(rows, prepared)
    assert (told.num_requests, told.num_compared, told.num_joined, told.skipped) == (NUM, NUM, NUM, {})
    schema = prepared.transforms.schema
    assert {one.name for one in told.features} == {*schema.user, *schema.context, *schema.interaction}
    for one in told.features:
        assert (one.num_compared, one.num_same, one.agreement) == (NUM, NUM, 1.0), one.name
        assert (one.num_fewer, one.num_more, one.worst) == (0, 0, ())


def without_last_click(row: LoggedRequest) -> LoggedRequest:
    """As a server whose events come late."""
    assert row.record is not None
    clicks = np.flatnonzero(row.record.flags & np.uint32(1))
    if not len(clicks):
        return row
    flags = row.record.flags.copy()
    flags[clicks[-1]] &= EXPOSED
    return replace(row, record=replace(row.record, flags=flags))


def twice_the_last(row: LoggedRequest) -> LoggedRequest:
    """As a server that counts an exposure twice."""
    assert row.record is not None
    record = row.record
    if not len(record.item_ids):
        return row
    columns = ("item_ids", "time_ms", "known_ms", "flags", "contexts")
    again = {name: np.concatenate([c := getattr(record, name), c[-1:]]) for name in columns}
    again["flags"] = np.append(record.flags, np.uint32(EXPOSED))
    return replace(row, record=replace(record, **again))


def of_profile(column: str, value: object) -> Callable[[LoggedRequest], LoggedRequest]:
    def planted(row: LoggedRequest) -> LoggedRequest:
        assert row.record is not None
        return replace(row, record=replace(row.record, profile={**row.record.profile, column: value}))

    return planted


def of_context(row: LoggedRequest) -> LoggedRequest:
    return replace(row, context={**row.context, "hour": (int(str(row.context["hour"])) + 1) % 24})


@pytest.mark.parametrize(
    ("plant", "found", "maybe"),
    [
        (of_profile("country", "never seen"), {"country"}, set()),
        (of_profile("activity", 1e6), {"activity"}, set()),
        (of_profile("interests", []), {"interests"}, set()),
        (of_context, {"hour"}, set()),
        (
            without_last_click,
            {"clicks", "advertiser_clicks", "category_clicks"},
            {"clicks_7d", "surface_clicks", "advertiser_clicks_1h"},
        ),
        (
            twice_the_last,
            {"exposures", "advertiser_views", "category_views"},
            {"views_1d", "advertiser_views_1d"},
        ),
    ],
)
def test_a_planted_skew_is_found_and_named(
    rows: list[LoggedRequest],
    prepared: Prepared,
    plant: Callable[[LoggedRequest], LoggedRequest],
    found: set[str],
    maybe: set[str],
) -> None:
    told = audit_skew([plant(row) if n % 4 == 0 else row for n, row in enumerate(rows)], prepared)
    assert found <= different(told) <= found | maybe
    assert told.features[0].name in found | maybe, "what agrees least comes first"
    by_name = {one.name: one for one in told.features}
    for name in found:
        one = by_name[name]
        assert 0 < one.num_compared - one.num_same <= NUM / 4
        assert 1 <= len(one.worst) <= NUM_WORST
        for example in one.worst:
            assert int(example.request_id[1:]) % 4 == 0
            assert example.served != example.trained


def test_it_tells_whether_serving_knew_fewer_events_or_more(rows: list[LoggedRequest], prepared: Prepared) -> None:
    fewer = {one.name: one for one in audit_skew(map(without_last_click, rows), prepared).features}
    more = {one.name: one for one in audit_skew(map(twice_the_last, rows), prepared).features}
    assert fewer["clicks"].num_fewer > 0
    assert fewer["clicks"].num_more == 0
    assert fewer["exposures"].num_fewer == fewer["exposures"].num_more == 0
    assert more["views_1d"].num_more > 0
    assert more["views_1d"].num_fewer == 0


def test_the_worst_is_the_farthest(rows: list[LoggedRequest], prepared: Prepared) -> None:
    planted = list(rows)
    planted[7] = of_profile("activity", 1e9)(rows[7])
    planted[8] = of_profile("activity", 1e3)(rows[8])
    told = {one.name: one for one in audit_skew(planted, prepared).features}
    assert [one.request_id for one in told["activity"].worst] == ["r7", "r8"]


def test_who_the_tables_cannot_know_is_not_compared(rows: list[LoggedRequest], prepared: Prepared) -> None:
    late = replace(rows[1], time_ms=int(prepared.events["time_ms"].max()) + 1)
    stranger = replace(rows[2], user_id=-5)
    unreadable = replace(rows[3], labels=("other",))
    aside = replace(rows[4], time_ms=rows[4].time_ms - 1)  # where no impression is
    failed = replace(rows[5], record=None, degraded=True)
    told = audit_skew([rows[0], late, stranger, unreadable, aside, failed], prepared)
    assert (told.num_requests, told.num_compared, told.num_joined) == (6, 2, 1)
    assert told.skipped == {
        "the store of users failed, and the answer was a new user's": 1,
        "it is later than the log's last event": 1,
        "the users table does not have the user": 1,
        "no label 'is_click' was logged": 1,
    }
    by_name = {one.name: one.num_compared for one in told.features}
    assert (by_name["country"], by_name["hour"]) == (2, 1)


def test_nothing_to_compare_is_told_as_nothing(prepared: Prepared) -> None:
    told = audit_skew([], prepared)
    assert told.num_requests == 0
    assert {one.agreement for one in told.features} == {None}


def test_features_are_told_in_words(prepared: Prepared) -> None:
    words = Words(prepared.transforms)
    name = prepared.transforms.names("user", "country")
    assert name is not None
    assert words.of("country", np.int32(1)) == str(name[0])
    assert words.of("country", np.int32(0)) == "unknown"
    assert words.of("activity", np.float32(0.5)) == "0.5"
    assert words.of("views_1d", np.int32(3)) == "3"
    assert words.of("clicks", np.array([-1, -1, 5, 7], np.int32)) == "2: code 5 code 7"
    assert words.of("clicks", np.array([-1, -1], np.int32)) == "0:"
    long = words.of("exposures", np.arange(1, 31, dtype=np.int32))
    assert long == "30: ... " + " ".join(f"code {n}" for n in range(23, 31))
