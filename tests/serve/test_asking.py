"""Requests that are asked again: golden ones get the golden answers, those of a log what they got."""

from __future__ import annotations

from pathlib import Path

import pytest

from prerank._tensor_files import read_tensors
from prerank.bundle.golden import Golden
from prerank.bundle.manifest import GOLDEN
from prerank.bundle.registry import Registry
from prerank.errors import ConfigError, DataError
from prerank.serve.asking import GoldenRequests, LoggedRequests
from prerank.serve.funnel import Funnel
from prerank.serve.profiling import check_trace
from prerank.stores.users import UserStore
from prerank.types import ItemChange
from tests.serve import world
from tests.serve.conftest import publish_live
from tests.serve.logs import log, read
from tests.serve.test_targeting import RULES, lists, users


def test_golden_requests_get_the_golden_answers(published: Path) -> None:
    with Funnel.open(published, workers=0) as funnel:
        path = Registry(published).path(funnel.version)
        golden = Golden.from_tensors(read_tensors(path / GOLDEN)[0])
        asking = GoldenRequests(funnel, path)
        answers = [asking.ask(number) for number in range(asking.num)]
    assert asking.num == len(golden.answers.won) == 2
    k = len(answers[0].winners)
    assert [[one.item_id for one in each.winners] for each in answers] == golden.answers.item_ids[:, :k].tolist()
    assert not any(one.degraded for one in answers)
    assert answers[0].winners[0].metadata, "they are described"


def test_golden_requests_are_of_every_item_that_is_on_whatever_the_targeting(tmp_path: Path) -> None:
    store = publish_live(tmp_path / "tiny", world.config(targeting=RULES), lists())
    UserStore.write(store / "users.lmdb", users(), world.events(), labels=["is_click", "is_like"])
    with Funnel.open(store, workers=0) as funnel:
        funnel.change([ItemChange(100, on=False)])
        asking = GoldenRequests(funnel, Registry(store).path(funnel.version))
        target = {one.name: one for one in asking.ask(0).stages}["target"]
    assert (target.num_in, target.num_out) == (world.NUM_ITEMS, world.NUM_ITEMS - 1)


def test_requests_of_a_log_get_what_they_got_and_no_more_are_read_than_wanted(funnel: Funnel, tmp_path: Path) -> None:
    said = log(funnel, tmp_path)
    asking = LoggedRequests(funnel, iter(read(tmp_path)), 3)
    assert asking.num == 3
    for number in (0, 1, 2, 0):
        won = [one.item_id for one in asking.ask(number).winners]
        assert won == [one["item_id"] for one in said[number]["winners"]]


def test_a_log_without_requests_is_refused(funnel: Funnel) -> None:
    with pytest.raises(DataError, match="the log has no request: expected one or more"):
        LoggedRequests(funnel, iter([]), 3)


def test_a_trace_that_cannot_be_written_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected a file that can be written \(Is a directory\)"):
        check_trace(tmp_path)
    with pytest.raises(ConfigError, match=r"expected a file that can be written \(No such file or directory\)"):
        check_trace(tmp_path / "none" / "trace.json")
