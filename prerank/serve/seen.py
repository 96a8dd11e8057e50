"""What is seen of one request while it is here: noted where it happens, told when the request leaves.

The one of the running request is a context variable, so that a graph, which knows nothing of HTTP, can tell what came
of its stages, also where a request fails.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextvars import ContextVar, Token
from dataclasses import dataclass, field

import torch

from prerank.serve.answer import Answer
from prerank.serve.graph import StageReport, Values
from prerank.types import CandidateSet, Request, TopK


@dataclass(slots=True)
class Seen:
    """One request: `arrived` in seconds (`time.perf_counter`), `time_ms` the same moment in UTC milliseconds.

    `began` is when its stages did, in seconds; `stages` and `notes` are what the graph said, `error` the type and
    message of what the client got instead of an answer. `is_kept` says that `values`, the request as its stages read
    and wrote it, are wanted too, with the item_ids of as many as `num_losers` candidates that did not win.
    """

    request_id: str
    is_kept: bool = False
    num_losers: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    arrived: float = field(default_factory=time.perf_counter)
    time_ms: int = field(default_factory=lambda: time.time_ns() // 1_000_000)
    request: Request | None = None
    answer: Answer | None = None
    began: float | None = None
    stages: Sequence[StageReport] = ()
    notes: Sequence[str] = ()
    error: tuple[str, str] | None = None
    values: Values = field(default_factory=dict, repr=False)
    losers: Sequence[int] = ()

    def passed(self, began: float, stages: Sequence[StageReport], notes: Sequence[str], values: Values) -> None:
        """Note what came of the stages, of a request that failed those that were done."""
        self.began, self.stages, self.notes = began, stages, notes
        if self.is_kept:
            self.values = values

    def choose_losers(self, item_ids: torch.Tensor) -> None:
        """Note the item_ids of some candidates that did not win, by `item_ids` int64 [I] of rows.

        To be called while no row can become another item.
        """
        candidates: CandidateSet | None = self.values.get("candidates")
        winners: TopK | None = self.values.get("winners")
        if not self.num_losers or candidates is None or winners is None:
            return
        rows = candidates.rows[candidates.valid]
        lost = rows[~torch.isin(rows, winners.rows[winners.valid])]
        self.losers = item_ids[lost[torch.randperm(len(lost))[: self.num_losers]]].tolist()


_current: ContextVar[Seen | None] = ContextVar("prerank_seen", default=None)


def current() -> Seen | None:
    """What is seen of the request that runs here, or None where nobody looks."""
    return _current.get()


def begin(seen: Seen) -> Token[Seen | None]:
    """Let `seen` be the current one; `end` takes what this gives."""
    return _current.set(seen)


def end(token: Token[Seen | None]) -> None:
    """Let the one before be the current one again."""
    _current.reset(token)
