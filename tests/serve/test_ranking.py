"""The ranking stage alone gives what the same stage gives inside a whole request."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prerank.errors import RequestError
from prerank.serve import ranking
from prerank.serve.funnel import Funnel
from prerank.serve.ranking import MOST_CANDIDATES, MOST_USERS, PADDING, Asker
from prerank.types import ItemChange, Request
from tests.serve import world
from tests.serve.conftest import publish_live
from tests.serve.test_tail import published as published_with_tail

NOW = world.T0 + 10_000
CONTEXT = {"hour": 1, "surface": "feed"}
ALL = [100 + i for i in range(world.NUM_ITEMS)]
K = 5


@pytest.fixture
def every(tmp_path: Path) -> Funnel:
    """A funnel that retrieves every item, so that a whole request ranks what these tests give."""
    retrieval = world.config().to_dict()["retrieval"]
    assert isinstance(retrieval, dict)
    store = publish_live(tmp_path / "tiny", world.config(retrieval={**retrieval, "keep": 20}))
    with Funnel.open(store) as funnel:
        yield funnel


def ids(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


def whole(funnel: Funnel, user_id: int, k: int = K) -> list[tuple[int, float]]:
    answer = funnel.recommend(Request(user_id, k, NOW, CONTEXT))
    return [(one.item_id, one.utility_micros) for one in answer.winners]


def ranked(funnel: Funnel, item_ids: torch.Tensor, *askers: Asker, k: int = K, **values: torch.Tensor):
    return funnel.ranking.rank(item_ids, askers, k, values)


def row(found, n: int = 0) -> list[tuple[int, float]]:
    kept = found.winners.valid[n]
    return list(zip(found.winners.item_ids[n][kept].tolist(), found.winners.utility[n][kept].tolist(), strict=True))


def test_every_users_winners_are_those_of_a_whole_request(every: Funnel) -> None:
    users = [1, 2, 3, 404]
    found = ranked(every, ids(*[ALL] * 4), *(Asker(NOW, one, context=CONTEXT) for one in users))
    for n, user_id in enumerate(users):
        assert [one for one, _ in row(found, n)] == [one for one, _ in whole(every, user_id)]
        assert [u for _, u in row(found, n)] == pytest.approx([u for _, u in whole(every, user_id)], rel=1e-5)
    assert found.is_unknown_user.tolist() == [False, False, False, True]
    assert found.winners.probs.shape == (4, K, 2)


def test_users_ranked_a_few_at_a_time_get_the_same(every: Funnel, monkeypatch: pytest.MonkeyPatch) -> None:
    askers = [Asker(NOW, one, context=CONTEXT) for one in (1, 2, 3)]
    together = ranked(every, ids(ALL, ALL[::-1], ALL), *askers)
    monkeypatch.setattr(ranking, "_AT_ONCE", 2 * len(ALL))
    apart = ranked(every, ids(ALL, ALL[::-1], ALL), *askers)
    for n in range(3):
        assert [one for one, _ in row(together, n)] == [one for one, _ in row(apart, n)]


def test_padding_and_items_of_no_version_are_not_ranked_and_only_the_latter_are_counted(every: Funnel) -> None:
    found = ranked(every, ids([999, PADDING, 103, -7], [101, 102, PADDING, PADDING]), *[Asker(NOW, 1, {}, CONTEXT)] * 2)
    assert [one for one, _ in row(found)] == [103]
    assert {one for one, _ in row(found, 1)} == {101, 102}
    assert found.num_unknown.tolist() == [2, 0]
    assert found.winners.item_ids[0].tolist() == [103, -1, -1, -1, -1]


def test_what_is_live_of_items_counts(every: Funnel) -> None:
    asker = Asker(NOW, 1, context=CONTEXT)
    before = row(ranked(every, ids(ALL), asker))
    (first, _), (second, utility) = before[:2]
    every.change([ItemChange(first, on=False), ItemChange(second, pacing=0.5)])
    after = dict(row(ranked(every, ids(ALL), asker)))
    assert first not in after
    assert after[second] == pytest.approx(0.5 * utility)


def test_values_of_this_call_count_in_place_of_the_items_own(every: Funnel) -> None:
    asker = Asker(NOW, 1, context=CONTEXT)
    bids = torch.tensor([[1e6, *[0.0] * 7]], dtype=torch.float64)
    found = ranked(every, ids(ALL), asker, bid_micros=bids)
    assert found.winners.item_ids[0, 0] == 100
    click, like = found.winners.probs[0, 0].tolist()
    assert found.winners.utility[0, 0].item() == pytest.approx(click * 1e6 + like * 10.0)


def test_a_profile_that_is_given_is_read_like_one_that_is_stored(every: Funnel) -> None:
    # user 3 is known, of no past
    stored = row(ranked(every, ids(ALL), Asker(NOW, 3, context=CONTEXT)))
    given = ranked(every, ids(ALL), Asker(NOW, profile={"country": "de"}, context=CONTEXT))
    assert row(given) == stored
    assert not given.is_unknown_user.any()
    moved = row(ranked(every, ids(ALL), Asker(NOW, 3, {"country": "fr"}, CONTEXT)))
    assert moved == row(ranked(every, ids(ALL), Asker(NOW, profile={"country": "fr"}, context=CONTEXT)))
    assert moved != stored
    # what user 1 did stays his, whatever is said of his profile
    assert row(ranked(every, ids(ALL), Asker(NOW, 1, {"country": "de"}, CONTEXT))) != stored


def test_items_that_are_not_resident_are_fetched_and_ranked(tmp_path: Path, every: Funnel) -> None:
    with Funnel.open(published_with_tail(tmp_path / "tail" / "tiny")) as funnel:
        found = ranked(funnel, ids(ALL, ALL), *(Asker(NOW, one, context=CONTEXT) for one in (1, 2)))
        for n, user_id in enumerate((1, 2)):
            assert [one for one, _ in row(found, n)] == [one for one, _ in whole(every, user_id)]
        assert funnel.tail_counts["store"] > 0
        assert found.winners.num_absent.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("asker", "k", "says"),
    [
        (Asker(NOW, 1, context={"hour": 1}), 1, "context.surface: missing; expected text, or null"),
        (Asker(NOW, 1, context={**CONTEXT, "hour": "x"}), 1, "context.hour: expected an integer, got 'x'"),
        (Asker(NOW, 1, {"country": 7}, CONTEXT), 1, "user.country: expected text, got 7"),
        (Asker(NOW, 1, {"contry": "de"}, CONTEXT), 1, "user.contry: expected one of ['country']; did you mean"),
        (Asker(-1, 1, context=CONTEXT), 1, "time_ms: expected UTC milliseconds since 1970"),
        (Asker(NOW, 1, context=CONTEXT), 0, "k: expected 1 to 5, got 0"),
        (Asker(NOW, 1, context=CONTEXT), 6, "k: expected 1 to 5, got 6"),
    ],
)
def test_what_is_wrong_is_named(funnel: Funnel, asker: Asker, k: int, says: str) -> None:
    with pytest.raises(RequestError) as raised:
        ranked(funnel, ids(ALL), asker, k=k)
    assert str(raised.value).startswith(says)


def test_too_much_too_little_and_a_value_no_utility_reads_are_refused(funnel: Funnel) -> None:
    asker = Asker(NOW, 1, context=CONTEXT)
    with pytest.raises(RequestError, match=r"bid_micro: expected one of \['bid_micros'\]; did you mean"):
        ranked(funnel, ids(ALL), asker, bid_micro=torch.zeros(1, 8))
    with pytest.raises(RequestError, match=r"item_ids: expected 1 candidate a row or more, .* got 1 x 0"):
        ranked(funnel, torch.zeros(1, 0, dtype=torch.int64), asker)
    much = torch.zeros(1, 1, dtype=torch.int64).expand(1, MOST_CANDIDATES + 1)
    with pytest.raises(RequestError, match="at most 1,048,576 in all, got 1 x 1,048,577"):
        ranked(funnel, much, asker)
    with pytest.raises(RequestError, match=f"expected 1 to {MOST_USERS} rows, one a user, got {MOST_USERS + 1}"):
        ranked(funnel, much[:, :1].expand(MOST_USERS + 1, 1), *[asker] * (MOST_USERS + 1))
    with pytest.raises(RequestError, match="got 0"):
        ranked(funnel, torch.zeros(0, 3, dtype=torch.int64))
