"""Candidates from several generators side by side, merged in columns: each says who found it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prerank.bundle.item_table import ItemTable
from prerank.business.live import LiveItems
from prerank.config import INDEX
from prerank.index.generator import Generator
from prerank.serve.graph import Values
from prerank.types import CandidateSet, TopK


@dataclass(frozen=True, slots=True)
class Generate:
    """One generator's rows, of those that are eligible and on; more than its quota, for the index may have them too."""

    generator: Generator
    label: str
    quota: int
    items: ItemTable
    live: LiveItems
    keep: int

    @property
    def name(self) -> str:
        """It is one stage of several."""
        return f"generate_{self.label}"

    @property
    def reads(self) -> frozenset[str]:
        """What the user did, and who is eligible."""
        return frozenset({"features", "eligible"})

    @property
    def writes(self) -> frozenset[str]:
        """Rows of its own name."""
        return frozenset({f"found_{self.label}"})

    def run(self, values: Values) -> Values:
        """See `Generator.find`."""
        rows = self.generator.find(values["features"], self.quota, self.items.rows_of)
        rows = rows[self.live.on[rows]]
        rows = rows[are_eligible(rows, values["eligible"])]
        return {f"found_{self.label}": rows[: self.quota + self.keep]}

    def count(self, values: Values, written: Values) -> tuple[int, int]:
        """One user in, rows out."""
        return 1, len(written[f"found_{self.label}"])


def are_eligible(rows: Tensor, eligible: Tensor | None) -> Tensor:
    """bool [n] of rows int64 [n], by what `Target` wrote."""
    if eligible is None:
        return torch.ones(len(rows), dtype=torch.bool)
    if eligible.dtype == torch.bool:
        return eligible[rows]
    if not len(eligible):
        return torch.zeros(len(rows), dtype=torch.bool)
    return eligible[torch.searchsorted(eligible, rows).clamp_max(len(eligible) - 1)] == rows


@dataclass(frozen=True, slots=True)
class GenerateNothing:
    """In the place of one generator that failed or was late: the others' candidates are answer enough."""

    label: str

    reads = frozenset[str]()

    @property
    def name(self) -> str:
        """As notes say it."""
        return f"nothing_of_{self.label}"

    @property
    def writes(self) -> frozenset[str]:
        """What the generator would have."""
        return frozenset({f"found_{self.label}"})

    def run(self, values: Values) -> Values:
        """No rows."""
        return {f"found_{self.label}": torch.zeros(0, dtype=torch.int64)}

    def count(self, values: Values, written: Values) -> tuple[int, int]:
        """One user in, nothing out."""
        return 1, 0


@dataclass(frozen=True, slots=True)
class Merge:
    """The index's candidates in their order, then of each generator, by its quota, those that nobody had before it.

    A candidate of the index alone has a similarity; of others it is NaN.
    """

    quotas: dict[str, int]

    name = "merge"
    writes = frozenset({"candidates"})

    @property
    def reads(self) -> frozenset[str]:
        """What each found."""
        return frozenset({"retrieved", *(f"found_{name}" for name in self.quotas)})

    def run(self, values: Values) -> Values:
        """A column more, `found_by` int64 [1, N]: bit 0 for the index, bit n for the n-th generator."""
        first: CandidateSet = values["retrieved"]
        rows, found_by = first.rows[0], torch.where(first.valid[0], 1, 0)
        for bit, (name, quota) in enumerate(self.quotas.items(), start=1):
            own: Tensor = values[f"found_{name}"]
            is_new = ~torch.isin(own, rows)
            place = is_new.cumsum(0)
            kept = ~is_new | (place <= quota)
            own, is_new = own[kept], is_new[kept]
            found_by = torch.where(torch.isin(rows, own[~is_new]) & (found_by > 0), found_by | (1 << bit), found_by)
            rows = torch.cat([rows, own[is_new]])
            found_by = torch.cat([found_by, torch.full((int(is_new.sum()),), 1 << bit)])
        more = len(rows) - first.rows.shape[1]
        similarity = torch.nn.functional.pad(first.similarity, (0, more), value=torch.nan)
        merged = CandidateSet(rows[None], similarity, (found_by > 0)[None])
        return {"candidates": replace(merged, found_by=found_by[None])}

    def count(self, values: Values, written: Values) -> tuple[int, int]:
        """All that were found in, each once out."""
        num = values["retrieved"].num_valid + sum(len(values[f"found_{name}"]) for name in self.quotas)
        return num, written["candidates"].num_valid


@dataclass(frozen=True, slots=True)
class Attribute:
    """Which generators found each winner."""

    names: tuple[str, ...]

    name = "attribute"
    reads = frozenset({"candidates", "winners"})
    writes = frozenset({"found_by"})

    def run(self, values: Values) -> Values:
        """A list of names a winner, in order."""
        candidates: CandidateSet = values["candidates"]
        winners: TopK = values["winners"]
        assert candidates.found_by is not None
        order = candidates.rows[0].argsort(stable=True)
        ordered = candidates.rows[0][order]
        won = winners.rows[winners.valid]
        bits = candidates.found_by[0][order[torch.searchsorted(ordered, won)]].tolist()
        return {"found_by": [[n for at, n in enumerate(self.names) if one >> at & 1] for one in bits]}

    def count(self, values: Values, written: Values) -> tuple[int, int]:
        """Winners in, winners out."""
        num = len(written["found_by"])
        return num, num


def names_of(quotas: dict[str, int]) -> tuple[str, ...]:
    """By bit of `found_by`."""
    return (INDEX, *quotas)
