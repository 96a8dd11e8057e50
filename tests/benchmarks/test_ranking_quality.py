"""What the comparison of rankers holds still, and what it counts."""

import numpy as np
import pytest
from torch import nn

from benchmarks import ranking_quality
from benchmarks.retrieval_quality import standard_error
from benchmarks.run import Options
from prerank.config import load_config
from prerank.metrics.classification import log_loss
from prerank.models.rankers import RANKERS


def test_every_ranker_is_compared_under_the_same_training():
    ranker = load_config(ranking_quality.FUNNEL).ranker
    compared = ranking_quality.compared(ranker)
    assert {one.model for one in compared.values()} == set(RANKERS)
    assert compared[ranking_quality.BASE] == ranker
    for one in compared.values():
        assert (one.dim, one.epochs, one.batch, one.learning_rate, one.weight_decay, one.dropout) == (
            ranker.dim, ranker.epochs, ranker.batch, ranker.learning_rate, ranker.weight_decay, ranker.dropout
        )  # fmt: skip


def test_weights_are_counted_without_the_tables():
    model = nn.ModuleDict({"table": nn.Embedding(100, 7), "inner": nn.Sequential(nn.Linear(7, 3), nn.Embedding(9, 2))})
    assert ranking_quality.num_weights(model) == 7 * 3 + 3  # type: ignore[arg-type]


def test_the_mean_of_the_losses_is_the_log_loss():
    draw = np.random.default_rng(0)
    label, prob = draw.integers(0, 2, 50).astype(np.float32), draw.uniform(0.01, 0.99, (3, 50)).astype(np.float32)
    expected = np.mean([log_loss(label, one) for one in prob])
    assert ranking_quality.log_losses(label, prob).mean() == pytest.approx(expected, rel=1e-6)


def test_the_error_over_users_is_that_of_a_mean_and_does_not_shrink_when_a_users_rows_are_doubled():
    values, user = np.random.default_rng(0).normal(size=400), np.arange(400)
    once = ranking_quality.standard_error_over_users(values, user, seed=0)
    assert once == pytest.approx(standard_error(values, seed=0), rel=0.1)
    twice = ranking_quality.standard_error_over_users(np.tile(values, 2), np.tile(user, 2), seed=0)
    assert twice == pytest.approx(once, rel=1e-9)


def test_without_data_the_row_says_it_was_skipped():
    [row] = ranking_quality.measure(Options(), {}).rows
    assert "skipped: no folder of KuaiRand-Pure" in row.name
    assert row.value is None
