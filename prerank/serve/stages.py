"""The stages of one request: expand the user, retrieve, rank, describe. Each is its inputs' function and no more."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch

from prerank.bundle.item_table import ItemTable
from prerank.bundle.scorer import Ranked, Scorer
from prerank.business.diversity import Diversity, groups_of
from prerank.business.live import LiveItems
from prerank.business.targeting import Targeting
from prerank.errors import DataError, RequestError, SchemaMismatch
from prerank.features.transforms import Transforms
from prerank.index.base import Index
from prerank.kernels.greedy import greedy_top_k
from prerank.models.towers import TwoTower
from prerank.schema import IMPRESSION
from prerank.serve.graph import Values
from prerank.serve.past import Past
from prerank.stores.contexts import columns_of, digest
from prerank.stores.metadata import MetadataTable
from prerank.stores.records import UserRecord, Users
from prerank.types import Array, CandidateSet, Columns, Features, Request, TopK

_NEVER = np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True)
class ExpandUser:
    """The request's user as features: profile, context, and histories and counters cut strictly before its time.

    The profile as it is stored goes on to `targeting`. Raises SchemaMismatch at construction if the store lacks a
    column, a label or a context column that the features or the targeting need.
    """

    users: Users
    transforms: Transforms
    items: ItemTable
    targeting: Targeting | None = None

    name: ClassVar[str] = "expand_user"
    reads: ClassVar[frozenset[str]] = frozenset({"request"})
    writes: ClassVar[frozenset[str]] = frozenset({"features", "profile", "user_notes"})

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
        for column, key in ({} if self.targeting is None else self.targeting.columns("user")).items():
            if column not in self.users.columns:
                raise SchemaMismatch(
                    f"the user store has no column {column!r} that {key} reads; it has {list(self.users.columns)}; "
                    "build the store from the same tables with this version's configuration"
                )

    def run(self, values: Values) -> Values:
        """Look the user up; see `expand`."""
        request: Request = values["request"]
        record = self.users.get(request.user_id)
        features, notes = self.expand(record, request)
        return {"features": features, "profile": {} if record is None else record.profile, "user_notes": notes}

    def count(self, values: Values, written: Values) -> tuple[int, int]:
        """One user in, its features out."""
        return 1, len(written["features"])

    def expand(self, record: UserRecord | None, request: Request) -> tuple[Features, tuple[str, ...]]:
        """User and context features and counters of one request, leading shape [1], and what the caller should be told.

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
            record = self._stranger(record)
        here = self.transforms.encode_row("context", request.context)
        past = Past(record, self.users.labels, self.items, request.time_ms, self._same(record, request, here))
        if past.num_unknown:
            notes.append(f"{past.num_unknown} unknown items in history: each counts as the unknown item")
        encoded = {
            **self._profile(record, request.user_id),
            **here,
            **{name: past.history(history) for name, history in schema.histories().items()},
            **{name: past.counter(counter) for name, counter in schema.interaction.items()},
        }
        return {name: torch.from_numpy(array) for name, array in encoded.items()}, tuple(notes)

    def _stranger(self, record: UserRecord | None) -> UserRecord:
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


@dataclass(frozen=True, slots=True)
class Retrieve:
    """The `keep` items most similar to the user's vector, of those that are eligible, on and not excluded."""

    towers: TwoTower
    index: Index
    items: ItemTable
    keep: int
    targeting: Targeting | None = None
    live: LiveItems | None = None

    name: ClassVar[str] = "retrieve"
    reads: ClassVar[frozenset[str]] = frozenset({"request", "features", "profile"})
    writes: ClassVar[frozenset[str]] = frozenset({"candidates", "num_eligible", "retrieve_notes"})

    def run(self, values: Values) -> Values:
        """Targeting, the user tower, then the index. There are no more candidates than eligible items, but one."""
        request: Request = values["request"]
        eligible = None
        if self.targeting is not None:
            eligible = self.targeting.rows(values["profile"], request.context, request.time_ms)
        if self.live is not None:
            eligible = self.live.among(eligible)
        if request.exclude:
            eligible = self._without(eligible, request.exclude)
        num_eligible = self._num(eligible)
        query = self.towers.user_side(values["features"])
        candidates = self.index.search(query, min(self.keep, max(num_eligible, 1)), eligible)
        notes = () if num_eligible else ("no item is eligible for this request",)
        return {"candidates": candidates, "num_eligible": num_eligible, "retrieve_notes": notes}

    def _num(self, eligible: torch.Tensor | None) -> int:
        if eligible is None:
            return self.items.num_items
        return len(eligible) if eligible.dtype == torch.int64 else int(eligible.sum())

    def _without(self, eligible: torch.Tensor | None, item_ids: tuple[int, ...]) -> torch.Tensor:
        rows = self.items.rows_of(torch.tensor(item_ids))
        rows = rows[rows >= 0]
        if eligible is not None and eligible.dtype == torch.int64:
            kept = torch.ones(self.items.num_rows, dtype=torch.bool)
            kept[rows] = False
            return eligible[kept[eligible]]
        if eligible is None:
            num = self.items.num_rows
            eligible = torch.ones(num, dtype=torch.bool) if self.live is None else self.live.on.clone()
        eligible[rows] = False
        return eligible

    def count(self, values: Values, written: Values) -> tuple[int, int]:
        """Eligible items in, the candidates out."""
        return written["num_eligible"], written["candidates"].num_valid


@dataclass(frozen=True, slots=True)
class Rank:
    """The `k` of highest utility, by the scorer, of the CandidateSet that is called `candidates`."""

    scorer: Scorer
    candidates: str = "candidates"

    name: ClassVar[str] = "rank"
    writes: ClassVar[frozenset[str]] = frozenset({"winners", "rank_notes"})

    @property
    def reads(self) -> frozenset[str]:
        """The request, the features and the candidates."""
        return frozenset({"request", "features", self.candidates})

    def run(self, values: Values) -> Values:
        """Ranker, utility and top-k in one module."""
        winners: Ranked = self.scorer(values["features"], values[self.candidates], values["request"].k)
        lost = {
            "had no finite utility": int(winners.num_nonfinite.sum()),
            f"were {self.scorer.why_below}": int(winners.num_below.sum()),
            "are not resident and were not fetched in time,": int(winners.num_absent.sum()),
        }
        notes = tuple(f"{num} candidates {why} and could not win" for why, num in lost.items() if num)
        return {"winners": winners, "rank_notes": notes}

    def count(self, values: Values, written: Values) -> tuple[int, int]:
        """Candidates in, winners out."""
        return values[self.candidates].num_valid, int(written["winners"].valid.sum())


@dataclass(frozen=True, slots=True)
class RankBySimilarity:
    """The rank stage's fallback: the first `k` candidates in the order retrieval gave; no utility, no probability.

    Of a group it takes no more than the scorer's diversity lets.
    """

    items: ItemTable
    num_tasks: int
    diversity: Diversity | None = None

    name: ClassVar[str] = "rank_by_similarity"
    reads: ClassVar[frozenset[str]] = frozenset({"request", "candidates"})
    writes: ClassVar[frozenset[str]] = Rank.writes

    def run(self, values: Values) -> Values:
        """Utility and probabilities are NaN: they were not computed."""
        candidates: CandidateSet = values["candidates"]
        rows = torch.where(candidates.valid, candidates.rows, 0)
        as_given = -torch.arange(rows.shape[1], dtype=torch.float32).expand(rows.shape)
        k = min(values["request"].k, rows.shape[1])
        first = greedy_top_k(as_given, rows, candidates.valid, *groups_of(self.diversity, rows), k)
        valid = first >= 0
        rows = rows.gather(1, first.clamp_min(0))
        unknown = torch.full((*rows.shape, 1 + self.num_tasks), torch.nan)
        return {
            "winners": TopK(
                rows=rows,
                item_ids=self.items.item_ids[rows],
                utility=unknown[..., 0],
                probs=unknown[..., 1:],
                valid=valid,
            ),
            "rank_notes": (),
        }

    def count(self, values: Values, written: Values) -> tuple[int, int]:
        """Candidates in, winners out."""
        return values["candidates"].num_valid, int(written["winners"].valid.sum())


@dataclass(frozen=True, slots=True)
class Describe:
    """The winners' metadata, and nobody else's. Raises DataError at construction for a column the file lacks."""

    metadata: MetadataTable
    columns: tuple[str, ...]

    name: ClassVar[str] = "describe"
    reads: ClassVar[frozenset[str]] = frozenset({"winners"})
    writes: ClassVar[frozenset[str]] = frozenset({"described"})

    def __post_init__(self) -> None:
        self.metadata.check_columns(self.columns)

    def run(self, values: Values) -> Values:
        """One dict a winner, in order; no `columns` named means all."""
        winners: TopK = values["winners"]
        return {"described": self.metadata.take(winners.rows[winners.valid].numpy(), self.columns)}

    def count(self, values: Values, written: Values) -> tuple[int, int]:
        """Winners in, winners out."""
        num_winners = len(written["described"])
        return num_winners, num_winners
