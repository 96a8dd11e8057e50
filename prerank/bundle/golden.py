"""Golden requests: users a version was asked about when it was published, and the answers it must give ever after.

Both halves are asked on their own: the towers and the index must retrieve the same rows, and the scorer, given the
rows retrieved at publishing, must name the same winners. Where towers and index are not in one process the first half
falls in two: the towers must give the same user vectors, and a shard, asked with those of publishing, the same of its
rows. Another CPU rounds otherwise, by about 1e-6 of a number: so
numbers may be RELATIVE off, and items whose expected numbers are within TIED may change places. Both are shares of
the number itself, or for similarities, in which large terms cancel, of the request's largest.

Where at most so many of a group win, one of two tied items may turn the other away, and then others after it: what
follows in that request is not compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from prerank.bundle.item_table import ItemTable
from prerank.bundle.scorer import Scorer
from prerank.errors import BundleError
from prerank.index.base import Index
from prerank.models.towers import TwoTower
from prerank.types import CandidateSet, Features

RELATIVE = 1e-4
TIED = 1e-5
ROUNDED = 0.02
"""How far a probability may be off where a ranker runs with bfloat16 products."""
_SMALL = 1e-3  # utilities below this share of the request's largest are compared as if they were that large
_USER, _QUERY = "user.", "query"


@dataclass(frozen=True, slots=True)
class Answers:
    """What G requests retrieved and who won, best first.

    retrieved int64 [G, N] rows, -1 past the last; similarity float32 [G, N]; won int64 [G, K] rows, -1 past the last;
    item_ids int64 [G, K] of those rows, utility float32 [G, K] micros per impression and probs float32 [G, K, T], all 0
    past the last.
    """

    retrieved: Tensor
    similarity: Tensor
    won: Tensor
    item_ids: Tensor
    utility: Tensor
    probs: Tensor


@dataclass(frozen=True, slots=True)
class Golden:
    """G requests, as user and context features [G, ...], and their answers.

    `query` float32 [G, D] are the user vectors; None of a version that was published without.
    """

    user: Features
    answers: Answers
    query: Tensor | None = None

    @classmethod
    def ask(cls, user: Features, towers: TwoTower, index: Index, scorer: Scorer, keep: int, k: int) -> Golden:
        """The answers of these models to `user` [G, ...]: `keep` candidates and `k` winners each."""
        query = _queries(user, towers)
        retrieved, similarity = _retrieved(query, index, keep)
        return cls(user, Answers(retrieved, similarity, *_won(user, scorer, retrieved, k)), query)

    def first_difference(self, towers: TwoTower, index: Index | None, scorer: Scorer) -> str | None:
        """A sentence naming the first golden answer that these models do not give, or None.

        Without an index the user vectors are compared in place of what it retrieves.
        """
        said, query = self.answers, _queries(self.user, towers)
        won = _won(self.user, scorer, said.retrieved, said.won.shape[1])
        useful = _Numbers("utility", "among the winners", _SMALL, scorer.items.item_ids, scorer.diversity is not None)
        if index is None:
            different, got = self._first_other_query(query), Answers(said.retrieved, said.similarity, *won)
        else:
            got = Answers(*_retrieved(query, index, said.retrieved.shape[1]), *won)
            similar = _Numbers("similarity", "among those retrieved", 1.0, scorer.items.item_ids, False)
            different = similar.first_difference(said.retrieved, said.similarity, got.retrieved, got.similarity)
        return (
            different
            or useful.first_difference(said.won, said.utility, got.won, got.utility)
            or _first_other_name(said, scorer.items)
            or _first_other_prob(said, got, scorer)
        )

    def _first_other_query(self, query: Tensor) -> str | None:
        if self.query is None:
            return None
        far = ~((query - self.query).abs() <= RELATIVE * self.query.abs().amax(1, keepdim=True))
        if not bool(far.any()):
            return None
        g, at = far.nonzero()[0].tolist()
        return (
            f"golden request {g}: expected a user vector with {float(self.query[g, at]):.7g} in place {at}, got "
            f"{float(query[g, at]):.7g}"
        )

    def first_difference_of_shard(self, index: Index, rows: Tensor, item_ids: Tensor, is_cut: bool) -> str | None:
        """A sentence naming the first of the items retrieved that a shard does not find as it was found, or None.

        The shard has the version's `rows` int64 [n], rising, with their item_ids [n]; its `index` is of these alone if
        it `is_cut`. One that is not exact may miss some: it is asked among those retrieved, and what it finds of
        them is compared. None too for a version without user vectors.
        """
        similar = _Numbers("similarity", "among those retrieved of this shard", 1.0, item_ids, False)
        for g, query in enumerate(() if self.query is None else self.query.unsqueeze(1)):
            ours = torch.isin(self.answers.retrieved[g], rows)
            wanted, expected = self.answers.retrieved[g][ours], self.answers.similarity[g][ours]
            if not len(wanted):
                continue
            places = torch.searchsorted(rows, wanted)
            among = None if is_cut and index.is_exact else (places if is_cut else wanted).sort().values
            found = index.search(query, len(wanted), among)
            got, numbers = found.rows, found.similarity.masked_fill(~found.valid, 0)
            if among is not None:
                got, numbers = got[found.valid], numbers[found.valid][None]
                got = (got if is_cut else torch.searchsorted(rows, got))[None]
                is_found = torch.isin(places, got)
                places, expected = places[is_found], expected[is_found]
            different = similar.first_difference(places[None], expected[None], got, numbers, g)
            if different:
                return different
        return None

    def first_far_prob(self, tasks: Sequence[str], probs: Callable[[Features, Tensor], Tensor]) -> str | None:
        """A sentence naming the first golden winner whose probability is ROUNDED off or more, or None.

        `probs` are of a user's features [1, ...] and rows int64 [1, N]: those of each of `tasks`, float32 [1, N, T].
        """
        won = self.answers.won
        for g in range(len(won)):
            kept = won[g : g + 1, : int((won[g] >= 0).sum())]
            if not kept.numel():
                continue
            one = {name: column[g : g + 1] for name, column in self.user.items()}
            with torch.inference_mode():
                got = probs(one, kept)[0]
            far = ~((got - self.answers.probs[g, : kept.shape[1]]).abs() < ROUNDED)
            for place, task in far.nonzero().tolist():
                said = float(self.answers.probs[g, place, task])
                return (
                    f"golden request {g}: expected item {int(self.answers.item_ids[g, place])} to have prob {said:.4g} "
                    f"of {tasks[task]}, got {float(got[place, task]):.4g}"
                )
        return None

    def to_tensors(self) -> dict[str, Tensor]:
        """By name, for a file."""
        answers = {f.name: getattr(self.answers, f.name) for f in fields(Answers)}
        queries = {} if self.query is None else {_QUERY: self.query}
        return {**answers, **queries, **{_USER + name: column for name, column in self.user.items()}}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Golden:
        """What `to_tensors` gave. Raises BundleError naming what is missing."""
        names = [f.name for f in fields(Answers)]
        missing = [name for name in names if name not in tensors]
        if missing:
            raise BundleError(f"golden requests: expected {names}, and {missing} is missing")
        user = {name.removeprefix(_USER): t for name, t in tensors.items() if name.startswith(_USER)}
        return cls(user, Answers(*(tensors[name] for name in names)), tensors.get(_QUERY))


def _each(user: Features) -> Iterator[Features]:
    """One request at a time, as a server asks."""
    for n in range(len(next(iter(user.values())))):
        yield {name: column[n : n + 1] for name, column in user.items()}


@torch.inference_mode()
def _queries(user: Features, towers: TwoTower) -> Tensor:
    """User vectors float32 [G, D]."""
    return torch.cat([towers.user_side(one) for one in _each(user)])


@torch.inference_mode()
def _retrieved(query: Tensor, index: Index, keep: int) -> tuple[Tensor, Tensor]:
    """The first two of `Answers`, of user vectors float32 [G, D]."""
    found = [index.search(one.unsqueeze(0), keep, None) for one in query]
    rows = torch.cat([one.rows for one in found])
    return rows, torch.cat([one.similarity.masked_fill(~one.valid, 0) for one in found])


@torch.inference_mode()
def _won(user: Features, scorer: Scorer, retrieved: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The rest of them, of who was `retrieved` int64 [G, N]."""
    ranked = []
    for one, rows in zip(_each(user), retrieved.unsqueeze(1), strict=True):
        ranked.append(scorer(one, CandidateSet(rows, torch.zeros(rows.shape), rows >= 0), k))
    return (
        torch.cat([r.rows for r in ranked]),
        torch.cat([r.item_ids.masked_fill(~r.valid, 0) for r in ranked]),
        torch.cat([r.utility.masked_fill(~r.valid, 0) for r in ranked]),
        torch.cat([r.probs.masked_fill(~r.valid.unsqueeze(-1), 0) for r in ranked]),
    )


@dataclass(frozen=True, slots=True)
class _Numbers:
    """How one column of answers is compared: its name, its list, and the share of the largest that counts as small.

    item_ids [I] are those of the rows. `has_groups`: whether an item that was not among the K may have been turned
    away, by one that ties with it.
    """

    name: str
    of: str
    small: float
    item_ids: Tensor
    has_groups: bool

    def first_difference(
        self, rows: Tensor, numbers: Tensor, got_rows: Tensor, got: Tensor, first: int = 0
    ) -> str | None:
        """Expected rows int64 and numbers float32 [G, K] and what came -> the first place they differ, or None.

        Requests are counted from `first`.
        """
        scale = numbers.abs().maximum(self.small * numbers.abs().amax(1, keepdim=True))
        far = ~((got - numbers).abs() <= RELATIVE * scale)
        parted: set[int] = set()
        for g, place in (far | (rows != got_rows)).nonzero().tolist():
            if g in parted:
                continue
            row, within = got_rows[g, place], TIED * scale[g, place]
            is_other = self.has_groups and row >= 0 and not bool((rows[g] == row).any())
            if is_other and bool((got[g, place] - numbers[g, place]).abs() <= within):
                parted.add(g)
                continue
            ties = _tied(rows[g], numbers[g], place, row, within)
            if bool(far[g, place]) or not ties:
                wanted = self._said(rows[g, place], numbers[g, place])
                found = self._said(got_rows[g, place], got[g, place])
                return f"golden request {first + g}: expected {wanted} in place {place} {self.of}, got {found}"
        return None

    def _said(self, row: Tensor, number: Tensor) -> str:
        if row < 0:
            return "nothing"
        return f"item {int(self.item_ids[row])} of {self.name} {float(number):.7g}"


def _tied(rows: Tensor, numbers: Tensor, place: int, row: Tensor, within: Tensor) -> bool:
    """Whether what was expected of `row` is within `within` of what was expected in `place`.

    Of a row that was not among the K, no more than the last number was expected.
    """
    if row < 0 or rows[place] < 0:
        return bool(row == rows[place])
    known = numbers[rows == row]
    expected = known[0] if len(known) else numbers[-1]
    return bool((expected - numbers[place]).abs() <= within)


def _first_other_name(said: Answers, items: ItemTable) -> str | None:
    """A row is an item's only as long as its item_id is."""
    found = items.item_ids[said.won.clamp_min(0)]
    different = ((said.won >= 0) & (found != said.item_ids)).nonzero()
    if not len(different):
        return None
    g, place = different[0].tolist()
    expected, row = int(said.item_ids[g, place]), int(said.won[g, place])
    return f"golden request {g}: expected item {expected} in row {row}, got item {int(found[g, place])}"


def _first_other_prob(said: Answers, got: Answers, scorer: Scorer) -> str | None:
    """The tasks the utility leaves out are answers too."""
    same_item = (said.won == got.won).unsqueeze(-1)
    different = (same_item & ~((got.probs - said.probs).abs() <= RELATIVE)).nonzero()
    if not len(different):
        return None
    g, place, task = different[0].tolist()
    return (
        f"golden request {g}: expected item {int(said.item_ids[g, place])} to have prob "
        f"{float(said.probs[g, place, task]):.7g} of {scorer.ranker.tasks[task]}, got "
        f"{float(got.probs[g, place, task]):.7g}"
    )
