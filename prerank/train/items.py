"""Items' features as they were known on a day: what never changes, and the rates of the days before."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from prerank.config import Config
from prerank.errors import DataError
from prerank.features.rates import rates
from prerank.models.ranker import Ranker
from prerank.schema import IMPRESSION
from prerank.train.examples import item_tensors
from prerank.train.prepare import Prepared
from prerank.types import Array, Features, day_number


class Calendar:
    """The days of the log from the first training day on, counted from 0; earlier ones count as day 0."""

    def __init__(self, prepared: Prepared, config: Config) -> None:
        self.first = day_number(config.data.train[0])
        self._log, self._num_items = prepared.events, len(prepared.item_ids)
        self._day = np.asarray(prepared.events["day"]) - self.first
        self.num_days = max(int(self._day.max()) + 1, 1)

    def place(self, day: Array) -> Tensor:
        """Days since 1970 int [B] -> int64 [B], at most the day after the last."""
        return torch.from_numpy((np.asarray(day, dtype=np.int64) - self.first).clip(0, self.num_days))

    def before(self, happened: Array) -> Array:
        """How many of the events marked bool [E] each item had before the first training day -> float64 [I]."""
        rows = np.flatnonzero(happened & (self._day < 0))
        return np.bincount(self._log["item"][rows], minlength=self._num_items).astype(np.float64)

    def counts(self, happened: Array) -> Array:
        """How many of the events marked bool [E] each item had each day -> float64 [C, I]."""
        rows = np.flatnonzero(happened & (self._day >= 0))
        flat = self._day[rows].astype(np.int64) * self._num_items + self._log["item"][rows]
        found = np.bincount(flat, minlength=self.num_days * self._num_items)
        return found.astype(np.float64).reshape(self.num_days, self._num_items)


def item_sides(ranker: Ranker, items: Features, place: Tensor) -> dict[str, Tensor]:
    """The item side of `items` [U, ...], each made once and gathered at `place` int64 [B, N] -> [B, N, ...]."""
    flat, shape = place.flatten(), place.shape
    # its gradient is summed in a fraction of the time of an index's or an embedding's
    return {
        name: side.index_select(0, flat).view(*shape, *side.shape[1:]) for name, side in ranker.item_side(items).items()
    }


class DailyItems:
    """Every item's features on any day; the only ones that a day changes are the rates of the schema."""

    def __init__(self, prepared: Prepared, config: Config) -> None:
        self.calendar, self._prepared = Calendar(prepared, config), prepared
        self.rates: dict[str, Tensor] = {}
        logged = np.asarray(prepared.events["logged"])
        wanted = config.features.rates()
        events = {IMPRESSION, *(rate.of for rate in wanted.values())} if wanted else set()
        counts = {event: self.calendar.counts(prepared.happened(event) & logged) for event in events}
        for name, rate in wanted.items():
            group = prepared.items[rate.by] if rate.by else np.arange(len(prepared.item_ids))
            before = self._before(name, rate.of) if rate.history else None
            found = rates(counts[IMPRESSION], counts[rate.of], np.asarray(group, dtype=np.int64), rate.prior, before)
            self.rates[name] = torch.from_numpy(found)

    def _before(self, name: str, label: str) -> tuple[Array, Array]:
        """Events with a known `label` and with it, of each item, before the first training day: float64 [I] each.

        There may be no older events; where there are some and none says anything of the label, DataError.
        """
        told = self._prepared.told(label)
        shown = self.calendar.before(told)
        if not shown.any() and self.calendar.before(np.ones_like(told)).any():
            raise DataError(
                f"features.item.{name}: history = true, and no event before the first training day says whether it was "
                f"{label}; leave `history` out, or name a history table that has this label"
            )
        return shown, self.calendar.before(told & self._prepared.happened(label))

    @cached_property
    def lasting(self) -> dict[str, Tensor]:
        """What no day changes, in memory [I, ...]."""
        return item_tensors(self._prepared)

    def at(self, rows: Tensor, day: Array) -> dict[str, Tensor]:
        """Of items int64 [B] as seen at the start of days int [B] since 1970 -> [B, ...]."""
        place = self.calendar.place(day)
        found = {name: column[rows] for name, column in self.lasting.items()}
        return found | {name: table[place, rows] for name, table in self.rates.items()}

    def distinct(self, rows: Tensor, day: Array) -> tuple[dict[str, Tensor], Tensor]:
        """As `at`, of items int64 [B, N], each as of one day once -> [U, ...], and its place of each, int64 [B, N].

        Popular items come many times in a batch; what is made of an item alone is made once so (`item_sides`).
        """
        num_items = len(self._prepared.item_ids)
        place = self.calendar.place(day) if self.rates else torch.zeros(len(rows), dtype=torch.int64)
        found, where = np.unique((place.unsqueeze(1) * num_items + rows).numpy(), return_inverse=True)
        of_day, of_item = (torch.from_numpy(part) for part in np.divmod(found, num_items))
        items = {name: column[of_item] for name, column in self.lasting.items()}
        items |= {name: table[of_day, of_item] for name, table in self.rates.items()}
        return items, torch.from_numpy(where.reshape(rows.shape))

    def on(self, day: int) -> dict[str, Tensor]:
        """Every item's [I, ...] as seen at the start of one day since 1970."""
        place = int(self.calendar.place(np.array([day]))[0])
        return self.lasting | {name: table[place] for name, table in self.rates.items()}

    def latest(self) -> dict[str, Tensor]:
        """Every item's [I, ...] as seen after the whole log."""
        return self.lasting | self.latest_rates()

    def latest_rates(self) -> dict[str, Tensor]:
        """Every item's rates float32 [I] as seen after the whole log."""
        return {name: table[-1] for name, table in self.rates.items()}
