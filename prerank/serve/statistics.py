"""How often a model was asked and how long each part of it took, as the protocol's statistics tell it."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass

_COMPUTE = ("compute_input", "compute_infer", "compute_output")
_PARTS = ("success", "fail", "queue", *_COMPUTE, "cache_hit", "cache_miss")  # there is no cache: its are always 0


@dataclass(frozen=True, slots=True)
class Took:
    """The parts of one call in nanoseconds: until it was begun, its tensors read, ranked, and the answer written."""

    queue: int
    compute_input: int
    compute_infer: int
    compute_output: int


class Statistics:
    """Of each version, since the process began. Threads may share one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._ns: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._sizes: defaultdict[str, defaultdict[int, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
        self._last_ms: dict[str, int] = {}

    def succeeded(self, version: str, num_users: int, took: Took) -> None:
        """Note a call for so many users that was answered."""
        parts = {name: getattr(took, name) for name in Took.__slots__}
        with self._lock:
            self._counts[version].update({"success": 1, "users": num_users, **dict.fromkeys(parts, 1)})
            self._ns[version].update({"success": sum(parts.values()), **parts})
            self._sizes[version][num_users].update({"count": 1, **parts})
            self._last_ms[version] = time.time_ns() // 1_000_000

    def failed(self, version: str, ns: int) -> None:
        """Note a call that was not answered, and how long it took."""
        with self._lock:
            self._counts[version]["fail"] += 1
            self._ns[version]["fail"] += ns

    def of(self, name: str, version: str) -> dict[str, object]:
        """What the protocol says of a version of the model `name`: an inference is one user, an execution one call."""
        with self._lock:
            counts, ns = self._counts[version], self._ns[version]
            return {
                "name": name,
                "version": version,
                "last_inference": self._last_ms.get(version, 0),
                "inference_count": counts["users"],
                "execution_count": counts["success"],
                "inference_stats": {part: {"count": counts[part], "ns": ns[part]} for part in _PARTS},
                "batch_stats": [
                    {"batch_size": size, **{part: {"count": own["count"], "ns": own[part]} for part in _COMPUTE}}
                    for size, own in sorted(self._sizes[version].items())
                ],
            }
