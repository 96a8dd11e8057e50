"""What the device engine did, as counts."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

from prerank.serve.device_buckets import GRANULE


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Counts since the engine began, and what is there now.

    `requests` were answered by the device in `batches`, of `candidates`, for which `padding` more were computed; `cut`
    of them were over the largest size. `refused` would have been late, `fallbacks` were answered without the device.
    `eager_captures` graphs could not be captured and `eager_replays` not replayed, and torch does their work since;
    `eager` batches were done so. The device was lost and begun again `restarts` times. `sizes` are requests by their
    number of candidates, rounded up.

    `waiting` requests there are now; `graph_bytes` are held by captured graphs, `table_bytes` by weights and tables,
    `buffer_bytes` by the memory that requests and answers are copied through.
    """

    requests: int = 0
    batches: int = 0
    candidates: int = 0
    padding: int = 0
    cut: int = 0
    refused: int = 0
    fallbacks: int = 0
    eager_captures: int = 0
    eager_replays: int = 0
    eager: int = 0
    restarts: int = 0
    sizes: Mapping[int, int] = field(default_factory=dict)
    waiting: int = 0
    graph_bytes: int = 0
    table_bytes: int = 0
    buffer_bytes: int = 0


def total(snapshots: Sequence[Snapshot]) -> Snapshot:
    """Those of several devices as one."""
    sizes = Counter[int]()
    for one in snapshots:
        sizes.update(one.sizes)
    return Snapshot(**{name: sum(getattr(one, name) for one in snapshots) for name in _NAMES - {"sizes"}}, sizes=sizes)


_NAMES = frozenset(one.name for one in fields(Snapshot))


class Counts:
    """Counts by the names of `Snapshot`. Threads may share one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = Counter[str]()
        self._sizes = Counter[int]()

    def add(self, **counts: int) -> None:
        """So many more of each."""
        assert set(counts) <= _NAMES
        with self._lock:
            self._counts.update(counts)

    def saw(self, num: int) -> None:
        """A request of so many candidates."""
        with self._lock:
            self._sizes[-(-num // GRANULE) * GRANULE] += 1

    def snapshot(self, **now: int) -> Snapshot:
        """What was counted, and what is there `now`."""
        with self._lock:
            return Snapshot(**self._counts, **now, sizes=dict(self._sizes))
