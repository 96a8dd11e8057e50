"""What one training is to be, and where it stands."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch

from prerank.errors import TrainingError
from prerank.train.checkpoint import Told


class Options(Protocol):
    """How a section of the funnel file says a model is trained."""

    @property
    def batch(self) -> int:
        """Examples a step."""

    @property
    def epochs(self) -> int:
        """Passes over the examples."""

    @property
    def learning_rate(self) -> float:
        """The largest of the schedule."""

    @property
    def weight_decay(self) -> float:
        """AdamW's."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What one training is: `identity` names data and options, and a checkpoint of another identity is refused.

    Guards: `average` is the decay a step of the weights' moving average, which is then what is evaluated and kept;
    with `patience`, training stops after as many epochs without a smaller `watch`, an entry of the epochs' records,
    and the weights of the best epoch are kept. 0 turns either off.

    Levers: `bf16` computes the loss in bfloat16 where torch's autocast may; `fused` is AdamW in one pass; `sparse`
    trains lookup tables by SparseAdam, which touches the rows of the batch only, without weight decay; `prefetch`
    batches are made ahead, 0 makes each when it is needed. Batches ahead change no weight, the other three do.

    Raises TrainingError on a value that means nothing.
    """

    identity: str
    num_examples: int
    batch: int
    epochs: int
    learning_rate: float
    weight_decay: float
    seed: int
    checkpoint_s: float = 30.0
    average: float = 0.0
    patience: int = 0
    watch: str = ""
    bf16: bool = False
    fused: bool = True
    sparse: bool = False
    prefetch: int = 4

    def __post_init__(self) -> None:
        if not 0 <= self.average < 1:
            raise TrainingError(f"average: expected a decay of at least 0 and below 1, got {self.average}; 0 is off")
        for name in ("patience", "prefetch"):
            if getattr(self, name) < 0:
                raise TrainingError(f"{name}: expected 0 (off) or more, got {getattr(self, name)}")
        if self.patience and not self.watch:
            raise TrainingError("patience needs watch: name the entry of an epoch's record that is to become small")

    @classmethod
    def of(cls, options: Options, identity: str, num_examples: int, seed: int) -> Plan:
        """As the funnel file's `options` say."""
        return cls(
            identity=identity,
            num_examples=num_examples,
            batch=options.batch,
            epochs=options.epochs,
            learning_rate=options.learning_rate,
            weight_decay=options.weight_decay,
            seed=seed,
        )

    @property
    def steps_per_epoch(self) -> int:
        """Batches an epoch, the last one smaller."""
        return -(-self.num_examples // self.batch)

    def rate(self, step: int) -> float:
        """The learning rate of a step: linear over the first 2 % of steps, then half a cosine down to a twentieth."""
        return self.learning_rate * _schedule(step, self.epochs * self.steps_per_epoch)


def _schedule(step: int, steps: int) -> float:
    warm = max(1, steps // 50)
    if step < warm:
        return (step + 1) / warm
    done = torch.tensor((step - warm) / max(1, steps - warm))
    return float(0.05 + 0.95 * 0.5 * (1 + torch.cos(torch.pi * done)))


@dataclass(slots=True)
class Place:
    """Where a training stands: batches done over all epochs, this epoch's sums, and the best epoch so far.

    `seconds` of this epoch's steps, of which `waited_s` for batches; `best` is the smallest value watched, of epoch
    `best_epoch`, counted from 1; 0 is none yet.
    """

    step: int = 0
    loss: float = 0.0
    seconds: float = 0.0
    waited_s: float = 0.0
    best: float = math.inf
    best_epoch: int = 0

    def examples(self, plan: Plan) -> int:
        """Examples done over all epochs."""
        epoch, inside = divmod(self.step, plan.steps_per_epoch)
        return epoch * plan.num_examples + inside * plan.batch

    def is_end(self, plan: Plan) -> bool:
        """Whether every epoch is done, or `patience` of them in a row brought nothing."""
        epochs = self.step // plan.steps_per_epoch
        return epochs >= plan.epochs or bool(plan.patience and epochs - self.best_epoch >= plan.patience)

    def told(self) -> Told:
        """As JSON; sums and values by all their bits."""
        return {
            "step": self.step,
            "loss": self.loss.hex(),
            "seconds": self.seconds,
            "waited_s": self.waited_s,
            "best": self.best.hex(),
            "best_epoch": self.best_epoch,
        }

    @classmethod
    def of(cls, told: Told) -> Place:
        """What `told` gave, now or before it told of waiting and of the best epoch."""
        return cls(
            step=int(told["step"]),
            loss=float.fromhex(str(told["loss"])),
            seconds=float(told["seconds"]),
            waited_s=float(told.get("waited_s", 0.0)),
            best=float.fromhex(str(told.get("best", "inf"))),
            best_epoch=int(told.get("best_epoch", 0)),
        )
