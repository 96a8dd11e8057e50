"""A training small enough to do many times, of a model with all a ranker has: a table, dropout, random batches.

`python -m tests.train.toy FOLDER` does it slowly, telling each step, for whoever wants to kill it.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from prerank.train.loop import run
from prerank.train.plan import Plan

NUM_EXAMPLES, BATCH, EPOCHS, ROWS = 50, 8, 4, 40
STEPS = EPOCHS * 7
PLAN = Plan(
    identity="a",
    num_examples=NUM_EXAMPLES,
    batch=BATCH,
    epochs=EPOCHS,
    learning_rate=0.01,
    weight_decay=0.1,
    seed=3,
    checkpoint_s=0.0,
)
EVERYTHING = {"average": 0.9, "patience": 2, "watch": "quality", "bf16": True, "sparse": True}


class Interrupted(Exception):
    pass


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(ROWS, 4)
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 1))

    def forward(self, row: Tensor) -> Tensor:
        return self.layers(self.table(row)).squeeze(-1)


@dataclass
class Toy:
    """`quality` is what each epoch's record says; the rest is what a training was seen to do."""

    quality: Sequence[float] = (3.0, 1.0, 2.0, 1.5)
    stop_at: int | None = None
    each_step: Callable[[int], None] = lambda step: None
    spoil: bool = False
    model: Model = field(init=False)
    records: list[dict[str, float]] = field(init=False)
    noises: list[Tensor] = field(init=False, default_factory=list)
    weights: list[Tensor] = field(init=False, default_factory=list)
    evaluated: list[Tensor] = field(init=False, default_factory=list)
    autocast: bool = field(init=False, default=False)

    def train(self, folder: Path, plan: Plan = PLAN) -> Tensor:
        """All weights the training ends with, as one vector."""
        world = torch.Generator().manual_seed(0)
        rows = torch.randint(ROWS - 1, (NUM_EXAMPLES,), generator=world)  # nobody has the last row
        y = torch.randn(NUM_EXAMPLES, generator=world)
        torch.manual_seed(9)
        self.model = Model()
        counted = {"steps": torch.tensor(0)}

        def batch_of(examples: np.ndarray, draw: np.random.Generator) -> tuple[Tensor, Tensor]:
            noise = torch.from_numpy(draw.normal(size=len(examples))).float()
            return rows[examples % NUM_EXAMPLES], y[examples % NUM_EXAMPLES] + noise

        def loss_of(batch: tuple[Tensor, Tensor]) -> Tensor:
            step = int(counted["steps"])
            if step == self.stop_at:
                raise Interrupted
            self.each_step(step)
            counted["steps"] += 1
            self.autocast = torch.is_autocast_enabled("cpu")
            self.weights.append(self.vector())
            self.noises.append(batch[1])
            loss = (self.model(batch[0]).float() - batch[1]).square().mean()
            return loss * float("nan") if self.spoil else loss

        def after_epoch(epoch: int) -> dict[str, float]:
            self.evaluated.append(self.vector())
            return {"quality": self.quality[epoch]}

        self.records = run(
            self.model,
            plan,
            batch_of,
            loss_of,
            folder,
            lookup_tables=[self.model.table],
            extra_state=lambda: counted,
            load_extra=lambda state: counted.update({k: v.clone() for k, v in state.items()}),
            after_epoch=after_epoch,
        )
        return self.vector()

    def vector(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


def _slow(step: int) -> None:
    print(step, flush=True)
    time.sleep(0.02)


if __name__ == "__main__":
    from dataclasses import replace

    torch.set_num_threads(1)
    Toy(each_step=_slow).train(Path(sys.argv[1]), replace(PLAN, **EVERYTHING))
