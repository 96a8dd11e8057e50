"""What a replay tells, of requests and answers that are made up, and of versions of the tiny world."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from prerank.bundle.registry import Registry
from prerank.errors import RequestError
from prerank.evaluate.replay import NUM_WORST, overlap, rank_correlation, replay
from prerank.serve.asked import Asked, Standing
from prerank.serve.funnel import Funnel
from prerank.serve.replaying import Replaying
from prerank.stores.requests import LoggedRequest
from prerank.types import Array, ItemChange
from tests.serve import world
from tests.serve.conftest import publish_live
from tests.serve.logs import log, read
from tests.stores.test_requests import ROW


def ids(*item_ids: int) -> Array:
    return np.array(item_ids, np.int64)


def logged(*item_ids: int, **changes: object) -> LoggedRequest:
    num = len(item_ids)
    row = replace(
        ROW,
        degraded=False,
        digest=1,
        item_ids=ids(*item_ids),
        utility=np.ones(num, np.float32),
        values=np.full((num, 1), 5.0, np.float32),
        pacing=np.ones(num, np.float32),
    )
    return replace(row, **changes)  # type: ignore[arg-type]


@dataclass
class Answers:
    """Answers each request with the next of `lists`; every item is known, on, and bids 5."""

    lists: Sequence[Sequence[int] | RequestError]
    version: str = "v1"
    digest: int = 1
    degraded: bool = False
    utility: float = 1.0
    stands: Callable[[Array], Standing] = field(
        default=lambda item_ids: Standing(
            np.ones(len(item_ids), bool),
            np.ones(len(item_ids), bool),
            np.ones(len(item_ids), np.float32),
            {"bid_micros": np.full(len(item_ids), 5.0, np.float32)},
        )
    )
    num: int = 0

    def ask(self, _: LoggedRequest) -> Asked:
        found = self.lists[self.num]
        self.num += 1
        if isinstance(found, RequestError):
            raise found
        utility = np.full(len(found), self.utility, np.float32)
        return Asked(ids(*found), utility, self.digest, self.degraded, ms=float(self.num))

    def standing(self, item_ids: Array) -> Standing:
        return self.stands(item_ids)


def test_the_same_answers_are_the_same() -> None:
    rows = [logged(1, 2, 3), logged(), logged(4)]
    told = replay(rows, Answers([[1, 2, 3], [], [4]]))
    assert (told.num_requests, told.num_compared, told.skipped) == (3, 3, {})
    assert told.same_winners == told.same_features == 1.0
    assert told.overlap == {1: 1.0, 10: 1.0, 100: 1.0}
    assert told.rank_correlation == 1.0
    assert told.utility_change == 0.0
    assert (told.num_winners, told.num_gone, told.num_off, told.num_changed) == (4, 0, 0, 0)
    assert told.worst == ()
    assert told.ms["p50"] == 2.0
    assert told.logged_ms["p99"] == 1.5


def test_what_differs_is_counted_and_the_worst_come_first() -> None:
    lists = [[1, 2, 3], [3, 2, 1], [1, 2, 9], [7, 8, 9], [1, 2]]
    rows = [logged(1, 2, 3, request_id=str(n)) for n in range(5)]
    told = replay(rows, Answers(lists, version="v2", utility=1.5))
    assert told.same_winners == 0.2
    assert told.same_features is None, "another version's features are its own"
    assert told.overlap[1] == pytest.approx((1 + 0 + 1 + 0 + 1) / 5)
    assert told.overlap[10] == pytest.approx((1 + 1 + 2 / 3 + 0 + 2 / 3) / 5)
    assert told.rank_correlation == pytest.approx((1 - 1 + 1 + 1) / 4)
    assert told.utility_change == pytest.approx(0.5)
    assert [(one.request_id, one.first) for one in told.worst] == [("3", 0), ("2", 2), ("4", 2), ("1", 0)]
    assert told.worst[0].then == (1, 2, 3)
    assert told.worst[0].now == (7, 8, 9)
    assert told.worst[0].overlap == 0.0


def test_only_the_few_worst_are_kept() -> None:
    rows = [logged(*range(10), request_id=str(n)) for n in range(30)]
    lists = [list(range(n % 10, n % 10 + 10)) for n in range(30)]
    told = replay(rows, Answers(lists))
    assert len(told.worst) == NUM_WORST
    assert [one.request_id for one in told.worst] == ["9", "19", "29", "8", "18"]


def test_what_cannot_be_compared_is_left_out_and_counted_by_why() -> None:
    missing = RequestError("context.hour: missing")
    rows = [logged(1), logged(1, degraded=True), logged(1), logged(1)]
    told = replay(rows, Answers([[1], missing, missing]))
    assert (told.num_requests, told.num_compared) == (4, 1)
    assert told.skipped == {"context.hour: missing": 2, "it was answered degraded": 1}
    assert told.same_winners == 1.0
    late = replay([logged(1)], Answers([[1]], degraded=True))
    assert late.skipped == {"it is answered degraded now": 1}
    assert late.same_winners is None
    assert late.overlap == {}
    assert late.ms == {}


def test_features_that_are_not_made_again_are_told() -> None:
    told = replay([logged(1), logged(1)], Answers([[1], [1]], digest=2))
    assert told.same_features == 0.0
    assert told.same_winners == 1.0


def test_winners_that_are_gone_off_or_of_another_bid_are_counted() -> None:
    def stands(item_ids: Array) -> Standing:
        # of 1 to 6: 1 is gone, 2 is off, 3 bids other, 4 is paced otherwise, 5 and 6 are as they were
        bids = np.where(item_ids == 3, 4.0, 5.0).astype(np.float32)
        pacing = np.where(item_ids == 4, 0.5, 1.0).astype(np.float32)
        return Standing(item_ids != 1, item_ids != 2, pacing, {"bid_micros": bids, "other": bids})

    told = replay([logged(1, 2, 3, 4, 5, 6)], Answers([[5, 6]], stands=stands))
    assert (told.num_winners, told.num_gone, told.num_off, told.num_changed) == (6, 1, 1, 2)
    assert told.worst[0].gone == (1, 2)


def test_an_empty_log_tells_nothing() -> None:
    told = replay([], Answers([]))
    assert (told.num_requests, told.same_winners, told.utility_change, told.worst) == (0, None, None, ())


@pytest.mark.parametrize("k", [1, 3, 10])
def test_overlap_is_of_the_first_k_of_the_longer_list(k: int) -> None:
    assert overlap(ids(1, 2, 3), ids(1, 2, 3), k) == 1.0
    assert overlap(ids(1, 2, 3, 4), ids(9, 8, 7, 1), k) == pytest.approx(0.0 if k < 4 else 1 / 4)
    assert overlap(ids(), ids(1), k) == 0.0
    assert overlap(ids(), ids(), k) == 1.0


def test_rank_correlation_is_spearmans_of_what_both_have() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        then, now = rng.permutation(30)[:20], rng.permutation(30)[:20]
        both = np.intersect1d(then, now)
        places = [[int(np.flatnonzero(one == item)[0]) for item in both] for one in (then, now)]
        assert rank_correlation(then, now) == pytest.approx(spearmanr(*places).statistic)
    assert rank_correlation(ids(1, 2), ids(2, 3)) is None


def test_a_log_of_one_version_is_the_same_to_it_and_not_to_another(tmp_path: Path) -> None:
    store = publish_live(tmp_path / "tiny", world.config())
    first = str(Registry(store).live())
    with Funnel.open(store) as funnel:
        log(funnel, tmp_path / "log")
    second = str(Registry(publish_live(store, world.config(), seed=7)).live())
    rows = read(tmp_path / "log")
    with Funnel.open(store, first) as funnel:
        same = replay(rows, Replaying(funnel))
    with Funnel.open(store, second) as funnel:
        other = replay(rows, Replaying(funnel))
    assert (same.version, other.version) == (first, second)
    assert same.logged_by == other.logged_by == {first: len(rows)}
    assert (same.same_winners, same.same_features, same.utility_change) == (1.0, 1.0, 0.0)
    assert other.same_features is None
    assert other.same_winners is not None
    assert other.same_winners < 1
    assert other.utility_change != 0
    assert other.worst


def test_what_changed_while_serving_is_not_replayed_and_is_told(tmp_path: Path) -> None:
    store = publish_live(tmp_path / "tiny", world.config(inventory={"slack": 4}))
    with Funnel.open(store) as funnel:
        log(funnel, tmp_path / "log")
        rows = read(tmp_path / "log")
        winner = int(rows[0].item_ids[0])
        funnel.change([ItemChange(winner, on=False), ItemChange(int(rows[0].item_ids[1]), pacing=0.5)])
        told = replay(rows, Replaying(funnel))
    assert told.same_features == 1.0
    assert told.same_winners is not None
    assert told.same_winners < 1
    assert told.num_off == sum(winner in row.item_ids for row in rows)
    assert told.num_changed == sum(rows[0].item_ids[1] in row.item_ids for row in rows)
    assert any(winner in one.gone for one in told.worst)
