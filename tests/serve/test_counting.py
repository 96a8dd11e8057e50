"""Events are counted while candidates are retrieved: a stage of its own, in funnels that have counters."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from prerank._tensor_files import read_tensors
from prerank.bundle.golden import Golden
from prerank.bundle.manifest import GOLDEN
from prerank.bundle.registry import Registry
from prerank.errors import StoreFailed
from prerank.serve.asking import GoldenRequests
from prerank.serve.funnel import Funnel
from prerank.serve.ranking import Asker
from prerank.serve.seen import Seen, begin, end
from prerank.stores.live import LiveUsers
from prerank.types import Request
from tests.serve import world
from tests.serve.conftest import publish_live
from tests.serve.world import T0

NOW, CONTEXT = T0 + 10_000, {"hour": 1, "surface": "feed"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish_live(tmp_path_factory.mktemp("counting") / "tiny", world.counting())


@pytest.fixture
def funnel(store: Path) -> Iterator[Funnel]:
    with Funnel.open(store) as funnel:
        yield funnel


def test_a_request_counts_its_users_events_and_says_how_many(funnel: Funnel) -> None:
    counted = {one.name: (one.num_in, one.num_out) for one in funnel.recommend(Request(1, 3, NOW, CONTEXT)).stages}
    assert counted["count_events"] == (5, len(world.counting().features.interaction))
    assert counted["prepare_user"][0] == counted["expand_user"][1] + counted["count_events"][1]


def test_the_winners_are_those_of_the_ranking_stage_that_counts_at_once(funnel: Funnel) -> None:
    for user_id in (1, 2, 9):
        whole = funnel.recommend(Request(user_id, 3, NOW, CONTEXT)).winners
        ids = torch.tensor([[one.item_id for one in whole]])
        alone = funnel.ranking.rank(ids, [Asker(NOW, user_id, context=CONTEXT)], 3).winners
        assert alone.item_ids[0].tolist() == [one.item_id for one in whole]
        assert alone.utility[0].tolist() == pytest.approx([one.utility_micros for one in whole], rel=1e-5)


def test_what_is_logged_of_a_request_has_the_counters_too(funnel: Funnel) -> None:
    seen, request = Seen("r", is_logged=True), Request(1, 3, NOW, CONTEXT)
    token = begin(seen)
    funnel.recommend(request)
    end(token)
    whole, _ = funnel.ranking._expand.expand(funnel._users.get(1), request)
    assert seen.served is not None
    assert seen.served.features.keys() == whole.keys() > world.counting().features.interaction.keys()
    assert all(torch.equal(seen.served.features[name], column) for name, column in whole.items())


def test_golden_requests_bring_their_counters(store: Path) -> None:
    with Funnel.open(store, workers=0) as funnel:
        path = Registry(store).path(funnel.version)
        asking = GoldenRequests(funnel, path)
        won = [[one.item_id for one in asking.ask(number).winners] for number in range(asking.num)]
    answers = Golden.from_tensors(read_tensors(path / GOLDEN)[0]).answers
    assert won == answers.item_ids[:, : len(won[0])].tolist()


def test_a_user_of_whom_nothing_can_be_read_has_done_nothing(funnel: Funnel, monkeypatch: pytest.MonkeyPatch) -> None:
    as_new = funnel.recommend(Request(9, 3, NOW, CONTEXT)).winners

    def down(*_: object) -> None:
        raise StoreFailed("the user cannot be read")

    monkeypatch.setattr(LiveUsers, "get", down)
    answer = funnel.recommend(Request(1, 3, NOW, CONTEXT))
    assert answer.winners == as_new
    assert {one.name: one.num_in for one in answer.stages}["count_events"] == 0
