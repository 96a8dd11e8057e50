"""Training stopped anywhere and resumed gives the weights of training never stopped."""

import json
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from prerank.errors import TrainingError
from prerank.train.checkpoint import CHECKPOINT
from prerank.train.loop import JOURNAL
from tests.conftest import ROOT
from tests.train.toy import EVERYTHING, NUM_EXAMPLES, PLAN, ROWS, STEPS, Interrupted, Model, Toy

KINDS = {
    "plain": {},
    "averaged": {"average": 0.9},
    "stopped early": {"patience": 1, "watch": "quality"},
    "best of all": {"patience": 5, "watch": "quality", "average": 0.5},
    "bf16": {"bf16": True},
    "not fused": {"fused": False},
    "sparse": {"sparse": True},
    "nothing ahead": {"prefetch": 0},
    "everything": EVERYTHING,
}


@pytest.mark.parametrize("stop_at", [1, 6, 7, 13, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_training_resumes_to_the_same_weights_and_records(tmp_path, kind, stop_at):
    plan = replace(PLAN, **KINDS[kind])
    straight, stopped, resumed = Toy(), Toy(stop_at=stop_at), Toy()
    weights = straight.train(tmp_path / "straight", plan)
    with pytest.raises(Interrupted):
        stopped.train(tmp_path / "stopped", plan)
    assert torch.equal(weights, resumed.train(tmp_path / "stopped", plan))
    for name in ("epoch", "loss", "quality"):
        assert [r[name] for r in straight.records] == [r[name] for r in resumed.records]
    assert len(resumed.weights) == len(straight.weights) - stop_at
    assert not [t for t in threading.enumerate() if t.name == "prefetch"]


def test_a_training_killed_twice_in_mid_epoch_ends_in_the_weights_of_one_never_killed(tmp_path):
    plan = replace(PLAN, **EVERYTHING)
    for step in (3, 11):
        command = [sys.executable, "-m", "tests.train.toy", str(tmp_path / "killed")]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            told = next(line for line in process.stdout if int(line) == step)
            process.kill()
        assert (int(told), process.returncode) == (step, -9)
    straight, resumed = Toy(), Toy()
    assert torch.equal(straight.train(tmp_path / "straight", plan), resumed.train(tmp_path / "killed", plan))
    assert len(resumed.weights) <= STEPS - 11
    assert [r["loss"] for r in straight.records] == [r["loss"] for r in resumed.records]


def test_with_every_guard_and_lever_off_it_is_a_plain_loop_of_adamw(tmp_path):
    toy = Toy()
    weights = toy.train(tmp_path)
    torch.manual_seed(9)
    model = Model()
    world = torch.Generator().manual_seed(0)
    rows, y = torch.randint(ROWS - 1, (50,), generator=world), torch.randn(50, generator=world)
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=0.1, fused=True)
    torch.manual_seed(3)
    step = 0
    for epoch in range(4):
        order = torch.randperm(50, generator=torch.Generator().manual_seed(3 * 1_000_003 + epoch))
        for examples in order.split(8):
            wanted = y[examples] + torch.from_numpy(np.random.default_rng([3, step]).normal(size=len(examples))).float()
            cosine = 0.05 + 0.95 * 0.5 * (1 + torch.cos(torch.pi * torch.tensor((step - 1) / 27)))
            optimiser.param_groups[0]["lr"] = 0.01 * (1.0 if step < 1 else float(cosine))
            optimiser.zero_grad()
            (model(rows[examples]) - wanted).square().mean().backward()
            optimiser.step()
            step += 1
    assert torch.equal(weights, torch.cat([p.detach().flatten() for p in model.parameters()]))


def test_the_same_seed_gives_the_same_weights_and_another_does_not(tmp_path):
    one = Toy().train(tmp_path / "1")
    same = Toy().train(tmp_path / "2")
    other = Toy().train(tmp_path / "3", replace(PLAN, seed=4))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_what_batches_draw_depends_on_seed_and_step_alone(tmp_path):
    asked, ahead, other = Toy(), Toy(), Toy()
    asked.train(tmp_path / "1", replace(PLAN, prefetch=0))
    ahead.train(tmp_path / "2", replace(PLAN, prefetch=3))
    other.train(tmp_path / "3", replace(PLAN, seed=4))
    assert torch.equal(torch.cat(asked.noises), torch.cat(ahead.noises))
    assert not torch.equal(torch.cat(asked.noises), torch.cat(other.noises))


def test_a_finished_training_is_not_done_again(tmp_path):
    plan = replace(PLAN, **EVERYTHING)
    first, again = Toy(), Toy(stop_at=STEPS)
    assert torch.equal(first.train(tmp_path, plan), again.train(tmp_path, plan))
    assert first.records == again.records == [json.loads(s) for s in (tmp_path / JOURNAL).read_text().splitlines()]
    assert len(list(tmp_path.glob("events.*"))) == 1


def test_an_interrupt_ends_the_thread_that_makes_batches(tmp_path):
    def interrupt(step: int) -> None:
        if step == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Toy(each_step=interrupt).train(tmp_path)
    assert not [t for t in threading.enumerate() if t.name == "prefetch"]


# guards


def test_what_is_evaluated_and_kept_is_the_average_of_the_weights_after_each_step(tmp_path):
    plain, averaged = Toy(), Toy()
    last = plain.train(tmp_path / "plain")
    kept = averaged.train(tmp_path / "averaged", replace(PLAN, average=0.8))
    after = torch.stack([*plain.weights[1:], last]).double()
    assert torch.equal(torch.stack(plain.weights), torch.stack(averaged.weights))
    for steps, vector in zip((7, 14, 21, 28, 28), (*averaged.evaluated, kept), strict=True):
        share = 0.8 ** torch.arange(steps - 1, -1, -1.0, dtype=torch.float64)
        mean = (share[:, None] * after[:steps]).sum(0) / share.sum()
        torch.testing.assert_close(vector.double(), mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_a_training_stopped_early_returns_the_best_epochs_weights(tmp_path, average):
    toy = Toy(quality=(3.0, 1.0, 2.0, 1.5, 0.0, 0.0))
    kept = toy.train(tmp_path, replace(PLAN, epochs=6, patience=2, watch="quality", average=average))
    assert [r["quality"] for r in toy.records] == [3.0, 1.0, 2.0, 1.5]
    assert torch.equal(kept, toy.evaluated[1])
    assert not torch.equal(kept, toy.evaluated[3])


def test_a_training_that_was_not_stopped_returns_the_best_epochs_weights_too(tmp_path):
    toy = Toy()
    kept = toy.train(tmp_path, replace(PLAN, patience=3, watch="quality"))
    assert len(toy.records) == 4
    assert torch.equal(kept, toy.evaluated[1])


def test_a_value_that_is_no_number_is_never_the_best(tmp_path):
    toy = Toy(quality=(float("nan"),) * 4)
    kept = toy.train(tmp_path, replace(PLAN, patience=2, watch="quality", average=0.9))
    assert len(toy.records) == 2
    assert torch.equal(kept, toy.evaluated[1])


# levers


def test_sparse_changes_only_rows_the_batches_have_and_decays_none(tmp_path):
    for sparse in (False, True):
        toy = Toy()
        toy.train(tmp_path / str(sparse), replace(PLAN, sparse=sparse))
        torch.manual_seed(9)
        before = Model().table.weight
        after = toy.model.table.weight
        assert torch.equal(before[ROWS - 1], after[ROWS - 1]) == sparse
        assert not torch.equal(before, after)
        assert toy.model.table.weight.grad.is_sparse == sparse


def test_bf16_computes_the_loss_under_autocast(tmp_path):
    for bf16 in (False, True):
        toy = Toy()
        toy.train(tmp_path / str(bf16), replace(PLAN, bf16=bf16))
        assert toy.autocast == bf16


# refusals


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    Toy().train(tmp_path)
    with pytest.raises(TrainingError, match=r"is of training a, this is b; train in another folder"):
        Toy().train(tmp_path, replace(PLAN, identity="b"))


def test_a_damaged_checkpoint_is_refused(tmp_path):
    Toy().train(tmp_path)
    path = tmp_path / CHECKPOINT
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(TrainingError, match=r"checkpoint\.safetensors is damaged \(.*delete its folder"):
        Toy().train(tmp_path)


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path):
    with pytest.raises(TrainingError, match="the loss became nan at step 0; lower learning_rate"):
        Toy(spoil=True).train(tmp_path)


def test_no_examples_is_said(tmp_path):
    with pytest.raises(TrainingError, match=r"no example to learn from; check the labels and \[data\].train"):
        Toy().train(tmp_path, replace(PLAN, num_examples=0))


def test_a_watch_that_no_record_has_is_refused_by_what_they_have(tmp_path):
    with pytest.raises(TrainingError, match=r"watch is 'AUC', an epoch's record has epoch, loss, .*quality"):
        Toy().train(tmp_path, replace(PLAN, patience=1, watch="AUC"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"average": 1.0}, "average: expected a decay of at least 0 and below 1, got 1.0"),
        ({"average": -0.1}, "average: expected a decay of at least 0 and below 1, got -0.1"),
        ({"average": float("nan")}, "average: expected a decay of at least 0 and below 1, got nan"),
        ({"patience": -1}, r"patience: expected 0 \(off\) or more, got -1"),
        ({"prefetch": -1}, r"prefetch: expected 0 \(off\) or more, got -1"),
        ({"patience": 2}, "patience needs watch"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, said):
    with pytest.raises(TrainingError, match=said):
        replace(PLAN, **options)


def test_examples_of_an_epoch_are_each_seen_once(tmp_path):
    toy = Toy()
    toy.train(tmp_path)
    assert sum(map(len, toy.noises)) == 4 * NUM_EXAMPLES
