"""Examples one by one, as a dataset is commonly written: everything in memory, a history a search in it."""

from __future__ import annotations

import numpy as np
from torch.utils.data import Dataset

from prerank.train.distill import Taught
from prerank.train.examples import UserExamples
from prerank.train.ranking import Impressions
from prerank.types import Array


class _Log:
    """The log, its users and its items as arrays, and one event's features of them."""

    def __init__(self, users: UserExamples) -> None:
        prepared = users.prepared
        self.log = {name: np.array(prepared.events[name]) for name in ("user", "item", "time_ms", *users.context)}
        self.users = {name: np.array(prepared.users[name]) for name in users.profile}
        self.items = {name: np.array(column) for name, column in prepared.items.items()}
        self.context = users.context
        self.histories = {
            name: (line.offsets, line.time_ms, line.values, users.lengths[name])
            for name, line in users.timelines.items()
        }

    def user(self, event: int) -> dict[str, object]:
        user, moment = self.log["user"][event], self.log["time_ms"][event]
        features: dict[str, object] = {name: column[user] for name, column in self.users.items()}
        features |= {name: self.log[name][event] for name in self.context}
        return features | {name: self._history(name, user, moment) for name in self.histories}

    def item(self, row: int) -> dict[str, object]:
        return {name: column[row] for name, column in self.items.items()}

    def _history(self, name: str, user: int, moment: int) -> Array:
        offsets, time_ms, values, length = self.histories[name]
        start, stop = offsets[user], offsets[user + 1]
        end = start + np.searchsorted(time_ms[start:stop], moment)
        taken = values[max(start, end - length) : end]
        out = np.full(length, -1, dtype=np.int32)
        if len(taken):
            out[-len(taken) :] = taken
        return out


class Rows(Dataset[dict[str, object]]):
    """Impressions with their labels."""

    def __init__(self, impressions: Impressions) -> None:
        self.events, self.labels = impressions.events, impressions.labels.numpy()
        self.log = _Log(impressions.users)

    def __len__(self) -> int:
        return len(self.events)

    def __getitem__(self, position: int) -> dict[str, object]:
        event = self.events[position]
        item = self.log.item(self.log.log["item"][event])
        return {"user": self.log.user(event), "item": item, "labels": self.labels[position]}


class PairRows(Dataset[dict[str, object]]):
    """Lessons by pairs of a user and an item: an impression is a row, and so is each of its candidates.

    "teacher" are the heavy ranker's logits, "weight" is what the pair counts in a mean over pairs, so that it is the
    loss of `prerank.train.distill`.
    """

    def __init__(self, taught: Taught) -> None:
        self.events, self.rows, self.teacher = taught.lessons.events, taught.rows, taught.teacher.numpy()
        self.log = _Log(taught.users)
        candidate = self.rows[:, 1:] >= 0
        share = taught.options.candidate_weight * len(self.rows) / max(int(candidate.sum()), 1)
        weights = np.concatenate([np.ones((len(self.rows), 1)), share * candidate], axis=1) * self.rows.shape[1]
        self.weight = weights.astype(np.float32)

    def __len__(self) -> int:
        return self.rows.size

    def __getitem__(self, position: int) -> dict[str, object]:
        lesson, place = divmod(position, self.rows.shape[1])
        return {
            "user": self.log.user(self.events[lesson]),
            "item": self.log.item(max(self.rows[lesson, place], 0)),
            "teacher": self.teacher[lesson, place],
            "weight": self.weight[lesson, place],
        }
