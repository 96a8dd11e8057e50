"""Retrieval where the index is on hosts of its own: the same stage to those around it, over shards of any version."""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import ceil
from typing import ClassVar

import torch
from torch import Tensor

from prerank.bundle.load import Bundle
from prerank.errors import PrerankError
from prerank.serve.expand import ExpandUser
from prerank.serve.generate import are_eligible
from prerank.serve.graph import Values
from prerank.serve.hosts import IndexHosts
from prerank.serve.index_host import Found, Held, Search
from prerank.serve.scatter import Scatter
from prerank.serve.stages import eligible_notes
from prerank.serve.sync import Part, merge
from prerank.stores.records import UserRecord, Users
from prerank.types import CandidateSet, Request

_MOST_DEADLINE = 0.5  # of a request's time: the ranker comes after


@dataclass(frozen=True, slots=True)
class RetrieveFromHosts:
    """The `keep` items most similar to the user that `hosts` find, and those that came since `bundle` was published.

    What hosts find is held to what `bundle` knows: items that it has, that are eligible and on. Shards that were left
    out are `left_out`, a sentence each.
    """

    bundle: Bundle
    users: Users
    hosts: IndexHosts
    keep: int
    candidates: str = "candidates"

    name: ClassVar[str] = "retrieve"
    reads: ClassVar[frozenset[str]] = frozenset({"request", "record", "features", "eligible", "num_eligible"})

    @property
    def writes(self) -> frozenset[str]:
        """The CandidateSet called `candidates`, and what the caller should be told."""
        return frozenset({self.candidates, "retrieve_notes", "left_out"})

    def run(self, values: Values) -> Values:
        """Embed the user in each version that is asked for, ask, and merge."""
        request: Request = values["request"]
        own, serve = self.bundle.version, self.bundle.config.serve
        wait_s = serve.hosts_ms / 1000.0
        if request.deadline_ms is not None:
            wait_s = min(wait_s, _MOST_DEADLINE * request.deadline_ms / 1000.0)
        k = self._num_to_ask()

        def search_of(version: str, held: Held) -> Search | None:
            return self._search(version, held, values, k)

        usable = [own, *(one for one in self.hosts.towers.loaded if one != own)]
        gathered = Scatter(self.hosts, search_of, usable, time.monotonic() + wait_s).gather()
        is_mixed = len({found.version for found in gathered.found}) > 1
        eligible: Tensor | None = values["eligible"]
        parts, num_unknown = [], 0
        for found in gathered.found:
            part, num = self._known(found, eligible)
            parts.append(part)
            num_unknown += num
        parts += self._since(values, eligible)
        rows, similarity = merge(parts, self.keep)
        self.hosts.note(num_unknown, is_mixed)
        num = len(self.hosts.shards)
        return {
            self.candidates: _candidates(rows, similarity),
            "retrieve_notes": eligible_notes(values["num_eligible"]),
            "left_out": tuple(f"shard {n} of {num} was left out: {why}" for n, why in gathered.left_out.items()),
        }

    def count(self, values: Values, written: Values) -> tuple[int, int]:
        """Eligible items in, the candidates out."""
        return values["num_eligible"], written[self.candidates].num_valid

    def _num_to_ask(self) -> int:
        """How many of each shard: more than `keep` where some items are off, which hosts do not know."""
        items, live = self.bundle.scorer.items, self.bundle.scorer.live
        return min(ceil(self.keep * items.num_items / max(live.num_on, 1)), 2 * self.keep)

    def _search(self, version: str, held: Held, values: Values, k: int) -> Search | None:
        """The user in one version's space, and what its targeting reads; None where there is no such vector."""
        request: Request = values["request"]
        record: UserRecord | None = values["record"]
        if version == self.bundle.version:
            models = self.bundle.index.models
            query = self.bundle.towers.user_side(values["features"])[0]
        else:
            side = self.hosts.towers.get(version)
            if side is None:
                return None
            try:
                expand = ExpandUser(self.users, side.transforms, side.items)
                features = expand.read(record, request).features
            except PrerankError as error:  # a column or a context field that this version alone reads
                self.hosts.towers.failed(version, error)
                return None
            models, query = side.models, side.towers.user_side(features)[0]
        profile = {} if record is None else record.profile
        return Search(
            version=version,
            models=models,
            query=query,
            k=k,
            time_ms=request.time_ms,
            profile={name: profile.get(name) for name in held.user},
            context={name: request.context.get(name) for name in held.context},
            exclude=request.exclude,
        )

    def _known(self, found: Found, eligible: Tensor | None) -> tuple[Part, int]:
        """What the bundle has of it, eligible and on; and how many it has not. One written anew is the slack's."""
        items, live = self.bundle.scorer.items, self.bundle.scorer.live
        rows = items.rows_of(found.item_ids)
        kept = rows >= 0
        num_unknown = len(rows) - int(kept.sum())
        kept &= rows < items.num_published
        safe = rows.clamp_min(0)
        kept &= live.on[safe] & are_eligible(safe, eligible)
        return Part(found.version, rows[kept], found.similarity[kept], found.num_eligible), num_unknown

    def _since(self, values: Values, eligible: Tensor | None) -> list[Part]:
        """The items in rows of slack, found here: no host has them."""
        items, live = self.bundle.scorer.items, self.bundle.scorer.live
        if items.is_in_order:
            return []
        rows = torch.arange(items.num_published, items.num_rows)
        rows = rows[live.on[rows] & are_eligible(rows, eligible)]
        if not len(rows):
            return []
        query = self.bundle.towers.user_side(values["features"])
        found = self.bundle.index.search(query, min(self.keep, len(rows)), rows)
        kept = found.valid[0]
        return [Part(self.bundle.version, found.rows[0][kept], found.similarity[0][kept], len(rows))]


def _candidates(rows: Tensor, similarity: Tensor) -> CandidateSet:
    """One request's; where there is none, one that is not valid."""
    if not len(rows):
        rows, similarity = torch.full((1,), -1), torch.full((1,), torch.nan)
    return CandidateSet(rows[None], similarity[None], (rows >= 0)[None])
