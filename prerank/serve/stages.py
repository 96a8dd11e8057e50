"""The stages of one request after its user is expanded: target, retrieve, rank, describe.

Each is its inputs' function and no more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from prerank.bundle.item_table import ItemTable
from prerank.bundle.judge import Ranked
from prerank.bundle.scorer import Scorer
from prerank.business.diversity import Diversity, groups_of
from prerank.business.live import LiveItems
from prerank.business.targeting import Targeting
from prerank.index.base import Index
from prerank.kernels.greedy import greedy_top_k
from prerank.models.towers import TwoTower
from prerank.serve.device_engines import LoadedVersion
from prerank.serve.graph import Values
from prerank.serve.metadata import Descriptions
from prerank.types import CandidateSet, Features, Request, TopK


@dataclass(frozen=True, slots=True)
class Target:
    """Who may be shown: the items that are eligible, on and not excluded, as `Index.search` takes them."""

    items: ItemTable
    targeting: Targeting | None = None
    live: LiveItems | None = None

    name: ClassVar[str] = "target"
    writes: ClassVar[frozenset[str]] = frozenset({"eligible", "num_eligible"})

    @property
    def reads(self) -> frozenset[str]:
        """The request, and the profile if targeting asks for it."""
        return frozenset({"request"} if self.targeting is None else {"request", "profile"})

    def run(self, values: Values) -> Values:
        """Targeting's bitmaps, what is live, then what the request excludes."""
        request: Request = values["request"]
        eligible = None
        if self.targeting is not None:
            eligible = self.targeting.rows(values["profile"], request.context, request.time_ms)
        if self.live is not None:
            eligible = self.live.among(eligible)
        if request.exclude:
            eligible = self._without(eligible, request.exclude)
        return {"eligible": eligible, "num_eligible": self._num(eligible)}

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
        """All items in, the eligible out."""
        return self.items.num_items, written["num_eligible"]


@dataclass(frozen=True, slots=True)
class Retrieve:
    """The `keep` items most similar to the user's vector, of those that are eligible, called `candidates`."""

    towers: TwoTower
    index: Index
    keep: int
    candidates: str = "candidates"

    name: ClassVar[str] = "retrieve"
    reads: ClassVar[frozenset[str]] = frozenset({"features", "eligible", "num_eligible"})

    @property
    def writes(self) -> frozenset[str]:
        """The CandidateSet called `candidates`, and what the caller should be told."""
        return frozenset({self.candidates, "retrieve_notes"})

    def run(self, values: Values) -> Values:
        """The user tower, then the index. There are no more candidates than eligible items, but one."""
        num_eligible: int = values["num_eligible"]
        query = self.towers.user_side(values["features"])
        candidates = self.index.search(query, min(self.keep, max(num_eligible, 1)), values["eligible"])
        return {self.candidates: candidates, "retrieve_notes": eligible_notes(num_eligible)}

    def count(self, values: Values, written: Values) -> tuple[int, int]:
        """Eligible items in, the candidates out."""
        return values["num_eligible"], written[self.candidates].num_valid


@dataclass(frozen=True, slots=True)
class PrepareUser:
    """The ranker's side of the user, which needs no candidate: it is made while they are retrieved."""

    scorer: Scorer
    has_counters: bool = False

    name: ClassVar[str] = "prepare_user"
    writes: ClassVar[frozenset[str]] = frozenset({"user_side"})

    @property
    def reads(self) -> frozenset[str]:
        """The features, and the counters if there are any."""
        return frozenset({"features", "counters"} if self.has_counters else {"features"})

    def run(self, values: Values) -> Values:
        """See `Ranker.user_side`."""
        return {"user_side": self.scorer.ranker.user_side(known_of(values))}

    def count(self, values: Values, written: Values) -> tuple[int, int]:
        """Features in, tensors out."""
        return len(known_of(values)), len(written["user_side"])


@dataclass(frozen=True, slots=True)
class Rank:
    """The `k` of highest utility of the CandidateSet that is called `candidates`: by the scorer, or on a device."""

    scorer: Scorer
    candidates: str = "candidates"
    device: LoadedVersion | None = None

    name: ClassVar[str] = "rank"
    writes: ClassVar[frozenset[str]] = frozenset({"winners", "rank_notes"})

    @property
    def reads(self) -> frozenset[str]:
        """The request, the user's side and the candidates."""
        return frozenset({"request", "user_side", self.candidates})

    def run(self, values: Values) -> Values:
        """Ranker, utility and top-k in one module."""
        rank = self.scorer.rank if self.device is None else self.device.rank
        winners: Ranked = rank(values["user_side"], values[self.candidates], values["request"].k)
        return {"winners": winners, "rank_notes": lost_notes(self.scorer, winners)}

    def count(self, values: Values, written: Values) -> tuple[int, int]:
        """Candidates in, winners out."""
        return values[self.candidates].num_valid, num_won(written["winners"])


def num_won(winners: TopK) -> int:
    """How many winners there are."""
    return int(np.count_nonzero(winners.valid.numpy()))


def known_of(values: Values) -> Features:
    """All that is known of a request's user: features, and counters if there are any."""
    return {**values["features"], **values.get("counters", {})}


def eligible_notes(num_eligible: int) -> tuple[str, ...]:
    """What the caller should be told of so many eligible items."""
    return () if num_eligible else ("no item is eligible for this request",)


def lost_notes(scorer: Scorer, winners: Ranked) -> tuple[str, ...]:
    """What the caller should be told of candidates that could not win."""
    lost = {
        "had no finite utility": int(winners.num_nonfinite.sum()),
        f"were {scorer.why_below}": int(winners.num_below.sum()),
        "are not resident and were not fetched in time,": int(winners.num_absent.sum()),
    }
    return tuple(f"{num} candidates {why} and could not win" for why, num in lost.items() if num)


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
        return values["candidates"].num_valid, num_won(written["winners"])


@dataclass(frozen=True, slots=True)
class Describe:
    """The winners' metadata, and nobody else's: the columns that the request wants."""

    descriptions: Descriptions

    name: ClassVar[str] = "describe"
    reads: ClassVar[frozenset[str]] = frozenset({"request", "winners"})
    writes: ClassVar[frozenset[str]] = frozenset({"described"})

    def run(self, values: Values) -> Values:
        """One JSON object a winner, in order."""
        winners: TopK = values["winners"]
        rows = winners.rows[0].numpy()[winners.valid[0].numpy()]
        return {"described": self.descriptions.take(rows, values["request"].metadata)}

    def count(self, values: Values, written: Values) -> tuple[int, int]:
        """Winners in, winners out."""
        num_winners = len(written["described"])
        return num_winners, num_winners
