"""What becomes of requests when more come than a server can answer: of those that are let in, and of the others?

`prerank serve` over a million items with the large ranker, its weights as drawn, on all cores of this machine; requests
come from a process beside it, on the same cores. First clients that wait for their answer: the most that can be
answered a second is the capacity. Then requests that come by themselves, below it and at three times of it, and what a
server needs to be itself again. A deadline counts from when a request was sent: how late a sender is that shares the
cores is a row of its own, and part of all other times.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from benchmarks.load import Loaded, Plan, load
from benchmarks.machine import say
from benchmarks.result import Row
from benchmarks.run import Measured, Options, run
from benchmarks.served_world import KEEP, NUM_USERS, T0_MS, published, served_items
from benchmarks.server import Held, server, watched

NUM_ITEMS, QUICK_ITEMS = 1_000_000, 20_000
CLIENTS = (1, 2, 4, 8)
SHARES = (0.3, 0.6, 0.9)
OVER = 3.0
K = 100
DEADLINE_MS = 250.0
REFUSED_BAR_MS, RECOVERY_BAR_S, MEMORY_BAR = 5.0, 1.0, 1.05
_AFTER_S = 6.0


def measure(options: Options, ceilings: Mapping[str, float]) -> Measured:
    num = QUICK_ITEMS if options.quick else NUM_ITEMS
    seconds, over_s = (2.0, 4.0) if options.quick else (15.0, 30.0)
    rows: list[Row] = []
    with TemporaryDirectory() as folder:
        say(f"request_load: publishing {num:,} items")
        torch.set_num_threads(2)
        published(Path(folder) / "load", served_items(num), {})
        with server(Path(folder)) as (port, pid):
            load(_plan(port, seconds / 2, clients=2))  # the first requests read pages
            capacity = 0.0
            for clients in CLIENTS:
                done = load(_plan(port, seconds, clients=clients))
                rate = len(done.times()) / seconds
                capacity = max(capacity, rate)
                rows += [
                    Row.timed(f"closed loop, {clients} clients", done.times(), clients),
                    Row.of(f"closed loop, {clients} clients: answered a second", rate, "requests", clients),
                ]
            for share in SHARES:
                done = load(_plan(port, seconds, rate=share * capacity))
                name = f"open loop at {share:g} of capacity"
                rows += [Row.timed(name, done.times()), Row.of(f"{name}: answered", _share(done, 200), "share")]
            rows += _overload(port, pid, capacity, over_s)
    config = {"items": num, "keep": KEEP, "k": K, "deadline_ms": DEADLINE_MS, "capacity": round(capacity, 2)}
    return Measured(rows, config)


def _overload(port: int, pid: int, capacity: float, seconds: float) -> Iterator[Row]:
    name = f"open loop at {OVER:g} of capacity"
    with watched(pid) as held:
        before = load(_plan(port, _AFTER_S, clients=1))
        over = load(_plan(port, seconds, rate=OVER * capacity, seed=1))
        after = load(_plan(port, _AFTER_S, clients=1))
    accepted, refused = over.from_sent(200), over.from_sent(503)
    yield Row.timed(f"{name}: let in", over.times(200))
    yield Row.timed(f"{name}: refused", over.times(503))
    yield Row.timed(f"{name}: sent after it was due", over.late_ms)
    yield Row.timed(f"{name}: let in, from when it was sent", accepted)
    yield Row.timed(f"{name}: refused, from when it was sent", refused)
    yield Row.of(f"{name}: answered a second", len(accepted) / seconds, "requests")
    yield Row.of(f"{name}: share refused", _share(over, 503), "share")
    others = len(over.ms) - len(accepted) - len(refused)
    yield Row.at_most(f"{name}: neither answered nor refused", others, "requests", 0)
    kept = float(np.mean([ms <= DEADLINE_MS for ms in accepted])) if accepted else 0.0
    yield replace(Row.of(f"{name}: let in and within the deadline", kept, "share"), bar=0.99, holds=kept >= 0.99)
    yield Row.of(f"{name}: degraded of those let in", sum(over.degraded) / max(1, len(accepted)), "share")
    yield Row.at_most(f"{name}: refused in, p50", float(np.median(refused or [np.inf])), "ms", REFUSED_BAR_MS)
    yield Row.at_most(f"{name}: refused in, p99", float(np.percentile(refused or [np.inf], 99)), "ms", REFUSED_BAR_MS)
    yield Row.at_most(f"{name}: memory, last fifth over first", _growth(held, seconds), "times", MEMORY_BAR)
    yield Row.timed("before overload, one client", before.times())
    yield Row.timed("after overload, one client, from its first second on", after.times(start=RECOVERY_BAR_S))
    usual = float(np.percentile(before.times(), 90))
    yield Row.at_most("after overload: seconds until as before", _recovered_s(after, usual), "s", RECOVERY_BAR_S)


def _plan(port: int, seconds: float, clients: int = 0, rate: float = 0.0, seed: int = 0) -> Plan:
    bodies = tuple(
        json.dumps({"user_id": user, "k": K, "time_ms": T0_MS, "context": {"surface": "a"}, "deadline_ms": DEADLINE_MS})
        for user in range(NUM_USERS)
    )
    return Plan(port, bodies, seconds, clients, rate, seed=seed)


def _share(loaded: Loaded, status: int) -> float:
    return loaded.status.count(status) / max(1, len(loaded.status))


def _growth(held: Held, seconds: float) -> float:
    """Of the server's own memory while there is too much: the median of the last fifth over that of the first."""
    start = _AFTER_S + 1.0
    first, _ = held.between(start, start + seconds / 5)
    last, _ = held.between(start + 4 * seconds / 5, start + seconds)
    return float(np.median(last) / np.median(first))


def _recovered_s(after: Loaded, usual_ms: float) -> float:
    """From when the overload ended until no request is refused, or takes twice as long as nine in ten did before.

    Of one client that waits: requests that come by themselves also come in clumps, then as ever.
    """
    slow = [
        due + ms / 1000
        for due, ms, status in zip(after.due_s, after.ms, after.status, strict=True)
        if status != 200 or ms > 2 * usual_ms
    ]
    return max(slow, default=0.0)


def main() -> None:
    run("request_load", __doc__ or "", measure)


if __name__ == "__main__":
    main()
