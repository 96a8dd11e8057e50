"""Does a server stay as it is under everything at once: requests, events, items, metadata, and versions that change?

`prerank serve` with items in memory and in the tail; two clients ask for winners as fast as they are answered, while
others send events, change bids, write items anew, read metadata, metrics and traces, and every half minute another
version is promoted. Twenty minutes; memory of its own and open files at the end are those of the beginning, or grew.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from benchmarks.load import Loaded, Plan, load
from benchmarks.machine import say
from benchmarks.result import Row
from benchmarks.run import Measured, Options, run
from benchmarks.scorer_world import ADVERTISERS, SEED, TOPICS
from benchmarks.served_world import NUM_USERS, T0_MS, published, served_items
from benchmarks.server import Held, ask, cli, server, watched
from prerank.bundle.registry import Registry

SECONDS, QUICK_SECONDS = 1200.0, 30.0
NUM_ITEMS, KEEP, K = 50_000, 2_000, 100
PROMOTE_S, QUICK_PROMOTE_S = 30.0, 8.0
GROWTH_BAR = 1.05
_WARM_UP = 0.15  # of the time: every version was served by then, and caches are full


def measure(options: Options, ceilings: Mapping[str, float]) -> Measured:
    seconds, promote_s = (QUICK_SECONDS, QUICK_PROMOTE_S) if options.quick else (SECONDS, PROMOTE_S)
    torch.set_num_threads(2)
    with TemporaryDirectory() as folder:
        root, items = Path(folder), served_items(NUM_ITEMS)
        say("soak: publishing two versions")
        inventory = {"slack": 2_000, "cached": 4_000, "resident": {"top": NUM_ITEMS - 10_000, "by": "revenue"}}
        for seed in (7, 8):
            published(root / "soak", items, inventory, KEEP, seed=seed)
        versions = [one.version for one in Registry(root / "soak").versions()]
        assert len(versions) == 2
        with server(root) as (port, pid), watched(pid) as held:
            say(f"soak: {seconds:g} s of everything")
            others = _Others(port, root, versions, promote_s)
            with others.running():
                loaded = load(Plan(port, _bodies(), seconds, clients=2))
        rows = [*_requests(loaded, others), *_growth(held, seconds)]
    config = {"seconds": seconds, "items": NUM_ITEMS, "keep": KEEP, "k": K, "promote_s": promote_s}
    return Measured(rows, config)


def _requests(loaded: Loaded, others: _Others) -> Iterator[Row]:
    counts = loaded.counts()
    yield Row.timed("request", loaded.times(), len(loaded.ms))
    yield Row.at_most("requests that were not answered", len(loaded.ms) - counts.get(200, 0), "requests", 0)
    yield Row.of("requests answered degraded", sum(loaded.degraded), "requests")
    yield Row.of("versions that answered", len(set(loaded.version) - {""}), "versions")
    for what in sorted(others.done):
        yield Row.of(f"other calls: {what}", others.done[what], "calls")
    for why, number in sorted(others.failed.items()):
        say(f"soak: {number} times {why}")
    yield Row.at_most("other calls that failed", sum(others.failed.values()), "calls", 0)


def _growth(held: Held, seconds: float) -> Iterator[Row]:
    first, last = held.between(_WARM_UP * seconds, 0.4 * seconds), held.between(0.75 * seconds, seconds)
    before, after = float(np.median(first[0])), float(np.median(last[0]))
    yield Row.of("memory of its own, first third after the warm-up", before, "MiB")
    yield Row.of("memory of its own, last quarter", after, "MiB")
    yield Row.of("memory of its own, most", max(held.mib), "MiB")
    yield Row.at_most("memory of its own, last over first", after / before, "times", GROWTH_BAR)
    yield Row.of("open files, first third after the warm-up", float(np.median(first[1])), "files")
    yield Row.at_most("open files, last less first", float(np.median(last[1]) - np.median(first[1])), "files", 0)


class _Others:
    """Everything but requests for winners, a thread each; how many calls of each kind, and what failed."""

    def __init__(self, port: int, root: Path, versions: list[str], promote_s: float) -> None:
        self.done, self.failed = Counter[str](), Counter[str]()
        self._port, self._root, self._versions, self._promote_s = port, root, versions, promote_s
        self._over = threading.Event()
        self._made = np.random.default_rng(SEED)
        self._lock = threading.Lock()

    def running(self) -> _Running:
        """While this lasts they are sent."""
        kinds: list[tuple[str, float, Callable[[], tuple[int, bytes]]]] = [
            ("events", 0.2, self._events),
            ("bids", 0.1, self._bids),
            ("items", 0.25, self._items),
            ("metadata", 0.5, self._metadata),
            ("metrics", 1.0, lambda: ask(self._port, "/metrics")),
            ("traces", 2.0, lambda: ask(self._port, "/v1/traces")),
            ("promote", self._promote_s, self._promote),
        ]
        return _Running(self._over, [lambda one=one: self._send(*one) for one in kinds])  # type: ignore[misc]

    def _send(self, what: str, every_s: float, call: Callable[[], tuple[int, bytes]]) -> None:
        while not self._over.wait(every_s):
            try:
                status, content = call()
            except (OSError, RuntimeError) as error:
                self._note(what, f"{what}: {error}")
                continue
            self._note(what, None if status == 200 else f"{what}: {status} {content[:200].decode()}")

    def _note(self, what: str, why: str | None) -> None:
        with self._lock:
            self.done[what] += 1
            if why is not None:
                self.failed[why] += 1

    def _post(self, path: str, body: object) -> tuple[int, bytes]:
        return ask(self._port, path, json.dumps(body).encode())

    def _events(self) -> tuple[int, bytes]:
        with self._lock:
            some = self._made.integers((NUM_USERS, NUM_ITEMS), size=(20, 2)).tolist()
        names = ("impression", "is_click")
        events = [{"user_id": u, "item_id": i, "event": names[n % 2]} for n, (u, i) in enumerate(some)]
        return self._post("/v1/events", {"events": events})

    def _bids(self) -> tuple[int, bytes]:
        with self._lock:
            some = self._made.integers((NUM_ITEMS, 1_000_000), size=(20, 2)).tolist()
        items = [{"item_id": i, "values": {"bid_micros": bid + 1}, "on": bid % 50 > 0} for i, bid in some]
        return self._post("/v1/items", {"items": items})

    def _items(self) -> tuple[int, bytes]:
        with self._lock:
            columns = {
                "advertiser": int(self._made.integers(ADVERTISERS)),
                "topics": self._made.integers(TOPICS, size=3).tolist(),
                "price": float(self._made.random()),
                "bid_micros": int(self._made.integers(1_000, 1_000_000)),
            }
            some = self._made.integers(NUM_ITEMS // 100, size=5).tolist()  # so few that slack is enough for all
        return self._post("/v1/items", {"items": [{"item_id": i, "columns": columns} for i in some]})

    def _metadata(self) -> tuple[int, bytes]:
        with self._lock:
            some = self._made.integers(NUM_ITEMS, size=50).tolist()
        return self._post("/v1/metadata", {"item_ids": some})

    def _promote(self) -> tuple[int, bytes]:
        version = self._versions[self.done["promote"] % 2]
        cli(["promote", version, "--store", str(self._root), "--why", "the soak"])
        return 200, b""


class _Running:
    def __init__(self, over: threading.Event, work: list[Callable[[], None]]) -> None:
        self._over, self._work = over, work
        self._pool = ThreadPoolExecutor(len(work))

    def __enter__(self) -> None:
        self._sent = [self._pool.submit(one) for one in self._work]

    def __exit__(self, *_: object) -> None:
        time.sleep(0.1)
        self._over.set()
        self._pool.shutdown()
        for one in self._sent:
            one.result()


def _bodies() -> tuple[str, ...]:
    one = {"k": K, "time_ms": T0_MS, "context": {"surface": "a"}}
    return tuple(json.dumps({"user_id": user, **one}) for user in range(NUM_USERS))


def main() -> None:
    run("soak", __doc__ or "", measure)


if __name__ == "__main__":
    main()
