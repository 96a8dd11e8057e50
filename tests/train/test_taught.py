"""The heavy ranker, what it teaches, and what learns from it; on the small world of `conftest`."""

import tomllib
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from prerank.config import Config, Distillation, HeavyRankerConfig, Segments, parse_config
from prerank.errors import BundleError, ConfigError, DataError, SchemaMismatch, TrainingError
from prerank.features.transforms import Transforms
from prerank.lifecycle.build import load_users, publish_trained
from prerank.lifecycle.training import train
from prerank.models.heavy import HeavyRanker
from prerank.models.segmented import SegmentedRanker
from prerank.serve.funnel import Funnel
from prerank.train.candidates import Retriever
from prerank.train.distill import Taught
from prerank.train.lessons import Lessons, drawn, fold_of, learn
from prerank.train.ranking import Impressions
from prerank.train.segments import own_codes, train_segments
from prerank.train.teacher import load_teacher, save_teacher, train_heavy
from prerank.types import Request
from tests.conftest import small_funnel

HEAVY = HeavyRankerConfig(
    width=16, hidden=(16,), experts=1, low_rank=4, epochs=1, batch=512, average=0.9, patience=0, folds=2
)


@pytest.fixture(scope="module")
def config(world) -> Config:
    ranker = replace(world.config.ranker, model="cross_feature", width=16, experts=2, low_rank=4)
    taught = Distillation(candidates=3, among=40)
    return replace(world.config, heavy_ranker=HEAVY, distillation=taught, ranker=ranker)


@pytest.fixture(scope="module")
def heavy(config, trained, tmp_path_factory) -> HeavyRanker:
    prepared = trained.prepared
    events = np.flatnonzero(prepared.of_days(config.data.days("train")))
    return train_heavy(prepared, config, trained.towers, events, tmp_path_factory.mktemp("heavy"), "h")[0]


@pytest.fixture(scope="module")
def events(config, trained) -> np.ndarray:
    return np.flatnonzero(trained.prepared.of_days(config.data.days("train")))[:700]


@pytest.fixture(scope="module")
def lessons(config, trained, heavy, events, tmp_path_factory) -> Lessons:
    path = tmp_path_factory.mktemp("lessons") / "l.safetensors"
    return learn(trained.prepared, config, events, trained.towers, heavy, [], path, "l")


def logits_by_hand(ranker, prepared, config, event: int, row: int) -> torch.Tensor:
    taught = Impressions(prepared, config, np.array([event]))
    taught.item = np.full(len(prepared.events["item"]), row)
    with torch.inference_mode():
        return taught.batch(np.array([0])).logits(ranker)[0]


def test_lessons_hold_what_the_teacher_says_of_the_impression_and_of_each_candidate(
    config, trained, heavy, events, lessons
):
    for place in (0, 5, 699):
        event = int(events[place])
        own = int(trained.prepared.events["item"][event])
        by_hand = logits_by_hand(heavy, trained.prepared, config, event, own)
        torch.testing.assert_close(lessons.winner[place], by_hand, rtol=1e-4, atol=1e-5)
        for number, row in enumerate(lessons.rows[place]):
            by_hand = logits_by_hand(heavy, trained.prepared, config, event, int(row))
            torch.testing.assert_close(lessons.candidate[place, number], by_hand, rtol=1e-4, atol=1e-5)


def test_candidates_are_of_what_retrieval_returned_and_never_the_item_shown(config, trained, events, lessons):
    retriever = Retriever(trained.towers, trained.prepared, config)
    returned = retriever.rows(events, config.distillation.among, leave_out_own=True)
    own = trained.prepared.events["item"][events]
    for rows, among, shown in zip(lessons.rows, returned, own, strict=True):
        assert len(set(rows.tolist())) == len(rows)
        assert set(rows.tolist()) <= set(among.tolist()) - {int(shown)}


def test_candidates_are_drawn_uniformly_without_replacement():
    found = np.tile(np.arange(10), (20_000, 1))
    counts = np.bincount(drawn(found, 3, np.random.default_rng(0)).ravel(), minlength=10)
    np.testing.assert_allclose(counts, 6000, atol=5 * np.sqrt(6000))
    few = drawn(np.array([[4, -1, -1, -1]]), 2, np.random.default_rng(0))
    assert sorted(few[0].tolist()) == [-1, 4]
    assert drawn(np.array([[4, 7]]), 3, np.random.default_rng(0)).shape == (1, 3)


def test_an_impression_is_labelled_by_the_teacher_that_never_saw_its_user(config, trained, heavy, events, tmp_path):
    prepared, user = trained.prepared, np.asarray(trained.prepared.events["user"])[events]
    torch.manual_seed(1)
    others = [HeavyRanker(config, prepared.transforms.sizes()).eval() for _ in range(2)]
    found = learn(prepared, config, events, trained.towers, heavy, others, tmp_path / "l", "l")
    fold = fold_of(user, 2, config.seed)
    assert set(fold.tolist()) == {0, 1}
    for number in (0, 1):
        alone = learn(prepared, config, events, trained.towers, others[number], [], tmp_path / f"{number}", "l")
        mine = torch.from_numpy(np.flatnonzero(fold == number))
        torch.testing.assert_close(found.winner[mine], alone.winner[mine], rtol=1e-4, atol=1e-5)
    plain = learn(prepared, config, events, trained.towers, heavy, [], tmp_path / "plain", "l")
    assert torch.equal(found.candidate, plain.candidate), "candidates have no label that the teacher could have seen"


def test_a_fold_is_a_users_at_every_moment_and_folds_are_alike_in_size():
    user = np.random.default_rng(0).integers(0, 50_000, 200_000)
    fold = fold_of(user, 4, seed=7)
    assert all(len(set(fold[user == one].tolist())) <= 1 for one in range(200))
    assert np.bincount(fold_of(np.arange(40_000), 4, 7)).min() > 9_500


def test_lessons_made_before_are_read_again_and_those_of_another_training_refused(
    config, trained, heavy, events, lessons, tmp_path
):
    path = tmp_path / "l.safetensors"
    first = learn(trained.prepared, config, events, trained.towers, heavy, [], path, "one")
    again = learn(trained.prepared, config, events, trained.towers, None, [], path, "one")
    assert torch.equal(first.candidate, again.candidate)
    assert np.array_equal(first.rows, again.rows)
    with pytest.raises(TrainingError, match="lessons of another training; delete the file"):
        learn(trained.prepared, config, events, trained.towers, heavy, [], path, "two")


def test_the_loss_is_kl_of_winners_and_of_candidates_and_asked_for_the_real_labels(config, trained, heavy, lessons):
    options = Distillation(candidates=3, among=40, candidate_weight=0.5, label_weight=0.25)
    taught = Taught(trained.prepared, replace(config, distillation=options), lessons)
    batch = taught.batch(np.arange(50))
    logits = batch.logits(heavy)
    t, s = batch.teacher.double().sigmoid(), (logits.double() + 0.3).sigmoid()
    kl = t * (t / s).log() + (1 - t) * ((1 - t) / (1 - s)).log()
    shifted = batch.divergences(logits + 0.3)
    torch.testing.assert_close(shifted[0].double(), kl[:, 0].mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(shifted[1].double(), kl[:, 1:].mean(), rtol=1e-4, atol=1e-6)
    whole = batch.loss(heavy)
    winners, candidates = batch.divergences(logits)
    real = binary_cross_entropy_with_logits(logits[:, 0], batch.labels)
    torch.testing.assert_close(whole, winners + 0.5 * candidates + 0.25 * real)


def test_an_item_made_once_for_a_batch_gives_each_of_its_pairs_its_own_logits_and_gradient(
    config, trained, heavy, lessons
):
    taught = Taught(trained.prepared, config, lessons)
    batch = taught.batch(np.arange(60))
    pairs = batch.place.numel()
    assert len(next(iter(batch.items.values()))) < pairs / 2
    items = {name: column[batch.place].flatten(0, 1) for name, column in batch.items.items()}
    apart = replace(batch, items=items, place=torch.arange(pairs).view(batch.place.shape))
    torch.testing.assert_close(batch.logits(heavy), apart.logits(heavy), rtol=1e-4, atol=1e-5)
    found = []
    for one in (batch, apart):
        heavy.zero_grad()
        (one.logits(heavy) * one.teacher).mean().backward()
        found.append(
            {name: weight.grad.clone() for name, weight in heavy.named_parameters() if weight.grad is not None}
        )
    heavy.zero_grad()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-3, atol=1e-6, msg=name)


def test_the_teacher_has_nothing_to_learn_from_itself(config, trained, heavy, lessons):
    found = Taught(trained.prepared, config, lessons).divergence(heavy)
    assert found["kl_winners"] == pytest.approx(0, abs=1e-6)
    assert found["kl_candidates"] == pytest.approx(0, abs=1e-6)


def test_a_missing_candidate_weighs_nothing(config, trained, heavy, lessons):
    rows = lessons.rows.copy()
    rows[:, 1] = -1
    without = replace(lessons, rows=rows)
    one, two = (Taught(trained.prepared, config, some).batch(np.arange(9)) for some in (lessons, without))
    teacher = two.teacher + torch.tensor([0.0, 0.5, 9.0, 0.5])[None, :, None]
    moved = replace(two, teacher=teacher)
    assert moved.divergences(two.logits(heavy))[1] < 0.1
    assert not two.valid[:, 1].any()
    assert one.valid.all()


def test_a_funnel_with_a_heavy_ranker_is_trained_published_and_served_again_and_again(config, world, tmp_path):
    home, tables = tmp_path / "store", world.tables()
    told: list[str] = []
    trained = train(config, tables, home, lambda what, done, total, unit: told.append(what))
    assert any("without fold 2 of 2" in what for what in told)
    assert "ask the heavy ranker" in told
    assert {"kl_winners", "kl_candidates"} <= set(trained.ranker_epochs[0])
    told.clear()
    again = train(config, tables, home, lambda what, done, total, unit: told.append(what))
    assert (again.run, told) == (trained.run, [])
    for name, weights in trained.ranker.state_dict().items():
        assert torch.equal(weights, again.ranker.state_dict()[name])
    version = publish_trained(trained, tables, home, {})
    load_users(config, tables, trained.prepared, home)
    with Funnel.open(home, version) as funnel:
        request = Request(int(trained.prepared.user_ids[0]), 5, 1_768_000_000_000, {"surface": "feed", "hour": 9})
        assert len(funnel.recommend(request).winners) == 5


def test_a_segment_has_a_ranker_of_its_own_and_every_other_value_the_common_one(config, world, trained, tmp_path):
    segments = Segments(by="surface", own=("feed", "search"), least=100)
    mine = replace(config, segments=segments, heavy_ranker=None)
    prepared = trained.prepared
    events = np.flatnonzero(prepared.of_days(config.data.days("train")))
    examples = Impressions(prepared, mine, events)
    ranker, records = train_segments(prepared, mine, tmp_path, "s", events, examples, lambda _: lambda _: {})
    assert isinstance(ranker, SegmentedRanker)
    assert len(records) == 3
    codes = own_codes(prepared, segments)
    with torch.inference_mode():
        batch = examples.batch(np.arange(60))
        together = batch.logits(ranker.eval())
        for number, code in enumerate([None, *codes.values()]):
            surface = np.asarray(batch.user["surface"])
            rows = np.flatnonzero(~np.isin(surface, list(codes.values())) if code is None else surface == code)
            assert len(rows)
            alone = batch.logits(ranker.rankers[number])[rows]
            torch.testing.assert_close(together[rows], alone, rtol=1e-5, atol=1e-6)


def test_a_segment_with_too_few_rows_or_of_no_known_value_is_refused_by_name(config, trained, tmp_path):
    prepared = trained.prepared
    events = np.flatnonzero(prepared.of_days(config.data.days("train")))

    def asked(**options):
        mine = replace(config, segments=Segments(by="surface", **options))
        examples = Impressions(prepared, mine, events)
        train_segments(prepared, mine, tmp_path, "s", events, examples, lambda _: lambda _: {})

    with pytest.raises(DataError, match=r"at least 1,000,000 training impressions .* 'feed' has [\d,]+; leave it"):
        asked(own=("feed",), least=1_000_000)
    with pytest.raises(DataError, match=r"'surface' seen in training, one of \['feed', .*got 'shop'"):
        asked(own=("shop",))


def test_a_teacher_comes_back_from_its_file_and_is_taken_instead_of_training_one(
    config, world, trained, heavy, tmp_path
):
    path = tmp_path / "teacher.safetensors"
    save_teacher(path, heavy, config, trained.prepared.transforms)
    other = replace(config, heavy_ranker=replace(HEAVY, width=8, folds=0))
    again = load_teacher(path, other, trained.prepared.transforms)
    for name, weights in heavy.state_dict().items():
        assert torch.equal(weights, again.state_dict()[name])
    told: list[str] = []
    found = train(other, world.tables(), tmp_path / "s", lambda what, *_: told.append(what), teacher=path)
    assert not any("train the heavy" in what for what in told)
    assert found.heavy_epochs == ()


def test_a_teacher_of_other_features_or_tasks_is_refused_by_the_first_difference(
    config, world, trained, heavy, tmp_path
):
    path, transforms = tmp_path / "teacher.safetensors", trained.prepared.transforms
    save_teacher(path, heavy, config, transforms)
    plain = small_funnel()
    del plain["features"]["item"]["quality"]
    other = parse_config(plain, "other")
    less = Transforms(other.features, {k: v for k, v in transforms._fitted.items() if k != ("item", "quality")})
    with pytest.raises(SchemaMismatch, match=r"trained on other features: item feature 'quality': absent here"):
        load_teacher(path, replace(other, heavy_ranker=HEAVY), less)
    tasks = {"buy": config.tasks["click"]}
    with pytest.raises(SchemaMismatch, match=r"predicts \['click'\], and the tasks are \['buy'\]"):
        load_teacher(path, replace(config, tasks=tasks), transforms)
    path.write_bytes(b"nothing")
    with pytest.raises(BundleError, match="cannot be read"):
        load_teacher(path, config, transforms)


def test_a_teacher_without_a_section_to_take_it_is_refused(config, world, tmp_path):
    with pytest.raises(ConfigError, match=r"a teacher is given, and the funnel file has no \[heavy_ranker\]"):
        train(replace(config, heavy_ranker=None), world.tables(), world.home, teacher=tmp_path / "t")


def test_tables_of_the_retrieval_towers_are_taken_as_they_are_and_left_alone(config, trained, tmp_path):
    mine = replace(config, heavy_ranker=replace(HEAVY, tables="retrieval"))
    events = np.flatnonzero(trained.prepared.of_days(config.data.days("train")))[:600]
    ranker, _ = train_heavy(trained.prepared, mine, trained.towers, events, tmp_path, "h")
    for name, table in trained.towers.item_tower.tables.items():
        assert torch.equal(ranker.item_input.tables[name].weight, table.weight)
        assert not ranker.item_input.tables[name].weight.requires_grad


def test_the_heavy_rankers_sides_gathered_give_the_logits_of_pairs(config, trained, heavy):
    impressions = Impressions(trained.prepared, config, np.arange(8))
    batch = impressions.batch(np.arange(8))
    with torch.inference_mode():
        user, items = heavy.user_side(batch.user), heavy.item_side(batch.items)
        crossed = heavy(user, {name: side.unsqueeze(0).expand(8, *side.shape) for name, side in items.items()})
        torch.testing.assert_close(crossed[torch.arange(8), torch.arange(8)], batch.logits(heavy), rtol=1e-4, atol=1e-5)


SECTION = tomllib.loads("""
[heavy_ranker]
width = 0
average = 1.0
folds = -1
[distillation]
candidates = -1
[segments]
by = "hour_of_day"
own = ["a", "a"]
""")


def test_every_wrong_option_is_told_at_once():
    with pytest.raises(ConfigError) as told:
        parse_config({**small_funnel(), **SECTION}, "f")
    said = str(told.value)
    for sentence in (
        "heavy_ranker.width: expected more than 0, got 0",
        "heavy_ranker.average: expected at least 0 and below 1, got 1.0",
        "heavy_ranker.folds: expected 0 or more, got -1",
        "distillation.candidates: expected 0 or more, got -1",
        "segments.by: expected a category of [features.context] without hash (surface, hour), got 'hour_of_day'",
        "segments.own: expected at least one value, each once, got ['a', 'a']",
    ):
        assert sentence in said
