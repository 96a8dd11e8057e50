"""The truth stands beside the right events, a model that tells it is told so, and every row of the docs is made."""

import re
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks import market_truth, ranking_market, readme
from benchmarks.machine import REPOSITORY
from benchmarks.market import _Log
from benchmarks.market_truth import View
from benchmarks.ranking_market import World
from benchmarks.ranking_world import num_weights
from benchmarks.result import Hardware, Result
from prerank.config import load_config
from prerank.market.generate import MarketTruth, best_rank_error
from prerank.market.marginals import SURFACES
from prerank.metrics.divergence import bernoulli_kl
from prerank.models.rankers import build_one_ranker
from prerank.train.candidates import Retrieved, one_event_a_user

TINY = replace(ranking_market.QUICK, seeds=(7, 8), segments={300: 128}, split_test=1_500)
MARKER = re.compile(r"<!-- measured:((?:ranking_market|market_rankers|market_segments).*?) -->")


@pytest.fixture(scope="module")
def market(tmp_path_factory):
    config = load_config(REPOSITORY / "funnel.toml")
    small = replace(config.ranker, batch=4096)
    return World.make(replace(config, ranker=small), tmp_path_factory.mktemp("market"), TINY.num_ads, TINY.impressions)


@pytest.fixture(scope="module")
def known(market):
    truth, prepared = MarketTruth.load(market.folder), market.prepared()
    log = market_truth.taken(_Log.read(truth, market.folder), market_truth.log_order(market.folder, prepared))
    return truth, prepared, log


def test_the_truth_of_an_event_is_that_of_its_impression(market):
    prepared = market.prepared()
    log, truth = (pq.read_table(market.folder / f"{name}.parquet") for name in ("impressions", "truth"))
    keys = zip(*(log[name].to_pylist() for name in ("user_id", "item_id", "time_ms")), strict=True)
    expected = dict(zip(keys, truth["click_prob"].to_pylist(), strict=True))
    probs = truth["click_prob"].to_numpy()[market_truth.log_order(market.folder, prepared)]
    user, item = prepared.user_ids[prepared.events["user"]], prepared.item_ids[prepared.events["item"]]
    found = zip(user.tolist(), item.tolist(), prepared.events["time_ms"].tolist(), probs.tolist(), strict=True)
    assert len(expected) == len(probs)
    assert all(expected[user, item, time_ms] == prob for user, item, time_ms, prob in found)


def test_what_a_user_saw_of_an_advertiser_is_counted_as_the_truth_counts_it(market, known):
    truth, prepared, log = known
    events = one_event_a_user(prepared, market.config.data.days("test"), 2_000, 0)
    own = Retrieved(events, prepared.events["item"][events][:, None], np.ones((len(events), 1), dtype=bool))
    found = market_truth.pairs(truth, prepared, log, own)
    assert log.views[events].max() > 1
    for name in ("user", "ad", "surface", "hour", "views", "clicks"):
        np.testing.assert_array_equal(getattr(found, name), getattr(log, name)[events], err_msg=name)


def test_the_truth_of_candidates_is_the_mean_over_the_positions_of_the_log(market, known):
    truth, prepared, log = known
    asked = market_truth.pairs(truth, prepared, log, ranking_market.ask(market.config, prepared, TINY))
    train = market_truth.taken(log, np.flatnonzero(prepared.of_days(market.config.data.days("train"))))
    [prob] = market_truth.references(truth, train, train, asked)["truth"][1:]
    expected = np.zeros(len(prob))
    for position in range(market_truth.POSITIONS):
        place = np.full(len(prob), position)
        logit = truth.click_logit(asked.user, asked.ad, asked.surface, asked.hour, place, asked.views, asked.clicks)
        share = np.array([np.mean(train.position[train.surface == code] == position) for code in range(len(SURFACES))])
        expected += share[asked.surface] / (1 + np.exp(-logit))
    np.testing.assert_allclose(prob, expected, rtol=1e-9)


def test_a_model_that_tells_the_truth_has_no_divergence_and_a_rate_has_that_of_a_rate():
    draw = np.random.default_rng(0)
    truth, label = draw.uniform(0.01, 0.9, 300), draw.integers(0, 2, 300)
    view = View(truth, np.arange(300) // 3, {"impressions": np.arange(300), "impressions of feed": np.arange(9)}, label)
    rate = np.full((2, 300), 0.3)
    exact = {row.name: row.value for row in market_truth.judged_rows("exact", truth[None], view, in_full=False)}
    assert exact["exact, impressions, KL"] == exact["exact, impressions of feed, KL"] == 0
    assert "exact, impressions of feed, AUC" not in exact
    told = {row.name: row.value for row in market_truth.judged_rows("rate", rate, view, in_full=True)}
    nats = bernoulli_kl(truth, rate[0]).mean()
    assert told["rate, impressions, KL"] == pytest.approx(nats, rel=1e-5)
    assert told["rate, impressions, KL: deviation over seeds"] == 0
    assert told["rate, impressions of feed, AUC"] == 0.5
    less = {row.name: row.value for row in market_truth.paired_rows("less", truth[None], rate, view, draws=50)}
    assert less["less, impressions, KL"] == pytest.approx(-nats, rel=1e-5)
    assert less["less, impressions, KL: low"] < -nats < less["less, impressions, KL: high"] < 0


def test_no_dot_product_leaves_less_than_the_best_one():
    draw = np.random.default_rng(0)
    logit = draw.normal(size=(60, 40))
    bound = best_rank_error(logit, 8)
    left, values, right = np.linalg.svd(logit)
    near = (left[:, :8] * values[:8]) @ right[:8]
    for user, item in ((near, np.eye(40)), (draw.normal(size=(60, 8)), draw.normal(size=(8, 40)))):
        told = user @ item + draw.normal(size=(60, 1)) + draw.normal(size=40)
        assert market_truth.pair_error(logit, told) >= bound
    assert market_truth.pair_error(logit, logit + 3) == pytest.approx(0, abs=1e-20)


def test_rankers_have_about_equal_weights_and_one_training(market):
    rankers = ranking_market.models(load_config(REPOSITORY / "funnel.toml"))
    sizes = market.prepared().transforms.sizes()
    weights = {name: num_weights(build_one_ranker(config, sizes)) for name, config in rankers.items()}
    assert max(weights.values()) < 1.02 * min(weights.values()), weights
    assert len({(one.ranker.batch, one.ranker.learning_rate, one.ranker.dim) for one in rankers.values()}) == 1


def test_every_row_has_a_name_of_its_own_and_every_table_of_the_docs_has_rows(market):
    names = list(ranking_market.models(market.config))
    # one training stands for all, for how good they are is not the question
    one = ranking_market.judged(market, TINY, ranking_market.BASE, 7)
    both = ranking_market.split(market, TINY, ranking_market.BASE, 300)
    some = {name: [one, one] for name in names}
    many = {(name, 300): both for name in ranking_market.SPLIT}
    rows = [*ranking_market.truth_rows(market, TINY, some), *ranking_market.split_rows(market, TINY, many)]
    result = Result(
        "ranking_market", "2026-01-05T10:00:00Z", "0123456789ab", Hardware("Some CPU", 2, 24.0), {}, {}, {}, tuple(rows)
    )
    assert Result.from_json(result.to_json()) == result
    tables = [name for name, (question, _) in readme.TABLES.items() if question == "ranking_market"]
    assert len(tables) >= 5
    markers = [name for page in (REPOSITORY / "docs").rglob("*.md") for name in MARKER.findall(page.read_text())]
    for name in (*tables, *markers):
        assert readme.said(name, [result])
    assert result.row("knows everything, impressions, KL").value == pytest.approx(0, abs=1e-3)
    for name in names:
        assert result.row(f"{name}, candidates, error of the pairs").value >= 0


def test_the_ranker_for_all_learns_from_the_same_impressions_of_every_surface(market):
    prepared = market.prepared()
    learnt = ranking_market.learnt(market.config, prepared, 300)
    assert {name: len(rows) for name, rows in learnt.items()} == dict.fromkeys(SURFACES, 300)
    days = prepared.of_days(market.config.data.days("train"))
    for name, code in ranking_market.codes(prepared).items():
        assert days[learnt[name]].all()
        assert (prepared.events["surface"][learnt[name]] == code).all()
    assert not days[ranking_market.tested(market.config, prepared, TINY)].any()
