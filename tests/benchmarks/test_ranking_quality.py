"""What is compared is comparable; the rows' arithmetic."""

import numpy as np
import pytest

from benchmarks import ranking_quality
from benchmarks.ranking_quality import BASE, FULL, HARD, LESS_KL, ONCE, students
from benchmarks.ranking_world import FUNNEL, TEACHER, difference_rows, metric_rows, num_weights
from prerank.config import load_config
from prerank.evaluate.compare import Predictions, compare
from prerank.evaluate.consistency import Candidates
from prerank.evaluate.estimates import Resampling
from prerank.evaluate.winners import Winners
from prerank.models.rankers import build_one_ranker


@pytest.fixture(scope="module")
def config():
    return load_config(FUNNEL)


def test_every_student_is_trained_alike(config):
    """Seed, passes, batch and learning rate; teacher and candidates too, but where leaving them out is the question."""
    for name, one in students(config).items():
        same = ("epochs", "batch", "learning_rate", "weight_decay", "average", "dropout", "tables", "width", "experts")
        for option in same:
            assert getattr(one.ranker, option) == getattr(config.ranker, option), f"{name}.{option}"
        assert (one.features, one.retrieval, one.seed) == (config.features, config.retrieval, config.seed)
        assert one.heavy_ranker == (None if name == HARD else config.heavy_ranker)
        if name not in ONCE:
            assert one.distillation == config.distillation


def test_two_towers_and_the_cross_feature_ranker_have_about_equal_weights(config):
    sizes = {f"{owner}.{name}": 16 for owner, name, _ in config.features}  # as many as there are tabs
    found = {name: num_weights(build_one_ranker(one, sizes)) for name, one in students(config).items()}
    for name in ("mtmd", FULL):
        assert 0.9 < found[name] / found[BASE] < 1.1, found


def test_bars_are_set_for_students_there_are(config):
    assert set(LESS_KL) <= set(students(config))


@pytest.fixture
def told():
    """One seed: a student that is the teacher, and one whose logits are off; known numbers."""
    rng = np.random.default_rng(0)
    label, user = (rng.random((400, 1)) < 0.4).astype(int), np.arange(400) % 50
    teacher = rng.uniform(0.1, 0.9, (400, 1))
    on_candidates = rng.uniform(0.1, 0.9, (50, 200, 1))
    winners = Winners(("click",), label, user, np.zeros(400, dtype=int))
    candidates = Candidates(("click",), np.ones((50, 200), dtype=bool), np.arange(50), np.zeros(50, dtype=int))
    off = [1 / (1 + np.exp(-(np.log(p / (1 - p)) + 1))) for p in (teacher, on_candidates)]
    models = {
        BASE: Predictions(("click",), off[0], off[1]),
        FULL: Predictions(("click",), teacher, on_candidates),
    }
    taught = Predictions(("click",), teacher, on_candidates)
    return compare(models, winners, candidates, taught, against=BASE, how=Resampling(draws=20))


def test_a_student_that_is_the_teacher_has_no_divergence_and_holds_its_bars(told):
    rows = {row.name: row for row in ranking_quality._divergence_rows([told, told], FULL, ["click"])}
    assert rows[f"{FULL}, winners, KL over tasks"].value == pytest.approx(0, abs=1e-9)
    assert rows[f"{FULL}, candidates, KL over tasks"].holds
    wanted = (("candidates", "overlap@100"), ("winners", "auc"))
    rows = {row.name: row for row in metric_rows([told, told], FULL, ["click"], wanted, ranking_quality.BARS)}
    assert rows[f"{FULL}, candidates, click overlap@100"].value == 1
    assert rows[f"{FULL}, candidates, click overlap@100"].holds
    assert rows[f"{FULL}, winners, click auc: deviation over seeds"].value == 0


def test_the_teacher_of_students_is_found_by_its_name(told):
    [row] = metric_rows([told], TEACHER, ["click"], [("winners", "auc")])
    assert row.name == f"{TEACHER}, winners, click auc"
    assert 0 < row.value < 1


def test_a_difference_has_its_interval_around_it(told):
    rows = {row.name: row for row in difference_rows(told, FULL, ["click"], ["kl"], f"{BASE}, first seed")}
    said = f"{FULL}, winners, click kl: over {BASE}, first seed"
    assert rows[f"{said}: low"].value <= rows[said].value <= rows[f"{said}: high"].value < 0
