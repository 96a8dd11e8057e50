"""What the parts of a request are measured on: made-up users, items and events, stages and a funnel without work."""

from __future__ import annotations

import http.client
import json
import multiprocessing
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import msgspec
import numpy as np
import pyarrow as pa
import torch
import uvicorn

from prerank.bundle.item_table import ItemTable
from prerank.config import Config, parse_config
from prerank.features.transforms import Transforms
from prerank.kernels.stop import Stop
from prerank.serve.answer import Answer, Winner
from prerank.serve.changes import Changed
from prerank.serve.graph import StageReport, Values
from prerank.serve.http import create_app
from prerank.serve.metadata import Described
from prerank.serve.ranking import Ranking
from prerank.serve.record import Recorded
from prerank.stores.events import LiveEvent
from prerank.stores.records import EXPOSED
from prerank.stores.users import Events
from prerank.types import Array, Features, Given, ItemChange, Request

SEED, T0, DAY_MS = 7, 1_767_571_200_000, 86_400_000
DIM, EVENTS, LONG_HISTORY, HTTP_WINNERS = 64, 250, 500, 20
CONTEXT: Mapping[str, Given] = {"surface": "name-000001", "hour": 9}
BODY = json.dumps({"user_id": 1, "k": HTTP_WINNERS, "context": CONTEXT}).encode()


def config() -> Config:
    """Thirteen user columns, two histories of advertisers, one task, the two-tower ranker."""
    names = {f"name{k}": {"kind": "category"} for k in range(6)}
    numbers = {f"number{k}": {"kind": "number"} for k in range(5)}
    clicks = {"kind": "history", "of": "advertiser", "events": "is_click", "length": 20}
    seen = {"kind": "history", "of": "advertiser", "length": 30}
    plain = {
        "name": "parts",
        "data": {
            "impressions": "impressions.parquet",
            "items": "items.parquet",
            "users": "users.parquet",
            "train": ["2026-01-05", "2026-01-05"],
            "validate": ["2026-01-06", "2026-01-06"],
            "test": ["2026-01-07", "2026-01-07"],
        },
        "features": {
            "user": {**names, **numbers, "tags": {"kind": "bag", "length": 4}, "clicks": clicks, "seen": seen},
            "context": {"surface": {"kind": "category"}, "hour": {"kind": "category"}},
            "item": {"advertiser": {"kind": "category", "hash": 20_000}, "bid_micros": {"kind": "value"}},
        },
        "tasks": {"click": {"label": "is_click"}},
        "retrieval": {"relevant": "is_click", "targets": {"is_click": 1.0}},
        "ranker": {"model": "two_tower", "dim": DIM},
        "utility": {"click": {"value": "bid_micros"}},
    }
    return parse_config(plain, "the benchmark's funnel")


@dataclass(frozen=True, slots=True)
class World:
    """Users 0, 1, ..; items 0, 1, ..; and what was fitted on them."""

    config: Config
    users: pa.Table
    items: ItemTable
    transforms: Transforms

    @classmethod
    def build(cls, num_users: int, num_items: int) -> World:
        """Drawn from the seed."""
        draw, funnel = np.random.default_rng(SEED), config()
        names = {f"name{k}": _text(draw, num_users, 50) for k in range(6)}
        numbers = {f"number{k}": draw.lognormal(2, 1, num_users) for k in range(5)}
        users = pa.table({"user_id": np.arange(num_users), **names, **numbers, "tags": _tags(draw, num_users)})
        advertiser, bid = draw.integers(70_000, size=num_items), draw.integers(10**6, size=num_items)
        items = pa.table({"advertiser": advertiser, "bid_micros": bid})
        context = pa.table({"surface": _text(draw, 96, 4), "hour": np.arange(96) % 24})
        transforms = Transforms.fit(
            funnel.features,
            users=(users, np.ones(num_users, np.int64)),
            items=(items, np.ones(num_items, np.int64)),
            context=[context],
        )
        table = ItemTable.build(np.arange(num_items), transforms.encode("item", items))
        return cls(funnel, users, table, transforms)

    def events(self) -> Iterator[Events]:
        """Some 250 events of a day each; the last user has 500."""
        draw, last = np.random.default_rng(SEED), self.users.num_rows - 1
        for user, length in enumerate(draw.poisson(EVENTS, last + 1)):
            n = LONG_HISTORY if user == last else length
            times = T0 + np.sort(draw.integers(DAY_MS, size=n))
            flags = draw.integers(2, size=n).astype(np.uint32) | EXPOSED
            yield user, draw.integers(self.items.num_items, size=n), times, times, flags

    def features(self) -> Features:
        """Those of one user who has no history."""
        [person] = self.users.slice(1, 1).to_pylist()
        histories = self.config.features.histories().items()
        empty: dict[str, Array] = {name: np.full((1, h.length), -1, np.int32) for name, h in histories}
        encode = self.transforms.encode_row
        encoded = {**encode("user", person), **encode("context", CONTEXT), **empty}
        return {name: torch.from_numpy(column) for name, column in encoded.items()}


def described_items(n: int) -> pa.Table:
    """Six columns of metadata: two ids, two texts, a list and a number."""
    draw = np.random.default_rng(SEED)
    return pa.table(
        {
            "item_id": np.arange(n),
            "advertiser": draw.integers(n, size=n),
            "title": _text(draw, n, 50_000),
            "landing": _text(draw, n, 20_000),
            "tags": _tags(draw, n),
            "price": draw.random(n),
        }
    )


def _text(draw: np.random.Generator, n: int, names: int) -> pa.Array:
    words = pa.array([f"name-{k:06d}" for k in range(names)])
    return words.take(pa.array(draw.integers(names, size=n)))


def _tags(draw: np.random.Generator, n: int) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(np.arange(n + 1) * 3, pa.int32()), _text(draw, 3 * n, 500))


@dataclass(frozen=True, slots=True)
class Step:
    """A stage without work."""

    name: str
    reads: frozenset[str]
    writes: frozenset[str]

    def run(self, values: Values) -> Values:
        """Ones."""
        return dict.fromkeys(self.writes, 1)

    def count(self, values: Values, written: Values) -> tuple[int, int]:
        """One in, one out."""
        return 1, 1


@dataclass(frozen=True, slots=True)
class Ready:
    """A funnel that has its winners ready."""

    version: str = "20260105T0000-000000000000"
    ranks_by: str = "torch"
    free_rows: int = 0
    default_deadline_ms: float = 1000.0
    example_context: Mapping[str, Given] = field(default_factory=dict)
    example_events: Sequence[Mapping[str, Given]] = ()
    example_items: Sequence[Mapping[str, Given]] = ()
    winners: tuple[Winner, ...] = tuple(
        Winner(n, 2.5 * n, {"click": 0.25}, msgspec.Raw(msgspec.json.encode(said)))
        for n in range(HTTP_WINNERS)
        for said in [{"advertiser_id": n, "title": f"title {n}", "format": "image"}]
    )

    def recommend(self, request: Request, arrived: float | None = None, cancelled: Stop | None = None) -> Answer:
        """The same for everyone."""
        stages = [StageReport(f"stage {n}", 0.0, 1, 1) for n in range(4)]
        return Answer(request.request_id, self.version, self.winners, stages, False, [])

    @property
    def tail_counts(self) -> dict[str, int]:
        """All items are resident."""
        return {}

    @property
    def tail_evictions(self) -> dict[str, int]:
        """All items are resident."""
        return {}

    def describe(self, item_ids: Sequence[int], columns: Sequence[str] | None) -> Described:
        """Nothing is known of them."""
        return Described(self.version, [None for _ in item_ids])

    @property
    def ranking(self) -> Ranking:
        """Nothing is ranked here."""
        raise NotImplementedError

    def change(self, changes: Sequence[ItemChange]) -> Changed:
        """Nothing is changed."""
        return Changed(len(changes), 0, 0)

    def record(self, events: Sequence[LiveEvent]) -> Recorded:
        """Nothing is kept."""
        return Recorded(len(events), 0, 0, 0)


@contextmanager
def ready_server() -> Iterator[http.client.HTTPConnection]:
    """A kept connection to the server around `Ready`, in a process of its own."""
    processes = multiprocessing.get_context("spawn")
    ours, theirs = processes.Pipe()
    server = processes.Process(target=_serve, args=(theirs,), daemon=True)
    server.start()
    try:
        if not ours.poll(60):
            raise RuntimeError(f"the server did not start (exit status {server.exitcode})")
        with closing(http.client.HTTPConnection("127.0.0.1", ours.recv(), timeout=30)) as connection:
            yield connection
    finally:
        server.terminate()
        server.join(30)


def _serve(parent: Connection) -> None:
    """As `prerank serve` does it, on a free port, which is told once connections are taken."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        parent.send(listening.getsockname()[1])
        config = uvicorn.Config(create_app(Ready()), access_log=False, log_level="warning", timeout_graceful_shutdown=5)
        uvicorn.Server(config).run(sockets=[listening])


def ask(connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None = None) -> None:
    """One round trip. Raises RuntimeError for an answer that is not 200."""
    connection.request(method, path, body, {} if body is None else {"content-type": "application/json"})
    response = connection.getresponse()
    content = response.read()
    if response.status != 200:
        raise RuntimeError(f"{method} {path}: {response.status}: {content.decode()}")
