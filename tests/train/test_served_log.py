"""What was served is what is trained on, for the impressions of a logged request, and for no others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prerank.config import Config, parse_config
from prerank.data.check import check
from prerank.data.logs import find_tables, open_tables
from prerank.errors import ConfigError, DataError
from prerank.stores.records import EXPOSED, UserRecord
from prerank.stores.request_files import write_requests
from prerank.stores.requests import LoggedRequest
from prerank.train.examples import UserExamples
from prerank.train.prepare import SERVED, Prepared, prepare
from tests.data import world as three_days
from tests.stores.test_requests import ROW

LOG = three_days.impressions()
TIMES, USERS = LOG["time_ms"].to_numpy(), LOG["user_id"].to_numpy()
AGE = 99.0  # of nobody in the table


def config(**data: str) -> Config:
    plain = three_days.plain(requests="log/*.parquet", **data)
    plain["features"]["user"]["seen"] = {"kind": "history", "of": "item_id", "length": 4}
    plain["features"]["interaction"] = {
        "clicks": {"count": "is_click", "window": "3d"},
        "here": {"by": "item_id", "on": "surface", "window": "3d", "length": 5},
    }
    return parse_config(plain, "tiny.toml")


def request(row: int, **changes: object) -> LoggedRequest:
    """Of the impression in this row of the log; the server knew an age of its own, and one click on item 3."""
    record = UserRecord(
        profile={"user_id": int(USERS[row]), "age": AGE},
        item_ids=np.array([3]),
        time_ms=TIMES[[row]] - 10_000,
        known_ms=TIMES[[row]] - 10_000,
        flags=np.array([EXPOSED | 1], np.uint32),
        contexts=np.array([[0]]),
    )
    said = {
        "request_id": f"r{row}",
        "user_id": int(USERS[row]),
        "time_ms": int(TIMES[row]),
        "context": {"surface": "search", "slot": 5.0},
        "record": record,
        "labels": ("is_click",),
        "context_columns": ("surface",),
    }
    return replace(ROW, **{**said, **changes})


def prepared(
    folder: Path, requests: list[LoggedRequest], log: pa.Table = LOG, funnel: Config | None = None
) -> Prepared:
    (folder / "log").mkdir()
    write_requests(folder / "log", "requests-1.parquet", requests)
    three_days.write(folder, impressions=log)
    funnel = config() if funnel is None else funnel
    return prepare(funnel, open_tables(funnel, folder, folder / "work"), folder / "work")


def events_of(made: Prepared, rows: list[int]) -> np.ndarray:
    """The events of these rows of the log: there is one a moment."""
    return np.array([int(np.flatnonzero(made.events["time_ms"] == TIMES[row])[0]) for row in rows])


def test_impressions_of_a_logged_request_have_its_features_and_others_have_the_tables(tmp_path: Path) -> None:
    made = prepared(tmp_path, [request(41), request(250)])
    assert made.num_served == 2
    plain = UserExamples(replace(made, events={n: c for n, c in made.events.items() if n != SERVED}), _schema(made))
    events = events_of(made, [40, 41, 250, 251])
    served, computed = UserExamples(made, _schema(made)).at(events), plain.at(events)
    assert set(served) == set(computed) == {"age", "surface", "slot", "seen", "clicks", "here"}
    for name, column in served.items():
        assert column.dtype == computed[name].dtype
        for at in (0, 3):
            assert column[at].tolist() == computed[name][at].tolist(), name
    assert served["age"][1] == served["age"][2]
    assert served["age"][1] != computed["age"][1]
    assert served["clicks"].tolist()[1:3] == [1, 1]
    assert computed["clicks"][2] > 1
    assert (served["seen"][1:3] >= 0).sum(1).tolist() == [1, 1]
    assert (served["here"][1:3] >= 0).sum(1).tolist() == [0, 0], "where the click was is not known"
    assert served["surface"][1] == served["surface"][2], "the context is the request's too"


def _schema(made: Prepared):  # type: ignore[no-untyped-def]
    return made.transforms.schema


def test_at_another_moment_than_the_impressions_own_nothing_is_as_it_was_served(tmp_path: Path) -> None:
    made = prepared(tmp_path, [request(250)])
    events = events_of(made, [250])
    moment = made.events["time_ms"][events]
    examples = UserExamples(made, _schema(made))
    at_its_own, later = examples.at(events, moment), examples.at(events, moment + 1)
    assert at_its_own["clicks"].tolist() == [1]
    assert later["clicks"][0] > 1


def test_all_impressions_of_one_request_have_its_features(tmp_path: Path) -> None:
    times = TIMES.copy()
    times[[250, 270, 290]] = TIMES[250]  # three items for one user, for 20 users take turns
    assert len(set(USERS[[250, 270, 290]])) == 1
    made = prepared(tmp_path, [request(250)], three_days.put(LOG, "time_ms", times))
    assert made.num_served == 3


def test_by_its_id_an_impression_finds_the_request_that_came_before_it(tmp_path: Path) -> None:
    ids = [f"r{row}" if row < 300 else None for row in range(three_days.ROWS)]
    ids[45] = "r25"  # of another request of the same user
    log = three_days.put(LOG, "rid", pa.array(ids).dictionary_encode())
    requests = [
        request(25, time_ms=int(TIMES[25]) - 5000),
        request(46, request_id="r47"),  # an id that another user's impression has
        request(60, request_id="r61", user_id=7777),
    ]
    made = prepared(tmp_path, requests, log, config(request_id="rid"))
    assert np.sort(made.events["time_ms"][made.events[SERVED] >= 0]).tolist() == TIMES[[25, 45]].tolist()
    assert made.unserved == {"the users table does not have the user": 1}
    assert UserExamples(made, _schema(made)).at(events_of(made, [25]))["clicks"].tolist() == [1]


def test_of_a_request_that_was_sent_twice_the_later_counts(tmp_path: Path) -> None:
    again = request(25, request_id="r25", time_ms=int(TIMES[25]) - 10, record=None)
    log = three_days.put(LOG, "rid", [f"r{row}" for row in range(three_days.ROWS)])
    made = prepared(tmp_path, [again, request(25)], log, config(request_id="rid"))
    assert UserExamples(made, _schema(made)).at(events_of(made, [25]))["clicks"].tolist() == [1]


def test_what_cannot_be_read_is_left_out_and_counted(tmp_path: Path) -> None:
    made = prepared(tmp_path, [request(41, labels=("other",)), request(42), request(43, context={"slot": 1.0})])
    assert made.num_served == 1
    assert made.unserved.pop("no label 'is_click' was logged") == 1
    ((why, num),) = made.unserved.items()
    assert why.startswith("context.surface: missing")
    assert num == 1


def test_a_log_of_which_nothing_can_be_read_leaves_training_as_it_was(tmp_path: Path) -> None:
    made = prepared(tmp_path, [request(41, labels=("other",))])
    assert made.num_served == 0
    events = events_of(made, [41, 250])
    plain = UserExamples(replace(made, events={n: c for n, c in made.events.items() if n != SERVED}), _schema(made))
    for name, column in UserExamples(made, _schema(made)).at(events).items():
        assert column.tolist() == plain.at(events)[name].tolist()


def test_a_log_that_grew_is_prepared_anew(tmp_path: Path) -> None:
    assert prepared(tmp_path, [request(41)]).num_served == 1
    write_requests(tmp_path / "log", "requests-2.parquet", [request(250), request(251)])
    tables = open_tables(config(), tmp_path, tmp_path / "work")
    assert prepare(config(), tables, tmp_path / "work").num_served == 3


def test_without_a_log_there_is_nothing_as_served(tmp_path: Path) -> None:
    three_days.write(tmp_path)
    plain = three_days.config()
    made = prepare(plain, open_tables(plain, tmp_path, tmp_path / "work"), tmp_path / "work")
    assert SERVED not in made.events
    assert (made.num_served, made.served, made.unserved) == (0, {}, {})


def test_what_is_no_log_is_refused(tmp_path: Path) -> None:
    three_days.write(tmp_path)
    with pytest.raises(DataError, match=r"requests: no file matches .*log/\*.parquet.*; set \[data\].requests"):
        open_tables(config(), tmp_path, tmp_path / "work")
    (tmp_path / "log").mkdir()
    pq.write_table(pa.table({"user_id": [1]}), tmp_path / "log" / "a.parquet")
    tables = open_tables(config(), tmp_path, tmp_path / "work")
    with pytest.raises(DataError, match="no log of requests: it has the columns user_id"):
        prepare(config(), tables, tmp_path / "work")
    found = {(one.where, one.what) for one in check(config(), tables)}
    assert ("requests.profile", "missing column") in found


def test_check_finds_nothing_in_a_good_log_and_names_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    three_days.write(tmp_path)
    missing = {one.where for one in check(config(), find_tables(config(), tmp_path, tmp_path / "work"))}
    assert "data.requests" in missing
    write_requests(tmp_path / "log", "requests-1.parquet", [request(41)])
    good = {one.where for one in check(config(), find_tables(config(), tmp_path, tmp_path / "work"))}
    assert not {one for one in good if "request" in one}
    by_id = config(request_id="rid")
    found = {one.where for one in check(by_id, find_tables(by_id, tmp_path, tmp_path / "work"))}
    assert "impressions.rid" in found


def test_ids_that_are_no_text_are_refused(tmp_path: Path) -> None:
    log = three_days.put(LOG, "rid", np.arange(three_days.ROWS))
    with pytest.raises(DataError, match=r"\[data\].request_id: expected a column of text, got int64"):
        prepared(tmp_path, [request(41)], log, config(request_id="rid"))


def test_ids_without_a_log_are_a_mistake_in_the_funnel_file() -> None:
    with pytest.raises(ConfigError, match=r"data.request_id: expected \[data\].requests beside it"):
        three_days.config(request_id="rid")
