"""Everything wrong with the data, all at once, before anything is trained.

The users and items tables are read a column at a time, the log once and a batch at a time, so it may be larger than
memory. What cannot be seen here: a feature that was computed too late, but is neither dated nor nearly its label.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prerank._toml import nearest
from prerank.config import Config
from prerank.data.calendar import spans
from prerank.data.check_columns import (
    Problem,
    content_problem,
    group_problem,
    integer,
    listed_problem,
    targeting_problem,
    type_problem,
)
from prerank.data.check_log import LogCheck
from prerank.data.logs import DAY, Tables
from prerank.data.sources import Source
from prerank.errors import DataError
from prerank.schema import DERIVED, Kind, Owner, column_of
from prerank.types import Array

__all__ = ["Problem", "check"]

_OWNERS: dict[str, Owner] = {"users": "user", "items": "item"}


def check(config: Config, tables: Tables) -> list[Problem]:
    """Every problem of the tables, none where they are fit to train on; one table's problems hide no other's."""
    return list(_Check(config, tables).run())


_LOGGED = ("request_id", "time_ms", "user_id", "context", "profile", "event_item_ids")
"""Of a log of requests; whoever reads it looks closer."""


class _Check:
    def __init__(self, config: Config, tables: Tables) -> None:
        self.config, self.tables, self.data = config, tables, config.data
        self.keys = {"users": self.data.user_id, "items": self.data.item_id}
        self.ids: dict[str, Array] = {}  # by key column, ascending; absent where they could not be read

    def run(self) -> Iterator[Problem]:
        yield from self._leaks_by_name()
        sources: dict[str, Source] = {}
        for name in self.tables.names:
            try:
                sources[name] = self.tables.source(name)
            except DataError as error:
                yield _unreadable(name, error)
        # the users and items tables first: the log is read against their ids
        for name, source in sources.items():
            if name == "requests":
                yield from _missing(name, source, dict.fromkeys(_LOGGED, "a training on what was served"))
                continue
            problems = self._table(name, source) if name in self.keys else self._events(name, source)
            try:
                yield from problems
            except DataError as error:
                yield _unreadable(name, error)

    def _leaks_by_name(self) -> Iterator[Problem]:
        labels = self.config.labels()
        for owner, name, kind in self.config.features:
            if not isinstance(kind, DERIVED) and column_of(name, kind) in labels:
                column = column_of(name, kind)
                yield Problem(
                    f"features.{owner}.{name}",
                    "leaky feature computed after the label",
                    "a column known before the impression",
                    f"the label {column!r} itself; remove the feature, or read past events with a history",
                )

    # the users and items tables

    def _table(self, name: str, source: Source) -> Iterator[Problem]:
        key, features = self.keys[name], self.config.features.of(_OWNERS[name])
        wanted: dict[str, str] = {key: f"data.{'user_id' if name == 'users' else 'item_id'}"}
        for feature, kind in features.items():
            if not isinstance(kind, DERIVED):
                wanted.setdefault(column_of(feature, kind), f"features.{_OWNERS[name]}.{feature}")
        if name == "items":
            wanted |= {c: "metadata.columns" for c in self.config.metadata.columns if c not in wanted}
            wanted |= {c: "metadata.deferred" for c in self.config.metadata.deferred if c not in wanted}
            wanted |= {c: f"diversity.{c}" for c in self.config.diversity if c not in wanted}
            wanted |= {c: key for key, (c, _) in self.config.numbers().items() if c not in wanted}
            asked = {one.by: f"generators.{name}.by" for name, one in self.config.generators.items() if one.by}
            wanted |= {c: key for c, key in asked.items() if c not in wanted}
        for rule_name, rule in self.config.targeting.items():
            column = getattr(rule, _OWNERS[name])
            if column:
                wanted.setdefault(column, f"targeting.{rule_name}.{_OWNERS[name]}")
        if self.data.computed:
            wanted.setdefault(self.data.computed, "data.computed")
        yield from _missing(name, source, wanted)
        if key in source.schema.names:
            yield from self._table_ids(name, source, key)
        for feature, kind in features.items():
            if not isinstance(kind, DERIVED):
                yield from self._column(name, source, column_of(feature, kind), kind)
        if name == "items":
            yield from self._groups(source)
            for column, kind in dict.fromkeys(self.config.numbers().values()):
                yield from self._column(name, source, column, kind)
        for column in self.config.targeted(_OWNERS[name]):
            if column in source.schema.names:
                yield from self._targeted(name, source, column)
        if self.data.computed in source.schema.names:
            yield from self._computed(name, source)

    def _table_ids(self, name: str, source: Source, key: str) -> Iterator[Problem]:
        kind = source.schema.field(key).type
        if not integer(kind):
            yield Problem(f"{name}.{key}", "wrong type", "an integer id", str(kind))
            return
        column = source.table([key], 1 << 20).column(key)
        if column.null_count:
            found = f"{column.null_count} of {len(column)} rows"
            yield Problem(f"{name}.{key}", "nulls in a key", "an id in every row", found)
        ids, counts = np.unique(column.drop_null().to_numpy().astype(np.int64), return_counts=True)
        if (counts > 1).any():
            found = f"{int((counts > 1).sum())} ids more than once, such as {_examples(ids[counts > 1])}"
            yield Problem(f"{name}.{key}", "duplicate ids", "each id once", found)
        if not len(column):
            yield Problem(name, "no rows", "at least one row", "none")
        self.ids[key] = ids

    def _groups(self, source: Source) -> Iterator[Problem]:
        for column in self.config.diversity:
            if column in source.schema.names:
                problem = group_problem(f"items.{column}", source.schema.field(column).type)
                if problem is not None:
                    yield problem

    def _column(self, name: str, source: Source, column: str, kind: Kind) -> Iterator[Problem]:
        if column not in source.schema.names:
            return
        problem = type_problem(f"{name}.{column}", kind, source.schema.field(column).type, source.format)
        if problem is None:
            problem = content_problem(f"{name}.{column}", kind, source.scan([column], None, 1 << 16))
        if problem is not None:
            yield problem

    def _targeted(self, name: str, source: Source, column: str) -> Iterator[Problem]:
        where = f"{name}.{column}"
        problem = targeting_problem(where, source.schema.field(column).type, source.format)
        if problem is None and name == "items":
            are_hours = any(rule.schedule and rule.item == column for rule in self.config.targeting.values())
            problem = listed_problem(where, are_hours, source.scan([column], None, 1 << 16))
        if problem is not None:
            yield problem

    def _computed(self, name: str, source: Source) -> Iterator[Problem]:
        column = self.data.computed
        kind = source.schema.field(column).type
        if not integer(kind):
            yield Problem(f"{name}.{column}", "wrong type", "integer milliseconds (UTC)", str(kind))
            return
        moments = source.table([column], 1 << 20).column(column)
        if moments.null_count:
            found = f"{moments.null_count} of {len(moments)} rows"
            yield Problem(f"{name}.{column}", "nulls in the computed time", "a time in every row", found, "warning")
        days = self.data.days("train")
        begin, end = spans(days, self.data.timezone)[0][0], spans(days, self.data.timezone)[-1][1]
        latest = pc.max(moments).as_py()
        if latest is None or latest < begin:
            return
        features = [f for f, k in self.config.features.of(_OWNERS[name]).items() if not isinstance(k, DERIVED)]
        late = pc.sum(pc.greater_equal(moments, end if latest >= end else begin)).as_py()
        found = (
            f"{late} of {len(moments)} rows, the latest {latest} ms; "
            f"their {len(features)} features ({', '.join(features[:5])}) may know those labels"
        )
        if latest >= end:
            expected = f"computed before the training days end, {end} ms"
            yield Problem(f"{name}.{column}", "leaky feature computed after the label", expected, found)
        else:
            expected = f"computed before the training days begin, {begin} ms"
            yield Problem(f"{name}.{column}", "features computed during the training days", expected, found, "warning")

    # the log and the history

    def _events(self, name: str, source: Source) -> Iterator[Problem]:
        is_log, schema = name == "impressions", source.schema
        context = self._context() if is_log else {}
        labels = self.config.labels()
        keys = {self.data.user_id: "data.user_id", self.data.item_id: "data.item_id", self.data.time: "data.time"}
        reads = {column: f"features.context.{feature}" for feature, column in context.items()}
        if is_log and self.data.labelled:
            reads.setdefault(self.data.labelled, "data.labelled")
        if is_log and self.data.request_id:
            reads.setdefault(self.data.request_id, "data.request_id")
        yield from _missing(name, source, keys | (dict.fromkeys(labels, "a label") if is_log else {}) | reads)
        unusable: dict[str, Problem] = {}
        for feature, column in context.items():
            if column in schema.names:
                kind = self.config.features.context[feature]
                problem = type_problem(f"{name}.{column}", kind, schema.field(column).type, source.format)
                if problem is not None:
                    unusable[column] = problem
        expected = {self.data.user_id: "an integer id", self.data.item_id: "an integer id"}
        expected |= {c: "integer milliseconds (UTC)" for c in (self.data.time, self.data.labelled) if c}
        for column, what in (dict.fromkeys(labels, "a label of 0 and 1") | expected).items():
            if column in schema.names:
                given = schema.field(column).type
                if not (integer(given) or (column not in expected and _holds_zero_one(given))):
                    unusable[column] = Problem(f"{name}.{column}", "wrong type", what, str(given))
        if DAY in schema.names and DAY in (*reads, *labels, *keys):
            what = "another name; rename the column"
            unusable[DAY] = Problem(f"{name}.{DAY}", "reserved name", what, f"{DAY!r}, which prerank makes of the time")
        yield from unusable.values()
        if self.data.time in schema.names and self.data.time not in unusable:
            yield from self._stream(name, [c for c in schema.names if c not in unusable])

    def _stream(self, name: str, columns: Sequence[str]) -> Iterator[Problem]:
        read = self.tables.impressions if name == "impressions" else self.tables.history
        with LogCheck(self.config, name, columns, self.ids) as seen:
            for batch in read(seen.columns):
                seen.see(batch)
            yield from seen.problems()

    def _context(self) -> dict[str, str]:
        context = self.config.features.context.items()
        return {feature: column_of(feature, kind) for feature, kind in context if not isinstance(kind, DERIVED)}


def _missing(name: str, source: Source, wanted: dict[str, str]) -> Iterator[Problem]:
    for column, reader in wanted.items():
        if column not in source.schema.names:
            found = f"no such column{nearest(column, source.schema.names)}"
            yield Problem(f"{name}.{column}", "missing column", f"the column {reader} reads", found)
        elif column in source.lacking:
            files = source.lacking[column]
            found = f"{len(files)} of {len(source.files)} files lack it, first {files[0].name}"
            yield Problem(f"{name}.{column}", "missing column", "the column in every file", found)


def _holds_zero_one(kind: pa.DataType) -> bool:
    return bool(pa.types.is_boolean(kind) or pa.types.is_floating(kind))


def _unreadable(name: str, error: DataError) -> Problem:
    return Problem(f"data.{name}", "table cannot be read", "Parquet or CSV files", str(error))


def _examples(ids: Sequence[int] | Array) -> str:
    return ", ".join(str(i) for i in ids[:3])
