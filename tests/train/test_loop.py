"""Training stopped anywhere and resumed gives the weights of training never stopped."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from prerank.errors import TrainingError
from prerank.train.loop import CHECKPOINT, Plan, run

PLAN = Plan(
    identity="a", num_examples=50, batch=8, epochs=3, learning_rate=0.01, weight_decay=0.1, seed=3, checkpoint_s=0.0
)


class Interrupted(Exception):
    pass


def train(folder: Path, plan: Plan = PLAN, stop_at: int | None = None, spoil: bool = False) -> tuple[Tensor, list]:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 4, generator=draw), torch.randn(50, 1, generator=draw)
    torch.manual_seed(9)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 1))
    counted = {"steps": torch.tensor(0)}

    def loss_of(examples: Tensor) -> Tensor:
        if int(counted["steps"]) == stop_at:
            raise Interrupted
        counted["steps"] += 1
        loss = (model(x[examples]) - y[examples]).square().mean()
        return loss * float("nan") if spoil else loss

    records = run(
        model,
        plan,
        loss_of,
        folder,
        extra_state=lambda: counted,
        load_extra=lambda state: counted.update({k: v.clone() for k, v in state.items()}),
    )
    return torch.cat([p.detach().flatten() for p in model.parameters()]), records


@pytest.mark.parametrize("stop_at", [1, 6, 7, 13, 20])
def test_a_stopped_training_resumes_to_the_same_weights_and_records(tmp_path, stop_at):
    straight, records = train(tmp_path / "straight")
    with pytest.raises(Interrupted):
        train(tmp_path / "stopped", stop_at=stop_at)
    resumed, again = train(tmp_path / "stopped")
    assert torch.equal(straight, resumed)
    assert [(r["epoch"], r["loss"]) for r in records] == [(r["epoch"], r["loss"]) for r in again]


def test_the_same_seed_gives_the_same_weights_and_another_does_not(tmp_path):
    one, _ = train(tmp_path / "1")
    same, _ = train(tmp_path / "2")
    other, _ = train(tmp_path / "3", replace(PLAN, seed=4))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_finished_training_is_not_done_again(tmp_path):
    first, records = train(tmp_path)
    again, same = train(tmp_path, stop_at=0)
    assert torch.equal(first, again)
    assert len(same) == len(records) == 3


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    train(tmp_path)
    with pytest.raises(TrainingError, match=r"is of training a, this is b; train in another folder"):
        train(tmp_path, replace(PLAN, identity="b"))


def test_a_damaged_checkpoint_is_refused(tmp_path):
    train(tmp_path)
    path = tmp_path / CHECKPOINT
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(TrainingError, match=r"checkpoint\.safetensors is damaged \(.*delete its folder"):
        train(tmp_path)


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path):
    with pytest.raises(TrainingError, match="the loss became nan at step 0; lower learning_rate"):
        train(tmp_path, spoil=True)


def test_no_examples_is_said(tmp_path):
    with pytest.raises(TrainingError, match=r"no example to learn from; check the labels and \[data\].train"):
        train(tmp_path, replace(PLAN, num_examples=0))
