"""What of a scorer ranks, on a device: its ranker, the tables of its items, utility, rules and diversity.

The host's scorer stays the truth. What changes in it is copied over (`Replica.staged`).
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn

from prerank.bundle.judge import Judged, Ranked, judged, known, winners
from prerank.bundle.scorer import Scorer
from prerank.business.diversity import Diversity, groups_of
from prerank.business.rule import Rule
from prerank.errors import DeviceFull
from prerank.models.ranker import Ranker
from prerank.serve.device_ranker import RankerReplica
from prerank.serve.device_streams import Device
from prerank.types import Features

_SIDE = "item_side."  # as no rule can be called, for a part of the scorer is


@dataclass(frozen=True, slots=True)
class Asked:
    """B requests as tensors on a device that are always of the same names and shapes.

    The ranker's side of the users [B, ...]; rows int64 and valid bool [B, N]. Of what a request need not say, slots
    int64 and values float32 [B, N] by name, there is a bool [B] each whether it does.
    """

    user_side: Features
    rows: Tensor
    valid: Tensor
    slots: Tensor | None = None
    has_slots: Tensor | None = None
    values: Features = field(default_factory=dict)
    has_values: Features = field(default_factory=dict)


Piece: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""A table, rows int64 [n] of it, and what they will be [n, ...]."""


class Staged:
    """New rows of tables, `pieces` of them, on the host."""

    def __init__(self, pieces: list[Piece]) -> None:
        self._pieces = pieces

    def add(self, pieces: Sequence[Piece]) -> None:
        """More of them, to be sent and written with these."""
        self._pieces += pieces

    def send(self) -> None:
        """Bring it to the device of the tables."""
        self._pieces = [
            (table, at.to(table.device), taken.to(table.device, table.dtype)) for table, at, taken in self._pieces
        ]

    def write(self) -> None:
        """Write it to the tables, after it was sent."""
        for table, at, taken in self._pieces:
            table.index_copy_(0, at, taken)


class Replica:
    """`scorer` on `device`, floats of its ranker and of what that reads as `dtype`; utility is float32 in any case.

    Of its `part` only, if all items are resident: there rows count from the first of it. Raises DeviceFull, saying what
    needs how much, where it would not fit.
    """

    def __init__(
        self, scorer: Scorer, device: Device, dtype: torch.dtype | None = None, part: slice = slice(None)
    ) -> None:
        assert part == slice(None) or scorer.items.slots is None
        self._scorer, self._where, self.dtype = scorer, device.where, dtype
        self.tasks = scorer.ranker.tasks
        by_row, by_slot = ({name: one[part] for name, one in kind(scorer).items()} for kind in (_by_row, _by_slot))
        module = cast("nn.Module", scorer.ranker)
        self._first = range(scorer.items.num_rows)[part].start
        num_slots, num_rows = (len(range(num)[part]) for num in (scorer.items.num_slots, scorer.items.num_rows))
        self.num_slots, self.num_rows = num_slots, num_rows
        needs = {
            f"the ranker's side of {num_slots:,} items": sum(map(self._bytes, by_slot.values())),
            "the ranker": sum(map(self._bytes, [*module.parameters(), *module.buffers()])),
            f"what is live of {num_rows:,} rows": sum(one.nbytes for one in by_row.values()),
        }
        self.num_bytes = sum(needs.values())
        free = device.free_bytes()
        if self.num_bytes > free:
            raise DeviceFull(_too_large(needs, free))
        try:
            self._rows = {name: self._copy(one, None) for name, one in by_row.items()}
            self._slots = {name: self._copy(one, dtype) for name, one in by_slot.items()}
            ranker = deepcopy(module).to(self._where, dtype)
            rules = {name: deepcopy(rule).to(self._where) for name, rule in scorer.rules.items()}
            self._utility = deepcopy(scorer.utility).to(self._where)
        except torch.OutOfMemoryError:
            raise DeviceFull(_too_large(needs, device.free_bytes())) from None
        self.ranker = RankerReplica(cast("Ranker", ranker.eval().requires_grad_(False)), self._slots, device)
        self._rules = tuple(rules.values())
        for name, rule in rules.items():
            for of_rule, _ in list(rule.named_buffers()):
                if f"{name}.{of_rule}" in self._rows:
                    _put_buffer(rule, of_rule, self._rows[f"{name}.{of_rule}"])
        self._diversity: Diversity | None = None
        if scorer.diversity is not None:
            self._diversity = Diversity(self._rows["codes"], scorer.diversity.at_most.to(self._where))

    @property
    def takes_slots(self) -> bool:
        """Whether a request may say where features are: not all items are resident."""
        return "slots" in self._rows

    @property
    def on(self) -> Tensor:
        """Which rows may win at all, bool [C]."""
        return self._rows["on"]

    @property
    def values(self) -> tuple[str, ...]:
        """What a request may say of its candidates in place of what is live."""
        return self._scorer.utility.values

    def dtype_of(self, given: Tensor) -> torch.dtype:
        """In which type a tensor of a user's side is brought here."""
        return self.dtype if self.dtype is not None and given.is_floating_point() else given.dtype

    def judge(self, asked: Asked, segment: int | None = None) -> Judged:
        """What the candidates are worth; see `Scorer.judge`. No shape depends on a value, and nothing waits.

        Of a ranker by segments all users must be of `segment` for that.
        """
        rows = torch.where(asked.valid, asked.rows, 0)
        live = self._rows["on"][rows], self._rows["pacing"][rows], self._values(asked, rows)
        slots = self._rows["slots"][rows].long() if self.takes_slots else None
        if slots is not None and asked.slots is not None and asked.has_slots is not None:
            # where no candidate is stands what other shapes left there, and a slot must be one
            slots = torch.where(asked.valid & asked.has_slots.unsqueeze(1), asked.slots, slots)
        those = known(rows, asked.valid, live, {}, slots)
        probs = self.ranker.logits(asked.user_side, those.slots, segment).sigmoid()
        return judged(those, probs, self._utility, self._rules)

    def winners(self, candidates: Judged, k: int) -> Ranked:
        """The k winners of what was judged; see `Scorer.winners`. Rows may have moved, so names order what is equal."""
        rows = candidates.rows
        return winners(candidates, self.names(rows), self.groups(rows), self._rows["item_ids"], k)

    def names(self, rows: Tensor) -> Tensor:
        """The item_ids int64 [B, N] of rows int64 [B, N]."""
        return self._rows["item_ids"][rows]

    def groups(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The groups int32 [B, G, N] of rows int64 [B, N], and how many of one may win, int64 [G]."""
        return groups_of(self._diversity, rows)

    @property
    def tables(self) -> dict[str, Tensor]:
        """Every table that is read by row or by slot."""
        return {**self._rows, **{_SIDE + name: one for name, one in self._slots.items()}}

    def taken(self, rows: Tensor) -> dict[str, Tensor]:
        """What the host's scorer has now of rows int64 [n] for each of `tables`, where all items are resident."""
        by_slot = {_SIDE + name: one.index_select(0, rows) for name, one in _by_slot(self._scorer).items()}
        return {**_taken(self._scorer, rows), **by_slot}

    def staged(self, rows: Tensor | None, slots: Tensor | None) -> Staged:
        """What the host's scorer has now of rows int64 [n] and of slots int64 [m], of those that are here."""
        pieces = []
        if rows is not None and len(rows := self._here(rows, self.num_rows)):
            at = rows - self._first
            pieces += [(self._rows[name], at, taken) for name, taken in _taken(self._scorer, rows).items()]
        if slots is not None and len(slots := self._here(slots, self.num_slots)):
            at = slots - self._first
            of_slots = {name: whole.index_select(0, slots) for name, whole in _by_slot(self._scorer).items()}
            pieces += [(self._slots[name], at, taken) for name, taken in of_slots.items()]
        return Staged(pieces)

    def _here(self, places: Tensor, num: int) -> Tensor:
        """Of rows, or slots, int64 [n] of the scorer those of this part, which has so many."""
        return places[(places >= self._first) & (places < self._first + num)]

    def _values(self, asked: Asked, rows: Tensor) -> dict[str, Tensor]:
        found = {}
        for name in self.values:
            found[name] = self._rows[f"value_{name}"][rows]
            if name in asked.values:
                found[name] = torch.where(asked.has_values[name].unsqueeze(1), asked.values[name], found[name])
        return found

    def _bytes(self, tensor: Tensor) -> int:
        return tensor.numel() * self.dtype_of(tensor).itemsize

    def _copy(self, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
        """Its own memory, on a CPU too."""
        kept = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        return torch.empty(tensor.shape, dtype=kept, device=self._where).copy_(tensor)


def _by_slot(scorer: Scorer) -> dict[str, Tensor]:
    return scorer.item_side.tensors()


def _by_row(scorer: Scorer) -> dict[str, Tensor]:
    """Every table [C, ...] that judging and ordering read, by name; those of a rule after the rule's."""
    items, live = scorer.items, scorer.live
    found = {"item_ids": items.item_ids, "on": live.on, "pacing": live.pacing}
    found |= {f"value_{name}": live.value(name) for name in live.names}
    if items.slots is not None:
        found["slots"] = items.slots
    if scorer.diversity is not None:
        found["codes"] = scorer.diversity.codes
    for name, rule in scorer.rules.items():
        for of_rule, tensor in rule.named_buffers():
            if tensor.dim() and len(tensor) == items.num_rows:
                found[f"{name}.{of_rule}"] = tensor
    return found


def _taken(scorer: Scorer, rows: Tensor) -> dict[str, Tensor]:
    """Rows int64 [n] of each of `_by_row`; what is live is of one moment."""
    found = {name: tensor.index_select(0, rows) for name, tensor in _by_row(scorer).items()}
    on, pacing, values = scorer.live.gather(rows)
    return found | {"on": on, "pacing": pacing} | {f"value_{name}": value for name, value in values.items()}


def _put_buffer(rule: Rule, name: str, tensor: Tensor) -> None:
    """Let the rule read this table, the one that updates are written to."""
    where, _, last = name.rpartition(".")
    setattr(rule.get_submodule(where), last, tensor)


def _too_large(needs: dict[str, int], free: int) -> str:
    parts = ", ".join(f"{what} {num / 2**30:.3g} GiB" for what, num in sorted(needs.items(), key=lambda one: -one[1]))
    return (
        f"the device has {free / 2**30:.3g} GiB free, and needed are {sum(needs.values()) / 2**30:.3g}: {parts}; "
        "load it in bfloat16, keep fewer items resident ([inventory] resident.top), or let go of another version first"
    )
