"""Candidates that are not resident: fetched from a store, made as the resident ones were, and ranked in one batch.

What was fetched stays in the slots that the version keeps for it, those used least go first; before the store comes a
cache of this process. A fetch that is late is for the next request: this one does without those items.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as Late
from dataclasses import dataclass, replace
from math import inf
from typing import ClassVar

import numpy as np
import pyarrow as pa
import structlog
import torch
from cachetools import TTLCache
from torch import Tensor

from prerank.bundle.load import Bundle
from prerank.bundle.readers import Readers
from prerank.errors import DataError, PrerankError
from prerank.serve.graph import Values
from prerank.serve.threads import settle
from prerank.stores.tail import RATE, Row, TailStore
from prerank.types import Array, CandidateSet, Features

_HOST_ITEMS_A_SLOT = 8
_THREADS = 4
_SPARE = 0.25  # of the slots, so many are free or soon will be: a request cannot wait for readers to end
_log = structlog.get_logger(__name__)

OUTCOMES = ("slot", "host", "store", "late", "unknown", "failed", "full")
"""What came of a candidate that is not resident: its slot was there yet; it was in this process, or in the store; the
store was late, does not have it, or failed; there was no slot for it."""
EVICTIONS = ("stale", "room")
"""Why an item left its slot: it was fetched too long ago; it was used least lately, and slots were wanted."""


class Tail:
    """The tail of `bundle`'s items, in `store`. `readers` say when a slot is read no more. Threads may share one."""

    def __init__(
        self, bundle: Bundle, store: TailStore, readers: Readers, clock: Callable[[], float] = time.monotonic
    ) -> None:
        options, self._items, self._scorer = bundle.config.inventory, bundle.scorer.items, bundle.scorer
        assert self._items.slots is not None, "all are resident"
        self._config, self._transforms = bundle.config, bundle.transforms
        self._store, self._readers, self._clock = store, readers, clock
        self._wait_s, self._ttl_s = options.fetch_ms / 1000, options.ttl_s
        num = options.cached
        self._first = self._items.num_slots - num
        self._row = np.full(num, -1, np.int64)  # of each slot's item
        self._used = np.zeros(num, np.int64)  # when last, as a count of fetches
        self._turn = 0
        self._free: deque[int] = deque(range(num))
        self._left: deque[tuple[int, int]] = deque()  # slots that items left, and after which line of readers
        self._made: deque[tuple[float, int, int]] = deque()  # when slots grow stale, oldest first, and of which row
        self._host: TTLCache[int, Row] = TTLCache(num * _HOST_ITEMS_A_SLOT, self._ttl_s, clock)
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(_THREADS, "tail", initializer=settle)
        self._counts = Counter[str](dict.fromkeys(OUTCOMES, 0))
        self._evicted = Counter[str](dict.fromkeys(EVICTIONS, 0))

    def counts(self) -> dict[str, int]:
        """How many candidates there were of each of OUTCOMES."""
        with self._lock:
            return dict(self._counts)

    def evictions(self) -> dict[str, int]:
        """How many items left their slots for each of EVICTIONS."""
        with self._lock:
            return dict(self._evicted)

    def locate(self, candidates: CandidateSet) -> CandidateSet:
        """`candidates` with the slots of all that are resident or could be fetched in time; of the others -1."""
        slots = self._items.slots_of(torch.where(candidates.valid, candidates.rows, 0))
        is_tail = candidates.valid & ((slots < 0) | (slots >= self._first))
        rows = torch.unique(candidates.rows[is_tail])
        if len(rows):
            self._bring(rows)
            slots = self._items.slots_of(torch.where(candidates.valid, candidates.rows, 0))
        return replace(candidates, slots=slots)

    def close(self) -> None:
        """End the threads and let go of the store."""
        self._pool.shutdown()
        self._store.close()
        with self._lock:
            self._host.expire(inf)  # its links refer to each other, and frozen garbage is never looked for

    def _bring(self, rows: Tensor) -> None:
        """As many of rows int64 [n] into slots as can be in time."""
        with self._lock:
            self._turn += 1
            self._expire()
            slots = self._items.slots_of(rows)
            there = slots[slots >= 0].numpy() - self._first
            self._used[there] = self._turn
            self._counts["slot"] += len(there)
            ids = self._items.item_ids[rows[slots < 0]].tolist()
            found = {one: row for one in ids if (row := self._host.get(one)) is not None}
            self._counts["host"] += len(found)
        wanted = [one for one in ids if one not in found]
        if wanted:
            found |= self._fetched(wanted)
        if found:
            self._place(list(found), list(found.values()))

    def _fetched(self, item_ids: Sequence[int]) -> Mapping[int, Row]:
        """Of the store, what comes in time; what comes later is kept for later."""
        coming = self._pool.submit(self._fetch, item_ids)
        try:
            found = coming.result(self._wait_s)
        except Late:
            self._count("late", len(item_ids))
            return {}
        except PrerankError as error:
            _log.warning("items could not be fetched", num=len(item_ids), error=str(error))
            self._count("failed", len(item_ids))
            return {}
        self._count("store", len(found))
        self._count("unknown", len(item_ids) - len(found))
        return found

    def _fetch(self, item_ids: Sequence[int]) -> Mapping[int, Row]:
        found = {one: row for one, row in zip(item_ids, self._store.get(item_ids), strict=True) if row is not None}
        with self._lock:
            self._host.update(found)
        return found

    def _place(self, item_ids: Sequence[int], raw: Sequence[Row]) -> None:
        """Make the ranker's side of items, and give each a slot."""
        encoded = self._encoded(raw)
        if encoded is None:
            fit = [at for at, one in enumerate(raw) if self._encoded([one]) is not None]
            _log.warning("fetched items are not as this version reads them", num=len(raw) - len(fit))
            self._count("failed", len(raw) - len(fit))
            item_ids, raw = [item_ids[at] for at in fit], [raw[at] for at in fit]
            encoded = self._encoded(raw) if fit else None
        if encoded is None:
            return
        with torch.inference_mode():
            side = self._scorer.ranker.item_side(encoded)
        rows = self._items.rows_of(torch.tensor(item_ids))
        assert self._items.slots is not None
        with self._lock, torch.inference_mode():
            self._reclaim()
            # another request may have brought it meanwhile
            new = (self._items.slots_of(rows) < 0).nonzero().squeeze(1)
            self._counts["full"] += max(0, len(new) - len(self._free))
            new = new[: len(self._free)]
            own = np.array([self._free.popleft() for _ in range(len(new))], np.int64)
            slots = torch.from_numpy(own) + self._first
            self._scorer.put_side(slots, {name: tensor[new] for name, tensor in side.items()})
            self._row[own], self._used[own] = rows[new].numpy(), self._turn
            self._items.slots[rows[new]] = slots.int()
            stale = self._clock() + self._ttl_s
            self._made.extend((stale, slot, row) for slot, row in zip(own.tolist(), rows[new].tolist(), strict=True))
            self._make_room()

    def _encoded(self, raw: Sequence[Row]) -> Features | None:
        """Items as they are stored as features [n, ...], or None where one is not as it must be."""
        schema = self._config.features
        try:
            columns = {name: pa.array([one.get(name) for one in raw]) for name in schema.columns("item")}
            encoded = self._transforms.encode("item", pa.table(columns))
        except (DataError, pa.ArrowException, TypeError, OverflowError):
            return None
        features = {name: torch.from_numpy(np.array(column)) for name, column in encoded.items()}
        for name in schema.rates():
            rates = [one.get(RATE + name) for one in raw]
            features[name] = torch.tensor([float(rate) if isinstance(rate, int | float) else 0.0 for rate in rates])
        return features

    def _expire(self) -> None:
        """Let the items go that were fetched too long ago."""
        now = self._clock()
        while self._made and self._made[0][0] <= now:
            _, slot, row = self._made.popleft()
            if self._row[slot] == row:
                self._let_go(np.array([slot]), "stale")

    def _make_room(self) -> None:
        """Let the items go that were used least lately, several at once, until enough slots are or will be free."""
        spare, enough = len(self._free) + len(self._left), int(_SPARE * len(self._row))
        if 2 * spare < enough:
            held = np.flatnonzero(self._row >= 0)
            missing = min(enough - spare, len(held))
            self._let_go(held[np.argpartition(self._used[held], missing - 1)[:missing]], "room")

    def _let_go(self, slots: Array, why: str) -> None:
        assert self._items.slots is not None
        with torch.inference_mode():
            self._items.slots[torch.from_numpy(self._row[slots])] = -1
        self._row[slots] = -1
        self._evicted[why] += len(slots)
        line = self._readers.mark()
        self._left.extend((slot, line) for slot in slots.tolist())

    def _reclaim(self) -> None:
        while self._left and self._readers.are_past(self._left[0][1]):
            self._free.append(self._left.popleft()[0])

    def _count(self, outcome: str, num: int) -> None:
        with self._lock:
            self._counts[outcome] += num


@dataclass(frozen=True, slots=True)
class Locate:
    """Where the features of every candidate are, those of the tail fetched."""

    tail: Tail

    name: ClassVar[str] = "fetch_tail"
    reads: ClassVar[frozenset[str]] = frozenset({"candidates"})
    writes: ClassVar[frozenset[str]] = frozenset({"located"})

    def run(self, values: Values) -> Values:
        """See `Tail.locate`."""
        return {"located": self.tail.locate(values["candidates"])}

    def count(self, values: Values, written: Values) -> tuple[int, int]:
        """Candidates in, those of them that can be ranked out."""
        located: CandidateSet = written["located"]
        assert located.slots is not None
        return located.num_valid, int((located.valid & (located.slots >= 0)).sum())
