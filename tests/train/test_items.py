"""Items as a day knew them: rates of the days before, and of what is older than the training days."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prerank.config import Config, parse_config
from prerank.data.logs import open_tables
from prerank.errors import DataError
from prerank.train.items import DailyItems
from prerank.train.prepare import prepare
from tests.data import world

FIRST_DAY = world.START_MS // world.DAY_MS
OLDER = ((0, 1), (0, 1), (0, 0), (1, 0), (2, None), (2, 1))
"""Items of the history table, and whether they were clicked."""


def with_rates() -> Config:
    plain = world.plain(history="history.parquet")
    plain["features"]["item"] |= {
        "recent": {"kind": "rate", "of": "is_click", "prior": 2.0},
        "whole": {"kind": "rate", "of": "is_click", "prior": 2.0, "history": True},
    }
    return parse_config(plain, "tiny.toml")


def history(rows: tuple[tuple[int, int | None], ...] = OLDER) -> pa.Table:
    return pa.table(
        {
            "user_id": np.zeros(len(rows), np.int64),
            "item_id": np.array([item for item, _ in rows], np.int64),
            "time_ms": world.START_MS - len(rows) + np.arange(len(rows)),
            "is_click": pa.array([click for _, click in rows], pa.int8()),
        }
    )


def daily(folder: Path, older: pa.Table, log: pa.Table | None = None) -> DailyItems:
    tables = {} if log is None else {"impressions": log}
    world.write(folder, history=older, **tables)
    config = with_rates()
    return DailyItems(prepare(config, open_tables(config, folder, folder / "work"), folder / "work"), config)


def log_odds(happened: np.ndarray, shown: np.ndarray, prior: float = 2.0) -> np.ndarray:
    rate = happened.sum() / shown.sum()
    p = (happened + prior * rate) / (shown + prior)
    return np.log(p / (1 - p)) - np.log(rate / (1 - rate))


def test_with_history_the_first_day_knows_what_is_older_where_the_label_is_known(tmp_path):
    items = daily(tmp_path, history()).on(FIRST_DAY)
    told = [(item, click) for item, click in OLDER if click is not None]
    shown = np.bincount([item for item, _ in told], minlength=world.ITEMS)
    happened = np.bincount([item for item, click in told if click], minlength=world.ITEMS)
    np.testing.assert_allclose(items["whole"], log_odds(happened, shown), atol=1e-6)
    assert not items["recent"].any(), "without it the first day knows nothing"


def test_with_history_later_days_add_the_days_before_them(tmp_path):
    found = daily(tmp_path, history())
    log = world.impressions()
    for days in (1, 2, 3):
        known = log["time_ms"].to_numpy() < world.START_MS + days * world.DAY_MS
        item, click = log["item_id"].to_numpy()[known], log["is_click"].to_numpy()[known] == 1
        shown, happened = np.bincount(item, minlength=world.ITEMS), np.bincount(item[click], minlength=world.ITEMS)
        np.testing.assert_allclose(found.on(FIRST_DAY + days)["recent"], log_odds(happened, shown), atol=1e-6)
        shown[:3] += [3, 1, 1]
        happened[:3] += [2, 0, 1]
        np.testing.assert_allclose(found.on(FIRST_DAY + days)["whole"], log_odds(happened, shown), atol=1e-6)
    np.testing.assert_array_equal(found.latest()["whole"], found.on(FIRST_DAY + 3)["whole"])


@settings(max_examples=5)
@given(st.integers(0, world.ROWS - 1))
def test_an_event_changes_no_rate_of_its_own_day_or_of_one_before(tmp_path_factory, row):
    log = world.impressions()
    planted = world.put_at(log, "is_click", row, 1 - log["is_click"][row].as_py())
    as_it_is = daily(tmp_path_factory.mktemp("as_it_is"), history())
    changed = daily(tmp_path_factory.mktemp("changed"), history(), planted)
    own = row * 3 // world.ROWS
    for day in range(4):
        for name in ("recent", "whole"):
            same = np.array_equal(as_it_is.on(FIRST_DAY + day)[name], changed.on(FIRST_DAY + day)[name])
            assert same == (day <= own), f"{name} on day {day}"


def test_days_of_the_log_before_the_training_days_are_older_too(tmp_path):
    log = world.impressions()
    for row in (0, 1):  # a click on item 0 and none on item 1
        log = world.put_at(log, "time_ms", row, world.START_MS - 3_600_000 + row)
    whole = daily(tmp_path, history(()), log).on(FIRST_DAY)["whole"]
    assert whole[0] > 0 > whole[1]
    assert not whole[2:].any()


def test_without_older_events_it_begins_with_nothing(tmp_path):
    found = daily(tmp_path, history(()))
    for day in range(4):
        items = found.on(FIRST_DAY + day)
        np.testing.assert_array_equal(items["whole"], items["recent"])


def test_a_history_that_does_not_know_the_label_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"features\.item\.whole: history = true, and no event .* is_click"):
        daily(tmp_path, history(((0, None), (1, None))))


def test_each_item_of_a_day_is_told_once_and_as_it_was_that_day(tmp_path):
    found = daily(tmp_path, history())
    draw = np.random.default_rng(0)
    rows, day = torch.from_numpy(draw.integers(0, world.ITEMS, (40, 5))), FIRST_DAY + draw.integers(0, 3, 40)
    items, place = found.distinct(rows, day)
    kinds = {(int(at), int(row)) for at, some in zip(found.calendar.place(day), rows, strict=True) for row in some}
    assert all(len(column) == len(kinds) for column in items.values())
    for name, column in found.at(rows.flatten(), np.repeat(day, 5)).items():
        assert torch.equal(items[name][place].flatten(0, 1), column), name
    assert len({float(value) for value in found.rates["whole"].flatten()}) > 1  # days and items do differ
