"""Epochs over shuffled examples that resume exactly: the same seed gives the same weights, interrupted or not.

Exactly means on one CPU with one thread count; a GPU's atomics may differ in the last bits.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from prerank.errors import TrainingError
from prerank.types import Report, silent

CHECKPOINT = "checkpoint.safetensors"
JOURNAL = "epochs.jsonl"


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
    """What one training is: `identity` names data and options, and a checkpoint of another identity is refused."""

    identity: str
    num_examples: int
    batch: int
    epochs: int
    learning_rate: float
    weight_decay: float
    seed: int
    checkpoint_s: float = 30.0

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


@dataclass(slots=True)
class Place:
    """Where a training stands: batches done over all epochs, and this epoch's summed loss."""

    step: int = 0
    loss: float = 0.0
    seconds: float = 0.0


def run(
    model: nn.Module,
    plan: Plan,
    loss_of: Callable[[Tensor], Tensor],
    folder: Path,
    *,
    extra_state: Callable[[], Mapping[str, Tensor]] = dict,
    load_extra: Callable[[Mapping[str, Tensor]], None] = lambda _: None,
    after_epoch: Callable[[int], Mapping[str, float]] = lambda _: {},
    report: Report = silent,
    what: str = "train",
) -> list[dict[str, float]]:
    """Train `model` by AdamW with a linear warm-up and a cosine down, and return one record an epoch.

    `loss_of(examples int64 [B]) -> scalar` is the whole batch's work. `extra_state` is saved and given back by
    `load_extra` (a streaming estimator, say). Every epoch adds one JSON line to `folder`/epochs.jsonl. An interrupted
    run found in `folder` goes on where it stopped. Raises TrainingError on no examples, on a loss that is not finite,
    and on a checkpoint of another training or a damaged one.
    """
    if not plan.num_examples:
        raise TrainingError(f"{what}: there is no example to learn from; check the labels and [data].train")
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(plan.seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=plan.learning_rate, weight_decay=plan.weight_decay, fused=True)
    place = _resume(model, optimiser, plan, folder, load_extra)
    records = _journal(folder, place.step // plan.steps_per_epoch)
    last_save = time.monotonic()
    model.train()
    while place.step < plan.epochs * plan.steps_per_epoch:
        epoch = place.step // plan.steps_per_epoch
        for examples in _batches(plan, epoch, place.step % plan.steps_per_epoch):
            started = time.perf_counter()
            place.loss += _step(optimiser, plan, place.step, loss_of(examples), what) * len(examples)
            place.step += 1
            place.seconds += time.perf_counter() - started
            note = f"epoch {epoch + 1}/{plan.epochs}"
            report(f"{what}, {note}", _done(plan, place.step), plan.epochs * plan.num_examples, "examples")
            inside = place.step % plan.steps_per_epoch != 0
            if inside and time.monotonic() - last_save > plan.checkpoint_s:
                _save(model, optimiser, plan, place, folder, extra_state())
                last_save = time.monotonic()
        model.eval()
        record = {"epoch": epoch + 1.0, "loss": place.loss / plan.num_examples, "seconds": round(place.seconds, 3)}
        record |= after_epoch(epoch)
        model.train()
        place.loss = place.seconds = 0.0
        records.append(record)
        # the journal first: a crash between the two repeats no epoch in it, since `_journal` cuts it to the checkpoint
        (folder / JOURNAL).write_text("".join(json.dumps(r) + "\n" for r in records))
        _save(model, optimiser, plan, place, folder, extra_state())
        last_save = time.monotonic()
    model.eval()
    return records


def _done(plan: Plan, step: int) -> int:
    epoch, inside = divmod(step, plan.steps_per_epoch)
    return epoch * plan.num_examples + inside * plan.batch


def _batches(plan: Plan, epoch: int, skip: int) -> Iterator[Tensor]:
    """This epoch's batches after the first `skip`; the order depends on seed and epoch alone."""
    draw = torch.Generator().manual_seed(plan.seed * 1_000_003 + epoch)
    order = torch.randperm(plan.num_examples, generator=draw)
    yield from torch.split(order[skip * plan.batch :], plan.batch)


def _step(optimiser: torch.optim.Optimizer, plan: Plan, step: int, loss: Tensor, what: str) -> float:
    value = float(loss.detach())
    if not torch.isfinite(loss.detach()):
        raise TrainingError(
            f"{what}: the loss became {value} at step {step}; lower learning_rate, or look for extreme numbers in the "
            "features (`prerank check` counts them)"
        )
    for group in optimiser.param_groups:
        group["lr"] = plan.learning_rate * _schedule(step, plan.epochs * plan.steps_per_epoch)
    optimiser.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    optimiser.step()
    return value


def _schedule(step: int, steps: int) -> float:
    """Linear over the first 2 % of steps, then half a cosine down to a twentieth."""
    warm = max(1, steps // 50)
    if step < warm:
        return (step + 1) / warm
    done = torch.tensor((step - warm) / max(1, steps - warm))
    return float(0.05 + 0.95 * 0.5 * (1 + torch.cos(torch.pi * done)))


def _save(
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    plan: Plan,
    place: Place,
    folder: Path,
    extra: Mapping[str, Tensor],
) -> None:
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    for number, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{number}.{k}": v for k, v in state.items()}
    tensors |= {f"extra.{k}": v for k, v in extra.items()}
    tensors["random"] = torch.get_rng_state()
    told = {"identity": plan.identity, "step": place.step, "loss": place.loss.hex(), "seconds": place.seconds}
    temporary = folder / f".{CHECKPOINT}"
    save_file({k: v.detach().clone().contiguous() for k, v in tensors.items()}, temporary, {"place": json.dumps(told)})
    os.replace(temporary, folder / CHECKPOINT)


def _resume(
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    plan: Plan,
    folder: Path,
    load_extra: Callable[[Mapping[str, Tensor]], None],
) -> Place:
    path = folder / CHECKPOINT
    if not path.exists():
        return Place()
    try:
        with safe_open(path, framework="pt") as file:
            told = json.loads(file.metadata()["place"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - a safetensors handle, no dict
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise TrainingError(f"{path.name} is damaged ({error}); delete its folder to start again") from None
    if told["identity"] != plan.identity:
        raise TrainingError(
            f"{path.name} is of training {told['identity']}, this is {plan.identity}; "
            "train in another folder, or delete it to start again"
        )
    model.load_state_dict(_part(tensors, "model."))
    groups = optimiser.state_dict()["param_groups"]
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in _part(tensors, "optimiser.").items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = tensor
    optimiser.load_state_dict({"state": state, "param_groups": groups})
    load_extra(_part(tensors, "extra."))
    torch.set_rng_state(tensors["random"])
    return Place(step=told["step"], loss=float.fromhex(told["loss"]), seconds=told["seconds"])


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}


def _journal(folder: Path, epochs_done: int) -> list[dict[str, float]]:
    path = folder / JOURNAL
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines][:epochs_done]
