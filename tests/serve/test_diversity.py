"""The tiny world with [diversity], from the funnel file to the answer."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prerank.bundle.load import load
from prerank.bundle.registry import Registry
from prerank.config import DiversityRule
from prerank.serve.funnel import Funnel
from prerank.types import CandidateSet, Request
from tests.serve import world
from tests.serve.conftest import publish_live

GENRES = [f"genre {i % 3}" for i in range(world.NUM_ITEMS)]


@pytest.fixture(scope="module", params=[1, 2])
def most(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, most: int) -> Path:
    rules = {"genre": {"at_most": most}, "bid_micros": {"at_most": 1}}
    # every item is a candidate
    config = replace(world.config(diversity=rules), retrieval=replace(world.config().retrieval, keep=world.NUM_ITEMS))
    return publish_live(tmp_path_factory.mktemp("store") / "diverse", config)


@pytest.mark.parametrize("user_id", [1, 2, 3, 4])
@pytest.mark.parametrize("workers", [0, 1])
def test_no_answer_shows_more_of_a_group_than_it_may(store: Path, most: int, user_id: int, workers: int) -> None:
    with Funnel.open(store, workers=workers) as funnel:
        request = Request(user_id, 5, world.UNTIL, {"hour": 1, "surface": "feed"})
        winners = funnel.recommend(request).winners
        shown = Counter(str(winner.metadata["genre"]) for winner in winners)
    assert set(shown.values()) <= set(range(most + 1))
    assert len(winners) == min(5, 3 * most)


def test_the_winners_are_those_of_plain_greedy_on_the_scorers_own_utilities(store: Path, most: int) -> None:
    scorer = load(store / "versions" / str(Registry(store).live())).scorer
    user = {
        "country": torch.tensor([1]),
        "clicks": torch.tensor([[-1, 2, 4]]),
        "seen": torch.tensor([[-1, -1, 1, 2]]),
        "hour": torch.tensor([1]),
        "surface": torch.tensor([2]),
    }
    rows = torch.arange(world.NUM_ITEMS)[None]
    with torch.inference_mode():
        values = {name: torch.from_numpy(scorer.items.codes(name, rows.numpy())) for name in scorer.utility.values}
        utility = scorer.utility(scorer.probs(user, rows), values)[0].tolist()
        top = scorer(user, CandidateSet(rows, torch.zeros(rows.shape), rows >= 0), 5)
    won: list[int] = []
    for row in sorted(range(world.NUM_ITEMS), key=lambda row: -utility[row]):
        if len(won) < 5 and [GENRES[other] for other in won].count(GENRES[row]) < most:
            won.append(row)
    assert top.rows[top.valid].tolist() == won


def test_the_rules_are_in_the_version_in_the_order_of_its_rows(store: Path, most: int) -> None:
    bundle = load(store / "versions" / str(Registry(store).live()))
    assert bundle.config.diversity["genre"] == DiversityRule(most)
    assert bundle.scorer.diversity is not None
    assert bundle.scorer.diversity.codes[:, 0].tolist() == [i % 3 for i in range(world.NUM_ITEMS)]
    assert "diversity.codes" in bundle.scorer.state_dict()
