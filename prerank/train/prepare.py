"""Logs to arrays on disk, once: every table encoded, every event in the order it happened to its user.

Batches stream in and go out to files as they are encoded; only ids, times and one permutation (20 bytes an event)
are held at once, so the log may be larger than memory. Whether the tables are fit to use is `data.check`'s question.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa

from prerank.config import Config
from prerank.data.logs import Tables
from prerank.errors import DataError
from prerank.features.counters import Pairs, counted
from prerank.features.histories import Timeline
from prerank.features.reading import plain
from prerank.features.transforms import Transforms
from prerank.schema import IMPRESSION, FeatureSchema, Owner
from prerank.train.served import ServedFeatures
from prerank.train.served_log import ServedLog
from prerank.train.spool import Spool
from prerank.types import Array, Columns, Report, day_number, silent

FORMAT = 3
_ID = "__id__"  # the key column, beside features of any name
SERVED = "__served__"
"""The column of `Prepared.events` that says which logged request an event is of."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """Users, items and events as arrays; a user or item is its position in `user_ids` or `item_ids` (ascending).

    users, items: encoded features, leading shape [U] and [I]. events, leading shape [E], ordered by user, then time:
    user int32, item int32, time_ms int64, known_ms int64 (when the labels were known, at time_ms or later), day int32
    (days since 1970 in the funnel's zone), flags uint32 (bit j is labels[j]; a label not known counts as 0), told
    uint32 (bit j is set where labels[j] is known), logged bool (False for the history table) and each context feature;
    and, of a funnel with a log of requests, SERVED int32: the place in `served` [R, ...], features as served, of the
    request that the event is of, or -1. `unserved` says how many requests could not be read, by why.
    """

    transforms: Transforms
    labels: tuple[str, ...]
    user_ids: Array
    item_ids: Array
    users: Columns
    items: Columns
    events: Columns
    served: Columns = field(default_factory=dict)
    unserved: Mapping[str, int] = field(default_factory=dict)
    _made: dict[str, dict[str, Timeline]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def num_served(self) -> int:
        """How many events have features as served."""
        return int((self.events[SERVED] >= 0).sum()) if SERVED in self.events else 0

    def happened(self, event: str) -> Array:
        """bool [E]: where the label `event` is 1, or everywhere for "impression"."""
        if event == IMPRESSION:
            return np.ones(len(self.events["flags"]), dtype=bool)
        bit = np.uint32(1 << self.labels.index(event))
        marks: Array = (self.events["flags"] & bit) != 0
        return marks

    def told(self, label: str) -> Array:
        """bool [E]: where it is known whether the label is 1, or everywhere for "impression"."""
        if label == IMPRESSION:
            return np.ones(len(self.events["told"]), dtype=bool)
        marks: Array = (self.events["told"] & np.uint32(1 << self.labels.index(label))) != 0
        return marks

    def of_days(self, days: Sequence[str]) -> Array:
        """bool [E]: logged events of these ISO days."""
        wanted = np.array([day_number(d) for d in days], dtype=np.int32)
        marks: Array = np.isin(self.events["day"], wanted) & self.events["logged"]
        return marks

    def timelines(self, schema: FeatureSchema) -> dict[str, Timeline]:
        """The events of all users that each history and each counter reads, each at the time it became known.

        Made once: training asks for them again and again.
        """
        key = repr((schema.histories(), schema.interaction))
        if key not in self._made:
            self._made[key] = self._timelines(schema)
        return self._made[key]

    def _timelines(self, schema: FeatureSchema) -> dict[str, Timeline]:
        num_users = len(self.user_ids)
        found = {}
        for name, history in schema.histories().items():
            user, moment, item = self._known(history.events)
            found[name] = Timeline.build(num_users, user, moment, self.items[history.of][item])
        pairs = {one.on: self.pairs(one.on) for one in schema.interaction.values() if one.on}
        for name, counter in schema.interaction.items():
            of = pairs.get(counter.on)
            user, moment, item = self._known(counter.count, of, counter.on)
            codes = self.items[counter.by][item] if counter.by else None
            found[name] = counted(counter, num_users if of is None else len(of.keys), user, moment, codes)
        return found

    def shown(self, of: Pairs | None = None, on: str = "") -> Timeline:
        """Every user's impressions, or those `of` every user in one value of `on`; the values are items' positions."""
        user, moment, item = self._known(IMPRESSION, of, on)
        known = user >= 0
        num_users = len(self.user_ids) if of is None else len(of.keys)
        return Timeline.build(num_users, user[known], moment[known], item[known])

    def pairs(self, on: str) -> Pairs:
        """The users in each value of the context category `on` that an event of theirs had."""
        return Pairs.build(self.events["user"], self.events[on], self.transforms.sizes()[f"context.{on}"])

    def _known(self, event: str, of: Pairs | None = None, on: str = "") -> tuple[Array, Array, Array]:
        """User (or place in `of`), time and item of every event of one kind; a label's time is when it was known."""
        rows = np.flatnonzero(self.happened(event))
        moment = "time_ms" if event == IMPRESSION else "known_ms"
        user = self.events["user"][rows]
        if of is not None:
            user = of.place(user, self.events[on][rows])
        return user, self.events[moment][rows], self.events["item"][rows]


def prepare(
    config: Config, tables: Tables, folder: Path, report: Report = silent, transforms: Transforms | None = None
) -> Prepared:
    """The prepared arrays under `folder`, made unless the same data and features were prepared before.

    Transforms are fitted on the training days unless given, as those of a version that is to be asked about this log.
    Raises DataError where an id of the log is in no table; `prerank check` tells every such problem at once.
    """
    given = "" if transforms is None else f"-{hashlib.sha256(transforms.to_json().encode()).hexdigest()[:8]}"
    out = folder / f"prepared-{preparation_key(config, tables)}{given}"
    if not (out / "done").exists():
        building = folder / f".{out.name}"
        shutil.rmtree(building, ignore_errors=True)
        for part in ("users", "items", "events"):
            (building / part).mkdir(parents=True)
        _Preparation(config, tables, building, report).run(transforms)
        (building / "done").touch()
        shutil.rmtree(out, ignore_errors=True)
        building.rename(out)
    return load_prepared(out)


def preparation_key(config: Config, tables: Tables) -> str:
    """16 hex digits that change when the data, the days, the features or this file's format change."""
    plain = config.to_dict()
    said = [FORMAT, tables.fingerprint(), plain["data"], plain["features"], config.labels()]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def load_prepared(folder: Path) -> Prepared:
    """What `prepare` wrote, memory-mapped."""

    def columns(part: str) -> dict[str, Array]:
        return {f.stem: np.load(f, mmap_mode="r") for f in sorted((folder / part).glob("*.npy"))}

    users, items = columns("users"), columns("items")
    served = ServedLog(folder / "served", len(users[_ID])) if (folder / "served").exists() else None
    return Prepared(
        transforms=Transforms.from_json((folder / "transforms.json").read_text()),
        labels=tuple(json.loads((folder / "labels.json").read_text())),
        user_ids=users.pop(_ID),
        item_ids=items.pop(_ID),
        users=users,
        items=items,
        events=columns("events"),
        served={} if served is None else served.features,
        unserved={} if served is None else served.skipped,
    )


class _Preparation:
    """One run of `prepare`: count, fit, unless that is given, encode, sort."""

    def __init__(self, config: Config, tables: Tables, out: Path, report: Report) -> None:
        self.config, self.tables, self.out, self.report = config, tables, out, report
        data = config.data
        self.keys = [data.user_id, data.item_id, data.time]
        self.labels = config.labels()
        self.users, self.user_ids = _by_id(tables.users(), data.user_id)
        self.items, self.item_ids = _by_id(tables.items(), data.item_id)
        self._served: ServedLog | None = None

    def run(self, given: Transforms | None) -> None:
        transforms = self._fit() if given is None else given
        (self.out / "transforms.json").write_text(transforms.to_json())
        (self.out / "labels.json").write_text(json.dumps(self.labels))
        self._write("users", transforms, "user", self.users, self.user_ids)
        self._write("items", transforms, "item", self.items, self.item_ids)
        if self.config.data.requests:
            self._served = self._write_served(transforms)
        spool = Spool(self.out / "events")
        for batch in self._encoded(transforms):
            spool.append(batch)
            self.report("encode the log", spool.num_rows, 0, "events")
        self.report("encode the log", spool.num_rows, spool.num_rows, "events")
        if not spool.num_rows:
            raise DataError("the impressions table has no rows; check [data].impressions")
        spool.write_sorted("order the log", self.report)

    def _fit(self) -> Transforms:
        """Vocabularies and statistics of the training days, and of what came before them."""
        seen_users = np.zeros(len(self.user_ids), dtype=np.int64)
        seen_items = np.zeros(len(self.item_ids), dtype=np.int64)
        days = self.config.data.days("train")
        for batch in self.tables.history(self.keys[:2]):
            self._count(batch, seen_users, seen_items)
        for batch in self.tables.impressions(self.keys[:2], days):
            self._count(batch, seen_users, seen_items)
        self.report("fit transforms", 1, 2, "")
        context = self.config.features.columns("context")
        batches = self.tables.impressions(context, days) if context else iter(())
        fitted = Transforms.fit(
            self.config.features, users=(self.users, seen_users), items=(self.items, seen_items), context=batches
        )
        self.report("fit transforms", 2, 2, "")
        return fitted

    def _count(self, batch: pa.RecordBatch, seen_users: Array, seen_items: Array) -> None:
        seen_users += np.bincount(self._positions(batch, "user"), minlength=len(seen_users))
        seen_items += np.bincount(self._positions(batch, "item"), minlength=len(seen_items))

    def _positions(self, batch: pa.RecordBatch, owner: Owner) -> Array:
        """The row of each event's user or item in the sorted tables, int64 [rows]."""
        key, known = (self.keys[0], self.user_ids) if owner == "user" else (self.keys[1], self.item_ids)
        ids = batch.column(key).to_numpy(zero_copy_only=False)
        places = np.searchsorted(known, ids).clip(max=max(len(known) - 1, 0))
        strange = known[places] != ids if len(known) else np.ones(len(ids), dtype=bool)
        if strange.any():
            example = ids[strange][0]
            raise DataError(
                f"the log's {key} {example} is not in the {owner}s table, nor are {int(strange.sum()) - 1} other rows "
                "of its batch; run `prerank check` to see every problem of the data"
            )
        return np.asarray(places)

    def _encoded(self, transforms: Transforms) -> Iterator[dict[str, Array]]:
        context = self.config.features.columns("context")
        labelled = self.config.data.labelled
        wanted = [*self.keys, *self.labels, *context, *([labelled] if labelled else [])]
        wanted += [self.config.data.request_id] if self.config.data.request_id else []
        logged = ((batch, True) for batch in self.tables.impressions(wanted))
        before = ((batch, False) for batch in self.tables.history(wanted))
        for batch, is_logged in chain(logged, before):
            encoded = transforms.encode("context", batch) if context else {}
            yield {**self._event_columns(batch, is_logged), **encoded}

    def _event_columns(self, batch: pa.RecordBatch, logged: bool) -> dict[str, Array]:
        flags, told = np.zeros((2, batch.num_rows), dtype=np.uint32)
        for bit, label in enumerate(self.labels):
            marks = batch.column(label).cast(pa.bool_())
            happened = marks.fill_null(False).to_numpy(zero_copy_only=False)
            flags |= happened.astype(np.uint32) << np.uint32(bit)
            told |= marks.is_valid().to_numpy(zero_copy_only=False).astype(np.uint32) << np.uint32(bit)
        time_ms = batch.column(self.keys[2]).to_numpy(zero_copy_only=False).astype(np.int64)
        user = self._positions(batch, "user").astype(np.int32)
        return {
            "user": user,
            "item": self._positions(batch, "item").astype(np.int32),
            "time_ms": time_ms,
            "known_ms": self._known_ms(batch, time_ms),
            "day": batch.column("day").to_numpy(zero_copy_only=False).astype(np.int32),
            "flags": flags,
            "told": told,
            "logged": np.full(batch.num_rows, logged),
            **({} if self._served is None else {SERVED: self._served_at(self._served, batch, user, time_ms)}),
        }

    def _served_at(self, served: ServedLog, batch: pa.RecordBatch, user: Array, time_ms: Array) -> Array:
        column = self.config.data.request_id
        return served.of_ids(plain(batch.column(column)), user) if column else served.of_moments(user, time_ms)

    def _write_served(self, transforms: Transforms) -> ServedLog:
        items = {file.stem: np.load(file, mmap_mode="r") for file in (self.out / "items").glob("*.npy")}
        del items[_ID]
        made = ServedFeatures(transforms, self.item_ids, items)
        files = self.tables.source("requests").files
        return ServedLog.write(files, made, self.user_ids, self.out / "served", self.report)

    def _known_ms(self, batch: pa.RecordBatch, time_ms: Array) -> Array:
        """When the labels were known, int64; where it is not said, at the event's own time."""
        column = self.config.data.labelled
        if not column:
            return time_ms
        given = batch.column(column)
        if not pa.types.is_integer(given.type) and not pa.types.is_null(given.type):
            raise DataError(f"impressions.{column}: expected integer milliseconds (UTC), got {given.type}")
        said = given.cast(pa.int64()).fill_null(0).to_numpy(zero_copy_only=False)
        early = (said < time_ms) & given.is_valid().to_numpy(zero_copy_only=False)
        if early.any():
            row = int(np.flatnonzero(early)[0])
            raise DataError(
                f"impressions.{column}: {int(early.sum())} labels are known before their impression, such as "
                f"{said[row]} of the one at {time_ms[row]}; check [data].labelled and [data].time"
            )
        known: Array = np.maximum(said, time_ms)
        return known

    def _write(self, part: str, transforms: Transforms, owner: Owner, table: pa.Table, ids: Array) -> None:
        for name, column in {**transforms.encode(owner, table), _ID: ids}.items():
            np.save(self.out / part / f"{name}.npy", column)


def _by_id(table: pa.Table, key: str) -> tuple[pa.Table, Array]:
    """The table in ascending order of its key column, and that column as int64."""
    ordered = table.sort_by(key)
    return ordered, ordered.column(key).to_numpy().astype(np.int64)
