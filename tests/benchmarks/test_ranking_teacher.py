"""What is compared is comparable; bars are held by what they are of; differences are told with their intervals."""

import numpy as np
import pytest

from benchmarks.ranking_teacher import BARS, PEER, ablations
from benchmarks.ranking_world import FUNNEL, TEACHER, difference_rows, metric_rows
from prerank.config import load_config
from prerank.evaluate.compare import Predictions, compare
from prerank.evaluate.estimates import Resampling
from prerank.evaluate.winners import Winners


@pytest.fixture(scope="module")
def config():
    return load_config(FUNNEL)


def test_every_ablation_takes_something_away(config):
    without = ablations(config)
    assert len({repr((one.features.to_dict(), one.heavy_ranker)) for one in without.values()}) == len(without)
    assert all(one != config for one in without.values())
    state = without["without user state"].features.interaction
    assert state
    assert all(counter.by for counter in state.values())


@pytest.fixture
def told():
    """A heavy ranker that knows a part of the labels, and a peer that knows nothing of them."""
    rng = np.random.default_rng(0)
    label, user = (rng.random((400, 1)) < 0.4).astype(int), np.arange(400) % 50
    winners = Winners(("click",), label, user, np.zeros(400, dtype=int))
    knowing = np.clip(0.4 + 0.3 * (label - 0.4) + 0.1 * rng.standard_normal((400, 1)), 0.01, 0.99)
    models = {
        TEACHER: Predictions(("click",), knowing),
        PEER: Predictions(("click",), rng.uniform(0.1, 0.9, (400, 1))),
    }
    return compare(models, winners, against=PEER, how=Resampling(draws=20))


def test_the_heavy_ranker_is_found_by_its_name_where_it_teaches_nobody(told):
    rows = {row.name: row for row in metric_rows([told, told], TEACHER, ["click"], [("winners", "auc")])}
    assert rows[f"{TEACHER}, winners, click auc"].value > 0.75
    assert rows[f"{TEACHER}, winners, click auc: deviation over seeds"].value == 0


def test_a_loss_is_to_be_small_and_an_auc_large(told):
    bars = {("auc", "click"): 0.5, ("log_loss", "click"): 0.01}
    wanted = [("winners", metric) for metric in ("auc", "log_loss", "calibration_error")]
    held = [row.holds for row in metric_rows([told], TEACHER, ["click"], wanted, bars)]
    assert held == [True, False, None]
    assert {metric for metric, _ in BARS} == {"auc", "log_loss"}


def test_the_heavy_ranker_beside_the_peer_has_an_interval_around_its_difference(told):
    rows = {row.name: row for row in difference_rows(told, TEACHER, ["click"], ["auc"], f"{PEER}, seed 7")}
    said = f"{TEACHER}, winners, click auc: over {PEER}, seed 7"
    assert 0 < rows[f"{said}: low"].value <= rows[said].value <= rows[f"{said}: high"].value
