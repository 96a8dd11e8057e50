"""What visits are worth is what the truth says, and no two towers can say it."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks import market_truth, ranking_market
from benchmarks.machine import REPOSITORY
from benchmarks.market import _Log
from benchmarks.market_visits import MATCHES, VISITS, Visitors, visit_rows
from benchmarks.ranking_market import World
from prerank.config import load_config
from prerank.market.generate import MarketTruth
from prerank.market.hash import rows_of_ids
from prerank.models.rankers import build_one_ranker
from prerank.train.ranking import Impressions

TINY = ranking_market.QUICK


@pytest.fixture(scope="module")
def market(tmp_path_factory):
    config = load_config(REPOSITORY / "funnel.toml")
    return World.make(config, tmp_path_factory.mktemp("market"), TINY.num_ads, TINY.impressions)


@pytest.fixture(scope="module")
def known(market):
    truth, prepared = MarketTruth.load(market.folder), market.prepared()
    log = market_truth.taken(_Log.read(truth, market.folder), market_truth.log_order(market.folder, prepared))
    return truth, prepared, log


def test_what_visits_are_worth_is_what_the_truth_says_with_them_and_without(market, known):
    truth, prepared, log = known
    visitors = Visitors.of(truth, prepared, market.config, TINY.questions)
    num = len(visitors.events)
    assert num > TINY.questions / 2
    assert len(np.unique(visitors.items)) == num
    worth = visitors.worth(truth, log, prepared)
    user, ad = (
        np.repeat(log.user[visitors.events], num),
        np.tile(rows_of_ids("item", prepared.item_ids[visitors.items]), num),
    )
    pairs = user, ad, *(np.repeat(getattr(log, name)[visitors.events], num) for name in ("surface", "hour"))
    known_of, never = truth.users.visited.copy(), np.zeros(len(user), np.int64)
    with_them = truth.click_logit(*pairs, never, never, never)
    try:
        truth.users.visited[:] = -1
        without = truth.click_logit(*pairs, never, never, never)
    finally:
        truth.users.visited[:] = known_of
    np.testing.assert_allclose(worth.ravel(), with_them - without, atol=1e-9)
    assert (np.diag(worth) > 0).all()
    assert (worth > 0).mean() < 0.1


def test_two_towers_leave_of_visits_what_a_dot_product_must(market, known):
    truth, prepared, log = known
    visitors = Visitors.of(truth, prepared, market.config, TINY.questions)
    worth, dim = visitors.worth(truth, log, prepared), 4
    test = Impressions(prepared, market.config, np.flatnonzero(prepared.of_days(market.config.data.days("test"))))
    for model in ("mmoe_dcn", "mtmd", "two_tower"):
        options = replace(market.config.ranker, model=model, dim=dim)
        ranker = build_one_ranker(replace(market.config, ranker=options), prepared.transforms.sizes()).eval()
        found = visitors.told(ranker, test)
        assert list(found) == [VISITS], "there are no matches"
        told = found[VISITS]
        energy = np.linalg.svd(told - told.mean(0) - told.mean(1, keepdims=True) + told.mean(), compute_uv=False) ** 2
        assert energy[dim:].sum() < 1e-2 * energy.sum(), "it is a product of so many numbers"
    rows = {row.name: row.value for row in visit_rows(worth, {"exact": [worth], model: [told]}, dim)}
    assert rows["exact, error of the pairs"] == pytest.approx(0, abs=1e-20)
    assert rows[f"{model}, error of the pairs"] >= rows[f"best rank error, d = {dim}"] > 0.5


def test_matches_alone_change_nothing_where_nothing_matches(market, known):
    truth, prepared, _ = known
    visitors = Visitors.of(truth, prepared, market.config, TINY.questions)
    test = Impressions(prepared, market.config, np.flatnonzero(prepared.of_days(market.config.data.days("test"))))
    ranker = build_one_ranker(market.config, prepared.transforms.sizes()).eval()
    told = visitors.told(ranker, test)[MATCHES]
    user, [day] = test.users.at(visitors.events), np.unique(np.asarray(test.day[visitors.events]))
    advertiser = test.items.on(int(day))["advertiser_id"][visitors.items]
    matches = (user[VISITS].unsqueeze(1) == advertiser[None, :, None]).any(-1).numpy()
    assert 0 < matches.sum() < matches.size
    assert (np.abs(told[matches]) > 0).all()
    assert np.abs(told[~matches]).max() < 1e-3 * np.abs(told[matches]).mean()
