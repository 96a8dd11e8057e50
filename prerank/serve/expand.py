"""A request's user, looked up: few attributes for targeting, on a path of their own, and all that the models read.

Retrieval reads no counter, so events are counted in a stage of their own, while it runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch

from prerank._toml import nearest
from prerank.bundle.item_table import ItemTable
from prerank.business.targeting import Targeting
from prerank.errors import DataError, RequestError, SchemaMismatch
from prerank.features.transforms import Transforms
from prerank.schema import IMPRESSION, Counter
from prerank.serve.graph import Values
from prerank.serve.past import Past
from prerank.stores.contexts import columns_of, digest
from prerank.stores.records import UserRecord, Users
from prerank.types import Array, Columns, Features, Given, Request

_NEVER = np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True)
class ExpandTargeting:
    """The request's user as targeting reads him: the profile as it is stored, empty for a user nobody knows.

    Raises SchemaMismatch at construction if the store lacks a column that the targeting reads.
    """

    users: Users
    targeting: Targeting

    name: ClassVar[str] = "expand_targeting"
    reads: ClassVar[frozenset[str]] = frozenset({"request"})
    writes: ClassVar[frozenset[str]] = frozenset({"profile"})

    def __post_init__(self) -> None:
        for column, key in self.targeting.columns("user").items():
            if column not in self.users.columns:
                raise SchemaMismatch(
                    f"the user store has no column {column!r} that {key} reads; it has {list(self.users.columns)}; "
                    "build the store from the same tables with this version's configuration"
                )

    def run(self, values: Values) -> Values:
        """Look the profile up if a rule reads any of it, and nothing of what the user did.

        There is no answer without: it would show items to users who may not see them.
        """
        if not self.targeting.columns("user"):
            return {"profile": {}}
        return {"profile": self.users.profile(values["request"].user_id) or {}}

    def count(self, values: Values, written: Values) -> tuple[int, int]:
        """One user in, his columns out."""
        return 1, len(written["profile"])


@dataclass(frozen=True, slots=True)
class Expanded:
    """A request's user: `features` of leading shape [1], all but counters; his `past`, and what a caller is told."""

    features: Features
    past: Past
    notes: tuple[str, ...]

    def values(self, record: UserRecord | None) -> Values:
        """What the stage writes; `record` is what the store had of him."""
        return {"features": self.features, "past": self.past, "user_notes": self.notes, "record": record}


@dataclass(frozen=True, slots=True)
class ExpandUser:
    """The request's user as features: profile, context, and histories cut strictly before its time.

    `targeting` reads context fields that no feature does. Raises SchemaMismatch at construction if the store lacks a
    column, a label or a context column that the features need.
    """

    users: Users
    transforms: Transforms
    items: ItemTable
    targeting: Targeting | None = None

    name: ClassVar[str] = "expand_user"
    reads: ClassVar[frozenset[str]] = frozenset({"request"})
    writes: ClassVar[frozenset[str]] = frozenset({"features", "past", "user_notes", "record"})

    def __post_init__(self) -> None:
        schema = self.transforms.schema
        events = [event for event in schema.events() if event != IMPRESSION]
        for what, needed, found in (
            ("column", schema.columns("user"), self.users.columns),
            ("label", events, self.users.labels),
            ("context column", columns_of(schema).values(), self.users.contexts),
        ):
            for name in needed:
                if name not in found:
                    raise SchemaMismatch(
                        f"the user store has no {what} {name!r} that this version's features read; it has "
                        f"{list(found)}; build the store from the same tables"
                    )

    def run(self, values: Values) -> Values:
        """Look the user up; see `read`."""
        request: Request = values["request"]
        record = self.users.get(request.user_id)
        return self.read(record, request).values(record)

    def count(self, values: Values, written: Values) -> tuple[int, int]:
        """One user in, its features out."""
        return 1, len(written["features"])

    def expand(self, record: UserRecord | None, request: Request) -> tuple[Features, tuple[str, ...]]:
        """User and context features and counters of one request, leading shape [1], and what the caller should be told.

        See `read`.
        """
        found = self.read(record, request)
        return {**found.features, **counters_of(found.past, self.transforms.schema.interaction)}, found.notes

    def read(self, record: UserRecord | None, request: Request) -> Expanded:
        """The user of one request.

        No record is a new user: every profile feature unknown, every history empty, nothing counted. An item of the
        past that this version does not have is the unknown item. Raises RequestError for a missing or mistyped context
        field.
        """
        schema, notes = self.transforms.schema, []
        context = [*schema.columns("context"), *([] if self.targeting is None else self.targeting.columns("context"))]
        notes += [
            f"context field {name!r} is not used by this version" for name in request.context if name not in context
        ]
        if record is None or not record.profile:
            notes.append(f"unknown user {request.user_id}: served as a new user")
            record = self.stranger(record)
        here = self.transforms.encode_row("context", request.context)
        past = Past(record, self.users.labels, self.items, request.time_ms, self._same(record, request, here))
        if past.num_unknown:
            notes.append(f"{past.num_unknown} unknown items in history: each counts as the unknown item")
        encoded = {
            **self._profile(record, request.user_id),
            **here,
            **{name: past.history(history) for name, history in schema.histories().items()},
        }
        return Expanded({name: torch.from_numpy(array) for name, array in encoded.items()}, past, tuple(notes))

    def said(self, record: UserRecord | None, profile: Mapping[str, Given]) -> UserRecord:
        """The user as the store knows him, if it does, with what a caller says of his profile in place of its own.

        Raises RequestError naming a column that is none of the profile's, or a value that its feature cannot read.
        """
        columns = self.transforms.schema.columns("user")
        for name in profile:
            if name not in columns:
                raise RequestError(f"user.{name}: expected one of {columns}{nearest(name, columns)}")
        self.transforms.encode_row("user", profile)
        known = record if record is not None and record.profile else self.stranger(record)
        return replace(known, profile={**known.profile, **profile})

    def stranger(self, record: UserRecord | None = None) -> UserRecord:
        """A profile of nothing, beside what he did so far, if that is known."""
        profile = dict.fromkeys(self.transforms.schema.columns("user"))
        if record is None:
            contexts = np.zeros((0, len(self.users.contexts)), np.int64)
            return UserRecord(profile, _NEVER, _NEVER, _NEVER, _NEVER.astype(np.uint32), contexts)
        return replace(record, profile=profile)

    def _same(self, record: UserRecord, request: Request, here: Columns) -> dict[str, Array]:
        """bool [E] by context feature that counters are `on`: the events with the request's value, none of an unknown.

        That a version knows the value is asked of the request alone, for the events have the same.
        """
        same = {}
        for name, column in columns_of(self.transforms.schema).items():
            is_known = bool(here[name][0] > 0)
            values = record.contexts[:, self.users.contexts.index(column)]
            same[name] = values == digest(request.context[column]) if is_known else np.zeros(len(values), bool)
        return same

    def _profile(self, record: UserRecord, user_id: int) -> dict[str, Array]:
        try:
            return self.transforms.encode_row("user", record.profile)
        except RequestError as error:  # the store's fault, not the caller's
            raise DataError(f"user store, user {user_id}: {error}; build it from the tables of this version") from None


def counters_of(past: Past, interaction: Mapping[str, Counter]) -> Features:
    """The counters by name, leading shape [1]."""
    return {name: torch.from_numpy(past.counter(counter)) for name, counter in interaction.items()}


@dataclass(frozen=True, slots=True)
class CountEvents:
    """The counters of what the request's user did, which the ranker alone reads."""

    interaction: Mapping[str, Counter]

    name: ClassVar[str] = "count_events"
    reads: ClassVar[frozenset[str]] = frozenset({"past"})
    writes: ClassVar[frozenset[str]] = frozenset({"counters"})

    def run(self, values: Values) -> Values:
        """See `Past.counter`."""
        return {"counters": counters_of(values["past"], self.interaction)}

    def count(self, values: Values, written: Values) -> tuple[int, int]:
        """Events in, counters out."""
        return values["past"].num_events, len(written["counters"])


@dataclass(frozen=True, slots=True)
class ExpandStranger:
    """The fallback of `expand`, for when the store of users fails: the user as one of whom nothing is known."""

    expand: ExpandUser

    name: ClassVar[str] = "serve_as_new_user"
    reads: ClassVar[frozenset[str]] = ExpandUser.reads
    writes: ClassVar[frozenset[str]] = ExpandUser.writes

    def run(self, values: Values) -> Values:
        """See `ExpandUser.read`."""
        return self.expand.read(self.expand.stranger(), values["request"]).values(None)

    def count(self, values: Values, written: Values) -> tuple[int, int]:
        """One user in, its features out."""
        return 1, len(written["features"])
