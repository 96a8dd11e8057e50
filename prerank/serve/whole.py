"""Targeting, retrieval and ranking as one stage, on a device; the host's own stages where it fails or is late."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from prerank.bundle.golden import RELATIVE
from prerank.bundle.load import Bundle
from prerank.bundle.scorer import Scorer
from prerank.errors import DeviceFailed
from prerank.serve.device_engines import Finder
from prerank.serve.device_sought import Chosen, Found, Sought
from prerank.serve.graph import Stage, Values
from prerank.serve.seen import current
from prerank.serve.stages import Rank, RankBySimilarity, Retrieve, Target, eligible_notes, lost_notes, num_won
from prerank.types import CandidateSet, Request

IN_ITS_PLACE = (Target.name, Retrieve.name, Rank.name)
"""The stages that it is in the place of."""
BY_SIMILARITY = "whole_by_similarity"
"""What takes its place where it is late."""
_WRITES = frozenset({"winners", "rank_notes", "retrieve_notes", "candidates"})
_FAILED = "the device could not answer this request; the host's own stages did"


@dataclass(frozen=True, slots=True)
class InTurn:
    """The host's stages one after the other, as one stage called `name`."""

    name: str
    target: Target
    retrieve: Retrieve
    rank: Rank | RankBySimilarity

    writes: ClassVar[frozenset[str]] = _WRITES

    @property
    def reads(self) -> frozenset[str]:
        """What the stages read, but for what they say to each other."""
        stages: tuple[Stage, ...] = (self.target, self.retrieve, self.rank)
        return frozenset().union(*(one.reads for one in stages)) - self.target.writes - self.retrieve.writes

    def run(self, values: Values) -> Values:
        """See `Target`, `Retrieve` and `Rank`."""
        found = {**values}
        stages: tuple[Stage, ...] = (self.target, self.retrieve, self.rank)
        for one in stages:
            found |= one.run({name: found[name] for name in one.reads})
        return {name: found[name] for name in self.writes}

    def count(self, values: Values, written: Values) -> tuple[int, int]:
        """All items in, winners out."""
        return self.target.items.num_items, num_won(written["winners"])


@dataclass(frozen=True, slots=True)
class Whole:
    """A request from its user's features to its winners on `device`, by the `host`'s stages where that fails.

    The candidates are there of a request that is logged; of others there are none.
    """

    scorer: Scorer
    device: Finder
    host: InTurn

    name: ClassVar[str] = "whole"
    writes: ClassVar[frozenset[str]] = _WRITES

    @property
    def reads(self) -> frozenset[str]:
        """As the stages in whose place it is."""
        return self.host.reads

    def run(self, values: Values) -> Values:
        """A vector, bitmaps and the ranker's side of the user go up, the winners come down."""
        request: Request = values["request"]
        seen = current()
        sought = self.sought(values, seen is not None and seen.is_logged)
        try:
            found = self.device.find(values["user_side"], sought, request.k)
            _check_excluded(found, request)
        except DeviceFailed:
            written = self.host.run(values)
            return {**written, "rank_notes": (*written["rank_notes"], _FAILED)}
        return {
            "winners": found,
            "candidates": _none() if found.candidates is None else found.candidates,
            "retrieve_notes": eligible_notes(found.num_eligible),
            "rank_notes": lost_notes(self.scorer, found),
        }

    def sought(self, values: Values, with_candidates: bool) -> Sought:
        """What a device finds the candidates of a request by."""
        request: Request = values["request"]
        target, chosen = self.host.target, None
        if target.targeting is not None:
            chosen = Chosen(*target.targeting.choose(values["profile"], request.context, request.time_ms))
        excluded = target.items.rows_of(torch.tensor(request.exclude, dtype=torch.int64))
        query = self.host.retrieve.towers.user_side(values["features"])
        return Sought(query, chosen, excluded[excluded >= 0], with_candidates)

    def first_difference(self, values: Values) -> str | None:
        """A sentence naming what the device finds otherwise than the host, beyond rounding, or None.

        `values` are a request, its user's features and profile.
        """
        values = {**values, "user_side": self.scorer.ranker.user_side(values["features"])}
        found = self.device.find(values["user_side"], self.sought(values, True), values["request"].k)
        wanted = self.host.target.run(values)
        if found.num_eligible != wanted["num_eligible"]:
            return f"expected {wanted['num_eligible']} eligible items, got {found.num_eligible}"
        told: CandidateSet = self.host.retrieve.run({**values, **wanted})["candidates"]
        assert found.candidates is not None
        similarity, of_device = (one.similarity[one.valid] for one in (told, found.candidates))
        if len(similarity) != len(of_device):
            return f"expected {len(similarity)} candidates, got {len(of_device)}"
        far = (similarity - of_device).abs() > RELATIVE * similarity.abs().max() if len(similarity) else similarity
        if not bool(far.any()):
            return None
        at = int(far.nonzero()[0])
        return f"expected similarity {float(similarity[at]):.7g} in place {at}, got {float(of_device[at]):.7g}"

    def count(self, values: Values, written: Values) -> tuple[int, int]:
        """All items in, winners out."""
        return self.host.count(values, written)


def whole_of(bundle: Bundle, device: Finder) -> tuple[Whole, InTurn]:
    """The stage of a version that is loaded on `device` with its retrieval, and the one in its place if it is late."""
    scorer = bundle.scorer
    target = Target(scorer.items, scorer.targeting, scorer.live)
    retrieve = Retrieve(bundle.towers, bundle.index, min(bundle.config.retrieval.keep, scorer.items.num_rows))
    host = InTurn("host_stages", target, retrieve, Rank(scorer))
    by_similarity = RankBySimilarity(scorer.items, len(scorer.ranker.tasks), scorer.diversity)
    return Whole(scorer, device, host), replace(host, name=BY_SIMILARITY, rank=by_similarity)


def _check_excluded(found: Found, request: Request) -> None:
    """Raises DeviceFailed where an item that is excluded was written anew, in another row, as the request went up."""
    if request.exclude and bool(torch.isin(found.item_ids[found.valid], torch.tensor(request.exclude)).any()):
        raise DeviceFailed("an item that is excluded has moved meanwhile")


def _none() -> CandidateSet:
    nothing = torch.zeros((1, 0), dtype=torch.int64)
    return CandidateSet(nothing, nothing.float(), nothing.bool())
