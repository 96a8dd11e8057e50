"""What the heavy ranker says of logged winners and of what else retrieval would have returned: the student's lessons.

The rule by which candidates are drawn, once for all epochs: of each impression, `[distillation] candidates` of the
first `among` items that the towers retrieve for its user at its moment, uniformly without replacement, its own item
left out. The rule by which they are labelled: an impression by a teacher that was not trained on its user
(`folds` of them), for its own label is in the weights of the one that was; a candidate, which has no label, by the
teacher that serves.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from prerank._tensor_files import read_tensors, write_tensors
from prerank.config import Config
from prerank.errors import TrainingError
from prerank.models.ranker import Ranker
from prerank.models.towers import TwoTower
from prerank.train.candidates import Retriever
from prerank.train.examples import UserExamples
from prerank.train.items import DailyItems, item_sides
from prerank.train.prepare import Prepared
from prerank.types import Array, Report, silent

_EVENTS_AT_ONCE = 2048


@dataclass(frozen=True, slots=True)
class Lessons:
    """Of P impressions, events int64 [P]: the teacher's logits of them, and of C candidates each.

    winner float32 [P, T]; rows int32 [P, C] places in `Prepared.item_ids`, -1 where there was no more to retrieve;
    candidate float32 [P, C, T].
    """

    events: Array
    winner: Tensor
    rows: Array
    candidate: Tensor

    def of(self, positions: Array) -> Lessons:
        """Those of some positions int64 [P'] only."""
        chosen = torch.from_numpy(positions)
        return Lessons(self.events[positions], self.winner[chosen], self.rows[positions], self.candidate[chosen])


def fold_of(user: Array, folds: int, seed: int) -> Array:
    """The fold of users int [B] -> int64 [B] from 0 to folds - 1; a user is in the same at every moment."""
    mixed = (np.asarray(user, dtype=np.uint64) + np.uint64(seed)) * np.uint64(0x9E3779B97F4A7C15)
    return (mixed >> np.uint64(33)).astype(np.int64) % folds


def learn(
    prepared: Prepared,
    config: Config,
    events: Array,
    towers: TwoTower,
    teacher: Ranker,
    folded: Sequence[Ranker],
    path: Path,
    identity: str,
    report: Report = silent,
) -> Lessons:
    """The lessons of `events` int64 [P], read from `path` if they were made there before.

    `folded[f]` labels the impressions of users in fold f; without any, `teacher` labels all. Raises TrainingError where
    `path` holds lessons of another training.
    """
    if path.exists():
        return _read(path, identity, events)
    options, tasks = config.distillation, len(config.tasks)
    retriever, label = Retriever(towers, prepared, config), _Labels(prepared, config)
    width = min(options.candidates, retriever.num_items)
    rows = np.full((len(events), width), -1, dtype=np.int32)
    winner, candidate = torch.empty(len(events), tasks), torch.empty(len(events), width, tasks)
    fold = fold_of(prepared.events["user"][events], max(len(folded), 1), config.seed)
    own = np.asarray(prepared.events["item"][events])[:, None]
    for start in range(0, len(events), _EVENTS_AT_ONCE):
        some = np.arange(start, min(start + _EVENTS_AT_ONCE, len(events)))
        if width:
            found = retriever.rows(events[some], options.among, leave_out_own=True)
            rows[some] = drawn(found, width, np.random.default_rng([config.seed, start]))
            candidate[some] = label(teacher, events[some], rows[some])
        for number, ranker in enumerate(folded or [teacher]):
            mine = some[fold[some] == number]
            winner[mine] = label(ranker, events[mine], own[mine]).squeeze(1)
        report("ask the heavy ranker", int(some[-1]) + 1, len(events), "impressions")
    lessons = Lessons(events, winner, rows, candidate)
    _write(path, identity, lessons)
    return lessons


def drawn(found: Array, width: int, draw: np.random.Generator) -> Array:
    """`width` of each row's items found int [Q, N] (-1 is none, last), uniformly without replacement -> [Q, width]."""
    order = np.where(found >= 0, draw.random(found.shape), 2.0)
    places = np.argpartition(order, min(width, found.shape[1]) - 1, axis=1)[:, :width]
    taken = np.take_along_axis(found, places, axis=1)
    missing = width - taken.shape[1]
    return np.pad(taken, ((0, 0), (0, missing)), constant_values=-1)


class _Labels:
    """A ranker's logits of any items at moments of the log."""

    def __init__(self, prepared: Prepared, config: Config) -> None:
        self.users, self.items = UserExamples(prepared, config.features), DailyItems(prepared, config)
        self.day = prepared.events["day"]

    @torch.inference_mode()
    def __call__(self, ranker: Ranker, events: Array, rows: Array) -> Tensor:
        """events int64 [P], rows int [P, N] -> float32 [P, N, T]."""
        items = self.items.distinct(torch.from_numpy(rows.astype(np.int64).clip(min=0)), self.day[events])
        return ranker(ranker.user_side(self.users.at(events)), item_sides(ranker, *items)).float()


def _write(path: Path, identity: str, lessons: Lessons) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"events": torch.from_numpy(lessons.events), "rows": torch.from_numpy(lessons.rows)}
    tensors |= {"winner": lessons.winner, "candidate": lessons.candidate}
    building = path.with_name(f".{path.name}-{os.getpid()}")
    write_tensors(building, tensors, {"identity": identity})
    os.replace(building, path)


def _read(path: Path, identity: str, events: Array) -> Lessons:
    tensors, said = read_tensors(path)
    found = Lessons(tensors["events"].numpy(), tensors["winner"], tensors["rows"].numpy(), tensors["candidate"])
    if said.get("identity") != identity or not np.array_equal(found.events, events):
        raise TrainingError(f"{path}: lessons of another training; delete the file to ask the heavy ranker again")
    return found
