"""What retrieval would have returned at moments of the log, and a ranker's probabilities of it.

One question a user and moment: its features as they were then, popularity as it was at the start of that day.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from prerank.config import Config
from prerank.errors import DataError
from prerank.index.exact import ExactIndex
from prerank.models.ranker import Ranker
from prerank.models.towers import TwoTower
from prerank.train.examples import UserExamples, item_tensors
from prerank.train.prepare import Prepared
from prerank.train.retrieval import ItemPopularity
from prerank.types import Array, Features

_USERS_AT_ONCE = 256
_ITEMS_AT_ONCE = 1 << 16
_GATHERED_BYTES = 1 << 24  # of item sides held at once; what a ranker makes of them is several times that


@dataclass(frozen=True, slots=True)
class Retrieved:
    """Candidates of Q logged events int64 [Q]: rows int32 [Q, N], places in `Prepared.item_ids`, best first.

    Where `valid` bool [Q, N] is False, the last columns, there was nothing more to retrieve and the row is -1.
    """

    events: Array
    rows: Array
    valid: Array


def one_event_a_user(prepared: Prepared, days: Sequence[str], most: int, seed: int) -> Array:
    """Each user's first logged event of ISO `days`, of `most` users drawn by `seed` -> positions int64 [Q], ascending.

    Raises DataError where no event was logged in the days.
    """
    events = np.flatnonzero(prepared.of_days(days))
    if not len(events):
        raise DataError(f"{days[0]}..{days[-1]}: expected logged events there to retrieve for, found none")
    _, first = np.unique(prepared.events["user"][events], return_index=True)  # events are in order of user, then time
    if most < len(first):
        first = np.sort(np.random.default_rng(seed).choice(first, most, replace=False))
    return events[first]


class Retriever:
    """Two towers frozen as they are, asked at moments of the log; every item's vector is computed once."""

    def __init__(self, towers: TwoTower, prepared: Prepared, config: Config) -> None:
        towers.eval()
        self.towers, self.log = towers, prepared.events
        self.users, self.popularity = (
            UserExamples(prepared, config.features.lasting()),
            ItemPopularity(prepared, config),
        )
        with torch.inference_mode():
            vectors = _in_chunks(lambda items: {"item": towers.item_vectors(items)}, item_tensors(prepared))["item"]
        self.num_items = len(vectors)
        self._vectors = vectors
        self._of_day: dict[int, ExactIndex] = {}

    @torch.inference_mode()
    def rows(self, events: Array, keep: int, leave_out_own: bool = False) -> Array:
        """The `keep` items most similar to the user of each event int64 [Q] at its moment, best first -> int32 [Q, N].

        N = min(keep, I), -1 past the last. All items may come, those the user met before too, as when serving. With
        `leave_out_own` the event's own item may not: it was shown, so a question about what else there was should not
        find it.
        """
        assert keep > 0
        place = self.popularity.place(self.log["day"][events]).numpy()
        width = min(keep, self.num_items)
        rows = np.empty((len(events), width), dtype=np.int32)
        for day in np.unique(place):
            index, today = self._index(int(day)), np.flatnonzero(place == day)
            for start in range(0, len(today), _USERS_AT_ONCE):
                chosen = today[start : start + _USERS_AT_ONCE]
                query = self.towers.user_side(self.users.at(events[chosen]))
                found = index.search(query, width + leave_out_own, None).rows.numpy()
                own = self.log["item"][events[chosen]]
                rows[chosen] = _without(found, own)[:, :width] if leave_out_own else found
        return rows

    def _index(self, place: int) -> ExactIndex:
        """The items with the popularity they had at the start of a day."""
        if place not in self._of_day:
            bias = self.towers.popularity_bias(self.popularity.table[place]).unsqueeze(-1)
            self._of_day = {place: ExactIndex(torch.cat([self._vectors, bias], dim=-1))}
        return self._of_day[place]


def retrieve_candidates(
    towers: TwoTower, prepared: Prepared, config: Config, events: Array, keep: int, leave_out_own: bool = False
) -> Retrieved:
    """What a `Retriever` of these towers finds for events int64 [Q]."""
    rows = Retriever(towers, prepared, config).rows(events, keep, leave_out_own)
    return Retrieved(events, rows, rows >= 0)


def _without(rows: Array, own: Array) -> Array:
    """rows int [B, K] with own int [B] taken out where it is, the rest moved up and -1 after it."""
    mine = rows == own[:, None]
    kept = np.argsort(mine, axis=1, kind="stable")
    moved: Array = np.take_along_axis(np.where(mine, -1, rows), kept, axis=1)
    return moved


@torch.inference_mode()
def candidate_probs(ranker: Ranker, user: Features, items: Features, rows: Array) -> Array:
    """Probabilities float32 [Q, N, T] of candidates rows int [Q, N] (-1: nothing, and its number means nothing).

    user: user and context features and counters [Q, ...]; items: every item's features [I, ...]. Items are looked at
    once for all users; of each user's candidates only what the ranker stores of an item is gathered.
    """
    if isinstance(ranker, nn.Module):
        ranker.eval()
    sides = _in_chunks(ranker.item_side, items)
    row_bytes = sum(side[0].numel() * side.element_size() for side in sides.values())
    step = max(1, _GATHERED_BYTES // max(1, row_bytes * rows.shape[1]))
    probs = np.empty((*rows.shape, len(ranker.tasks)), dtype=np.float32)
    for start in range(0, len(rows), step):
        chosen = torch.from_numpy(rows[start : start + step].astype(np.int64).clip(min=0))
        gathered = {name: side[chosen] for name, side in sides.items()}
        mine = ranker.user_side({name: column[start : start + step] for name, column in user.items()})
        probs[start : start + step] = ranker(mine, gathered).float().sigmoid().numpy()
    return probs


def _in_chunks(side: Callable[[Features], dict[str, Tensor]], items: Features) -> dict[str, Tensor]:
    """`side` of every item, some at a time."""
    num_items = len(next(iter(items.values())))
    parts = [
        side({name: column[start : start + _ITEMS_AT_ONCE] for name, column in items.items()})
        for start in range(0, num_items, _ITEMS_AT_ONCE)
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
