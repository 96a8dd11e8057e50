"""Epochs over shuffled examples that resume exactly: the same seed gives the same weights, interrupted or not.

Exactly means on one CPU with one thread count; a GPU's atomics may differ in the last bits.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from prerank.errors import TrainingError
from prerank.train import checkpoint
from prerank.train.average import WeightAverage
from prerank.train.events import EventFile
from prerank.train.optimisers import optimisers
from prerank.train.plan import Place, Plan
from prerank.train.prefetch import ahead
from prerank.types import Array, Report, silent

JOURNAL = "epochs.jsonl"
_POINTS = 100  # of an epoch in the event file, about

Batch = TypeVar("Batch")


def run(
    model: nn.Module,
    plan: Plan,
    batch_of: Callable[[Array, np.random.Generator], Batch],
    loss_of: Callable[[Batch], Tensor],
    folder: Path,
    *,
    lookup_tables: Sequence[nn.Embedding] = (),
    extra_state: Callable[[], Mapping[str, Tensor]] = dict,
    load_extra: Callable[[Mapping[str, Tensor]], None] = lambda _: None,
    after_epoch: Callable[[int], Mapping[str, float]] = lambda _: {},
    report: Report = silent,
    what: str = "train",
) -> list[dict[str, float]]:
    """Train `model` by AdamW with a linear warm-up and a cosine down, and return one record an epoch.

    `batch_of(examples int64 [B], draw)` is the host's work, done ahead of time in a thread of its own: it changes
    nothing, and draws at random from `draw` alone, which depends on seed and step alone. `loss_of(batch) -> scalar` is
    the device's work and whatever else is to happen once a step, in order. `lookup_tables` are the tables that nothing
    but looking rows up uses. `extra_state` is saved and given back by `load_extra` (a streaming estimator, say).
    `after_epoch(epoch)` sees the weights that would be kept, and what it gives joins the epoch's record.

    Every epoch adds one JSON line to `folder`/epochs.jsonl; TensorBoard event files are beside it. An interrupted run
    found in `folder` goes on where it stopped. Raises TrainingError on no examples, on a loss that is not finite, on a
    `watch` that records lack, on `sparse` with no lookup table, on a checkpoint of another training or a damaged one.
    """
    if not plan.num_examples:
        raise TrainingError(f"{what}: there is no example to learn from; check the labels and [data].train")
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(plan.seed)
    training = _Training(model, plan, batch_of, loss_of, folder, lookup_tables, extra_state, report, what)
    training.resume(load_extra)
    records = _journal(folder, training.place.step // plan.steps_per_epoch)
    if not training.place.is_end(plan):
        with closing(EventFile(folder, training.place.step + 1)) as events:
            while not training.place.is_end(plan):
                training.epoch(events)
                records.append(training.end_epoch(events, after_epoch))
                # the journal first: a crash between the two repeats no epoch in it, `_journal` cuts it to the place
                _write_journal(folder, records)
                training.save(events)
    training.finish()
    return records


class _Training(Generic[Batch]):
    """All that a step changes, and what changes it."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        batch_of: Callable[[Array, np.random.Generator], Batch],
        loss_of: Callable[[Batch], Tensor],
        folder: Path,
        lookup_tables: Sequence[nn.Embedding],
        extra_state: Callable[[], Mapping[str, Tensor]],
        report: Report,
        what: str,
    ) -> None:
        self.model, self.plan, self.folder, self.report, self.what = model, plan, folder, report, what
        self.batch_of, self.loss_of, self.extra_state = batch_of, loss_of, extra_state
        self.optimisers = optimisers(model, plan, lookup_tables)
        self.device = next(model.parameters()).device.type
        self.average = WeightAverage(model, plan.average)
        self.best: dict[str, Tensor] = {}
        self.place = Place()
        self.last_save = time.monotonic()

    def epoch(self, events: EventFile) -> None:
        """The rest of the epoch that `place` is in."""
        plan, place = self.plan, self.place
        self.model.train()
        epoch, skip = divmod(place.step, plan.steps_per_epoch)
        todo = _batches(plan, epoch)[skip:]
        every = max(1, plan.steps_per_epoch // _POINTS)
        since = place.examples(plan), place.seconds
        with ahead(self._batch, list(enumerate(todo, start=place.step)), plan.prefetch) as made:
            for examples in todo:
                started = time.perf_counter()
                batch = next(made)
                place.waited_s += time.perf_counter() - started
                loss, rate = self._step(batch), plan.rate(place.step)
                place.loss += loss * len(examples)
                place.step += 1
                place.seconds += time.perf_counter() - started
                done = place.examples(plan)
                self.report(f"{self.what}, epoch {epoch + 1}/{plan.epochs}", done, self._total, "examples")
                if place.step % every == 0:
                    speed = (done - since[0]) / (place.seconds - since[1])
                    events.add(place.step, {"loss": loss, "learning_rate": rate, "examples/s": speed})
                    since = done, place.seconds
                inside = place.step % plan.steps_per_epoch != 0
                if inside and time.monotonic() - self.last_save > plan.checkpoint_s:
                    self.save(events)

    @property
    def _total(self) -> int:
        return self.plan.epochs * self.plan.num_examples

    def _batch(self, at: tuple[int, Array]) -> Batch:
        step, examples = at
        return self.batch_of(examples, np.random.default_rng([self.plan.seed, step]))

    def _step(self, batch: Batch) -> float:
        """The batch's loss, before the step it makes."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.plan.bf16):
            loss = self.loss_of(batch)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingError(
                f"{self.what}: the loss became {value} at step {self.place.step}; lower learning_rate, or look for "
                "extreme numbers in the features (`prerank check` counts them)"
            )
        for optimiser in self.optimisers.values():
            for group in optimiser.param_groups:
                group["lr"] = self.plan.rate(self.place.step)
            optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        for optimiser in self.optimisers.values():
            optimiser.step()
        self.average.update(self.place.step + 1)
        return value

    def end_epoch(self, events: EventFile, after_epoch: Callable[[int], Mapping[str, float]]) -> dict[str, float]:
        """The record of the epoch just done."""
        place, epoch = self.place, self.place.step // self.plan.steps_per_epoch
        record = {
            "epoch": float(epoch),
            "loss": place.loss / self.plan.num_examples,
            "seconds": round(place.seconds, 3),
            "waited_s": round(place.waited_s, 3),
        }
        with self.average.in_model():
            self.model.eval()
            record |= after_epoch(epoch - 1)
            self._judge(record, epoch)
        events.add(place.step, {f"epoch/{name}": value for name, value in record.items() if name != "epoch"})
        place.loss = place.seconds = place.waited_s = 0.0
        return record

    def _judge(self, record: Mapping[str, float], epoch: int) -> None:
        """Keep the weights the model holds if no epoch had better."""
        if not self.plan.patience:
            return
        value = record.get(self.plan.watch)
        if value is None:
            raise TrainingError(f"{self.what}: watch is {self.plan.watch!r}, an epoch's record has {', '.join(record)}")
        if value < self.place.best:
            self.place.best, self.place.best_epoch = value, epoch
            self.best = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}

    def save(self, events: EventFile) -> None:
        """Put the place and all that a step changes into the folder; the events of later steps are void then."""
        events.flush()
        tensors = checkpoint.named("model", self.model.state_dict())
        for name, optimiser in self.optimisers.items():
            tensors |= checkpoint.named(name, checkpoint.optimiser_tensors(optimiser))
        tensors |= checkpoint.named("average", self.average.mean) | checkpoint.named("best", self.best)
        tensors |= checkpoint.named("extra", self.extra_state())
        tensors["random"] = torch.get_rng_state()
        checkpoint.save(self.folder, tensors, {"identity": self.plan.identity, **self.place.told()})
        self.last_save = time.monotonic()

    def resume(self, load_extra: Callable[[Mapping[str, Tensor]], None]) -> None:
        """Take up what `save` last put into the folder, if it did."""
        found = checkpoint.load(self.folder, self.plan.identity)
        if found is None:
            return
        tensors, told = found
        self.place = Place.of(told)
        self.model.load_state_dict(checkpoint.part("model", tensors))
        for name, optimiser in self.optimisers.items():
            checkpoint.restore_optimiser(optimiser, checkpoint.part(name, tensors))
        self.average.load(checkpoint.part("average", tensors))
        self.best = checkpoint.part("best", tensors)
        load_extra(checkpoint.part("extra", tensors))
        torch.set_rng_state(tensors["random"])

    def finish(self) -> None:
        """Leave the weights to keep in the model: the best epoch's, the averaged, or the last."""
        if self.best:
            self.model.load_state_dict(self.best)
        else:
            self.average.give()
        self.model.eval()


def _batches(plan: Plan, epoch: int) -> list[Array]:
    """The epoch's examples by batch, each int64 [B]; the order depends on seed and epoch alone."""
    draw = torch.Generator().manual_seed(plan.seed * 1_000_003 + epoch)
    order = torch.randperm(plan.num_examples, generator=draw).numpy()
    return [order[start : start + plan.batch] for start in range(0, len(order), plan.batch)]


def _write_journal(folder: Path, records: Sequence[Mapping[str, float]]) -> None:
    temporary = folder / f".{JOURNAL}"
    temporary.write_text("".join(json.dumps(record) + "\n" for record in records))
    os.replace(temporary, folder / JOURNAL)


def _journal(folder: Path, epochs_done: int) -> list[dict[str, float]]:
    path = folder / JOURNAL
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines[:epochs_done]]
