"""The user's side of any (user, moment) of the log, as tensors: profile, context, and histories cut before it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from prerank.features.counters import encode
from prerank.schema import DERIVED, FeatureSchema
from prerank.train.prepare import SERVED, Prepared
from prerank.types import Array, Columns


class UserExamples:
    """Gathers user and context features of events; the same Timeline code cuts histories when serving."""

    def __init__(self, prepared: Prepared, schema: FeatureSchema) -> None:
        self.prepared = prepared
        self.timelines = prepared.timelines(schema)
        self.lengths = {name: history.length for name, history in schema.histories().items()}
        self.counters = schema.interaction
        self.pairs = {one.on: prepared.pairs(one.on) for one in schema.interaction.values() if one.on}
        self.shown = {on: prepared.shown(pairs, on) for on, pairs in self.pairs.items()} | {"": prepared.shown()}
        self.profile = [n for n, kind in schema.user.items() if not isinstance(kind, DERIVED)]
        self.context = list(schema.context)

    def at(self, events: Array, time_ms: Array | None = None) -> dict[str, Tensor]:
        """Features [B, ...] of the users of `events` int64 [B], with each event's context.

        Histories and counters are cut strictly before `time_ms` int64 [B] (the event's own time unless given). Of an
        event at its own time that a logged request is of, everything is as it was served.
        """
        log = self.prepared.events
        user = np.asarray(log["user"][events], dtype=np.int64)
        moment = np.asarray(log["time_ms"][events]) if time_ms is None else time_ms
        columns = self.of(user, moment, {name: log[name][events] for name in self.context})
        if SERVED in log:
            self._take_served(columns, events, moment)
        return {name: torch.from_numpy(np.ascontiguousarray(column)) for name, column in columns.items()}

    def of(self, user: Array, moment: Array, context: Columns) -> dict[str, Array]:
        """Features [B, ...] of users int64 [B] at moments int64 [B], with these encoded context features [B, ...]."""
        columns = {name: self.prepared.users[name][user] for name in self.profile}
        columns |= {name: context[name] for name in self.context}
        lines = self.timelines
        columns |= {name: lines[name].before(user, moment, length) for name, length in self.lengths.items()}
        who = {"": user} | {on: pairs.place(user, columns[on]) for on, pairs in self.pairs.items()}
        columns |= {
            name: encode(counter, lines[name], self.shown[counter.on], who[counter.on], moment)
            for name, counter in self.counters.items()
        }
        return columns

    def _take_served(self, columns: dict[str, Array], events: Array, moment: Array) -> None:
        """Of events at their own time that a logged request is of: what was served, in place of what was made."""
        log = self.prepared.events
        places = np.asarray(log[SERVED][events])
        rows = np.flatnonzero((places >= 0) & (log["time_ms"][events] == moment))
        for name in [one for one in columns if one in self.prepared.served and len(rows)]:
            columns[name] = np.array(columns[name])
            columns[name][rows] = self.prepared.served[name][places[rows]]


def item_tensors(prepared: Prepared) -> dict[str, Tensor]:
    """Every item's encoded features [I, ...], in the order of `item_ids`."""
    return {name: torch.from_numpy(np.array(column)) for name, column in prepared.items.items()}
