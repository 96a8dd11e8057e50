"""Golden requests: users a version was asked about when it was published, and the answers it must give ever after.

Both halves are asked on their own: the towers and the index must retrieve the same rows, and the scorer, given the
rows retrieved at publishing, must name the same winners. Another CPU rounds otherwise, by about 1e-6 of a number: so
numbers may be RELATIVE off, and items whose expected numbers are within TIED may change places. Both are shares of
the number itself, or for similarities, in which large terms cancel, of the request's largest.

Where at most so many of a group win, one of two tied items may turn the other away, and then others after it: what
follows in that request is not compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
_USER = "user."


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
    """G requests, as user and context features [G, ...], and their answers."""

    user: Features
    answers: Answers

    @classmethod
    def ask(cls, user: Features, towers: TwoTower, index: Index, scorer: Scorer, keep: int, k: int) -> Golden:
        """The answers of these models to `user` [G, ...]: `keep` candidates and `k` winners each."""
        return cls(user, _answers(user, towers, index, scorer, keep, k, None))

    def first_difference(self, towers: TwoTower, index: Index, scorer: Scorer) -> str | None:
        """A sentence naming the first golden answer that these models do not give, or None."""
        said = self.answers
        keep, k = said.retrieved.shape[1], said.won.shape[1]
        got = _answers(self.user, towers, index, scorer, keep, k, said.retrieved)
        similar = _Numbers("similarity", "among those retrieved", 1.0, scorer.items, False)
        useful = _Numbers("utility", "among the winners", _SMALL, scorer.items, scorer.diversity is not None)
        return (
            similar.first_difference(said.retrieved, said.similarity, got.retrieved, got.similarity)
            or useful.first_difference(said.won, said.utility, got.won, got.utility)
            or _first_other_name(said, scorer.items)
            or _first_other_prob(said, got, scorer)
        )

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
        return {**answers, **{_USER + name: column for name, column in self.user.items()}}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Golden:
        """What `to_tensors` gave. Raises BundleError naming what is missing."""
        names = [f.name for f in fields(Answers)]
        missing = [name for name in names if name not in tensors]
        if missing:
            raise BundleError(f"golden requests: expected {names}, and {missing} is missing")
        user = {name.removeprefix(_USER): t for name, t in tensors.items() if name.startswith(_USER)}
        return cls(user, Answers(*(tensors[name] for name in names)))


@torch.inference_mode()
def _answers(
    user: Features, towers: TwoTower, index: Index, scorer: Scorer, keep: int, k: int, given: Tensor | None
) -> Answers:
    """One request at a time, as a server does; the scorer ranks the rows `given`, else those just retrieved."""
    retrieved, ranked = [], []
    for n in range(len(next(iter(user.values())))):
        one = {name: column[n : n + 1] for name, column in user.items()}
        found = index.search(towers.user_side(one), keep, None)
        retrieved.append(found)
        rows = found.rows if given is None else given[n : n + 1]
        ranked.append(scorer(one, CandidateSet(rows, torch.zeros(rows.shape), rows >= 0), k))
    return Answers(
        retrieved=torch.cat([r.rows for r in retrieved]),
        similarity=torch.cat([r.similarity.masked_fill(~r.valid, 0) for r in retrieved]),
        won=torch.cat([r.rows for r in ranked]),
        item_ids=torch.cat([r.item_ids.masked_fill(~r.valid, 0) for r in ranked]),
        utility=torch.cat([r.utility.masked_fill(~r.valid, 0) for r in ranked]),
        probs=torch.cat([r.probs.masked_fill(~r.valid.unsqueeze(-1), 0) for r in ranked]),
    )


@dataclass(frozen=True, slots=True)
class _Numbers:
    """How one column of answers is compared: its name, its list, and the share of the largest that counts as small.

    `has_groups`: whether an item that was not among the K may have been turned away, by one that ties with it.
    """

    name: str
    of: str
    small: float
    items: ItemTable
    has_groups: bool

    def first_difference(self, rows: Tensor, numbers: Tensor, got_rows: Tensor, got: Tensor) -> str | None:
        """Expected rows int64 and numbers float32 [G, K] and what came -> the first place they differ, or None."""
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
                return f"golden request {g}: expected {wanted} in place {place} {self.of}, got {found}"
        return None

    def _said(self, row: Tensor, number: Tensor) -> str:
        if row < 0:
            return "nothing"
        return f"item {int(self.items.item_ids[row])} of {self.name} {float(number):.7g}"


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
