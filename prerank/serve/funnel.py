"""One version of a funnel, in this process: a request in, an answer out; and what happened since, in.

The server and the command line are shells.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from math import isfinite
from pathlib import Path
from types import TracebackType

import numpy as np
import torch

from prerank._rows import rows_of
from prerank.bundle.inventory import Inventory
from prerank.bundle.load import Bundle, load
from prerank.bundle.publish import ITEMS_UNTIL
from prerank.bundle.registry import Registry
from prerank.bundle.scorer import Scorer
from prerank.config import INDEX
from prerank.errors import BundleError, DeadlineExceeded, RegistryError, RequestError
from prerank.features.transforms import Transforms
from prerank.kernels.engine import Engine
from prerank.kernels.native import level, library
from prerank.kernels.stop import Stop
from prerank.serve.answer import Answer, Winner, check_request
from prerank.serve.changes import Changed, Changes
from prerank.serve.device_bundle import OnDevice
from prerank.serve.device_engines import LoadedVersion
from prerank.serve.expand import ExpandUser
from prerank.serve.generate import names_of
from prerank.serve.graph import Deadline, GraphRun, RequestGraph, Stage
from prerank.serve.hosts import IndexHosts
from prerank.serve.lookups import open_tail, open_users
from prerank.serve.metadata import Described, Descriptions
from prerank.serve.passage import run_graph
from prerank.serve.ranking import Ranking
from prerank.serve.record import Recorded, check_contexts, check_events
from prerank.serve.seen import current
from prerank.serve.served import Served
from prerank.serve.tail import Tail
from prerank.serve.threads import settle
from prerank.serve.turns import RANKING_NICER
from prerank.serve.wiring import wire
from prerank.stores.events import LiveEvent
from prerank.stores.items import ItemStore
from prerank.stores.live import LiveUsers
from prerank.stores.metadata import MetadataTable
from prerank.stores.reads import FILE as READS
from prerank.stores.reads import ReadCounts
from prerank.stores.records import Users
from prerank.stores.tail import TailStore
from prerank.types import Array, Given, ItemChange, Request, TopK


class Funnel:
    """A loaded version with its stores. Threads may share one; each `recommend` uses the calling thread."""

    def __init__(
        self,
        bundle: Bundle,
        users: LiveUsers,
        metadata: MetadataTable,
        engine: Engine | None = None,
        changes: ItemStore | None = None,
        tail: TailStore | None = None,
        counts: ReadCounts | None = None,
        hosts: IndexHosts | None = None,
        device: OnDevice | None = None,
    ) -> None:
        items, config = bundle.scorer.items, bundle.config
        if metadata.columns and metadata.num_rows != items.num_published:
            raise BundleError(
                f"{bundle.path}: metadata of {metadata.num_rows} rows for {items.num_published} items; publish again"
            )
        self.version = bundle.version
        self.engine, self._owns_engine = engine, True
        self.recent: deque[Request] = deque(maxlen=_MOST_RECENT)
        self.max_k = min(config.serve.max_k, config.ranker.keep)
        self.default_deadline_ms = config.serve.deadline_ms
        targeting = bundle.scorer.targeting
        self._targeted = {} if targeting is None else targeting.example()
        self.example_context = {**self._targeted, **_example_context(bundle.transforms)}
        said = {column: value for column, value in self.example_context.items() if column in users.contexts}
        self.example_events = _example_events(users.event_names, int(items.item_ids[0]), said)
        self._users, self._items, self._transforms = users, items, bundle.transforms
        self._tasks = bundle.scorer.ranker.tasks
        self._generators = names_of({name: one.quota for name, one in config.generators.items()})
        self._store = changes
        self.inventory = Inventory(bundle, metadata)
        self._changes = Changes(self.inventory, bundle.scorer.live, changes, _items_until(bundle))
        self.example_items = [{"item_id": int(items.item_ids[0]), "on": True, "pacing": 0.5}]
        self.tail: Tail | None = None
        if tail is not None:
            self.tail = Tail(bundle, tail, self.inventory.readers)
        expand = ExpandUser(users, bundle.transforms, items, targeting)
        self._on_device: LoadedVersion | None = None
        self._is_whole = device is not None and device.whole
        if device is not None:
            anybody, _ = expand.expand(None, Request(0, 1, 0, self.example_context))
            self._on_device = device.load(bundle, anybody, self.max_k, hosts is not None)
        self.ranking = Ranking(bundle, expand, self.tail, self.inventory.readers, self.max_k, self._on_device)
        self._pool = ThreadPoolExecutor(_STAGES_AT_ONCE, "stage", initializer=settle)
        self._descriptions = Descriptions(config.metadata, metadata, items, bundle.version, counts)
        self._counts = counts
        if hosts is not None:
            hosts.towers.most = config.serve.towers
        self._bundle = bundle
        self._graph = self._wired(users, hosts)

    @classmethod
    def open(
        cls,
        store: Path,
        version: str | None = None,
        workers: int | None = None,
        tail: str | None = None,
        shared: Engine | None = None,
        users: str | None = None,
        hosts: IndexHosts | None = None,
        device: OnDevice | None = None,
    ) -> Funnel:
        """`version` of the funnel at `store`, the live one unless named.

        `tail` is the url of the Redis that holds the items that are not resident; by default they are in `tail.lmdb`.
        `users` is that of the Redis that holds users and events; by default they are in `users.lmdb` and `events.lmdb`.

        `workers` native threads rank, one a core unless told otherwise; with 0, and where there are no native kernels,
        torch does on the calling thread. With a `shared` engine its threads do, and it stays open. Where there are
        index `hosts`, which stay open too, they are asked in place of the version's own index, which is not read. On a
        `device`, which stays open as well, that ranks, and the host where it fails.
        Raises RegistryError if there is no such version, BundleError for one that is damaged, DataError for a user
        store that is. Nothing half-loaded is ever returned. What happens meanwhile is kept in the store's
        `events.lmdb` and `items.lmdb`, which are made if they are not there.
        """
        registry = Registry(store)
        chosen = version or registry.live()
        if chosen is None:
            raise RegistryError(f"{store}: no version is live; promote one, or name one with --version")
        path = registry.path(chosen)
        bundle = load(path, with_index=hosts is None)
        engine = shared or engine_of(workers)
        if engine is not None:
            bundle.accelerate(engine)
        metadata = MetadataTable.open(path / "metadata.arrow")
        known = open_users(store, bundle.config, users)
        opened: list[TailStore | ItemStore | ReadCounts] = []
        try:
            changes = ItemStore.open(store / "items.lmdb")
            opened.append(changes)
            rest = None if bundle.scorer.items.slots is None else open_tail(store, bundle.config, tail)
            opened += [] if rest is None else [rest]
            counts = ReadCounts.open(store / READS)
            opened.append(counts)
            funnel = cls(bundle, known, metadata, engine, changes, rest, counts, hosts, device)
            funnel._owns_engine = shared is None
            # the first use of a library loads code, pyarrow's most of all: no caller should wait for that
            with suppress(DeadlineExceeded):  # a stage's own deadline is for when it is warm
                funnel.recommend(Request(user_id=0, k=1, time_ms=0, context=funnel.example_context))
            metadata.take(np.zeros(1, np.int64))  # which that request had ready
            return funnel
        except BaseException:
            known.close()
            for one in opened:
                one.close()
            raise

    def recommend(self, request: Request, arrived: float | None = None, cancelled: Stop | None = None) -> Answer:
        """The request's winners. `arrived` is when it came (`time.perf_counter`); its deadline counts from there.

        Raises RequestError for a field that is wrong, DeadlineExceeded if time runs out before there is an answer, and
        Cancelled when `cancelled` is set.
        """
        settle()
        start = time.perf_counter() if arrived is None else arrived
        check_request(request, self.max_k)
        self._descriptions.columns_of(request.metadata)
        deadline = None if request.deadline_ms is None else Deadline(start, request.deadline_ms)
        with torch.inference_mode(), self.inventory.readers.reading():
            run = run_graph(self._graph, {"request": request}, deadline, cancelled)
            self.recent.append(request)
            answer = self._answer(request, run)
            if (seen := current()) is not None and seen.is_logged:
                said = (self.scorer, self._users, self._generators, answer.notes)
                seen.served = Served.of(request, self.version, run, *said)
            return answer

    def describe(self, item_ids: Sequence[int], columns: Sequence[str] | None) -> Described:
        """Metadata of items, deferred columns too; see `Descriptions.describe`."""
        with self.inventory.readers.reading():
            return self._descriptions.describe(item_ids, columns)

    def record(self, events: Sequence[LiveEvent]) -> Recorded:
        """Take all of `events` or none; the next request of their users knows of them.

        What is taken is on the disk, or in the Redis of the users. Raises RequestError for a field that is wrong,
        DataError if the store cannot be written.
        """
        check_events(events, self._users.event_names, time.time_ns() // 1_000_000)
        check_contexts(events, self._transforms, self._users.contexts, list(self._targeted))
        rows = self._items.rows_of(torch.tensor([one.item_id for one in events]))
        done = self._users.record(events)
        return Recorded(len(events), int((rows < 0).sum()), done.num_repeated, done.num_logged)

    def change(self, changes: Sequence[ItemChange]) -> Changed:
        """Take all of `changes` or none; every request that begins after this knows of them.

        What is taken is on the disk, and applies to later versions too. Raises RequestError for a field that is wrong,
        NoRoom where more items come than there is slack for, DataError if the store cannot be written.
        """
        settle()
        return self._changes.take(changes)

    def catch_up(self, item_ids: Collection[int]) -> None:
        """Take what another version that shares the stores was told of these items, and has put on the disk."""
        self._changes.catch_up(item_ids)

    def sweep(self) -> int:
        """Forget the recorded events that the log has by now: how many. See `LiveUsers.sweep` for who may."""
        return self._users.sweep()

    @property
    def scorer(self) -> Scorer:
        """What decides the order, with its items."""
        return self._bundle.scorer

    def look_up_in(self, users: Users) -> None:
        """Know those who ask from `users` from here on. Raises SchemaMismatch where they lack what is read."""
        self._graph = self._wired(users)

    def put_stages(self, *others: Stage) -> None:
        """Let these run from here on, in the places of the stages of their names."""
        self._graph = self._graph.with_stages(others)

    @property
    def ranks_by(self) -> str:
        """What ranks: a device by its name, one of `kernels.native.LEVELS`, or "torch"."""
        if self._on_device is not None:
            return self._on_device.name
        return "torch" if self.engine is None else self.engine.level

    @property
    def tail_counts(self) -> Mapping[str, int]:
        """What came of candidates that are not resident, by outcome (`serve.tail.OUTCOMES`); none where all are."""
        return {} if self.tail is None else self.tail.counts()

    @property
    def free_rows(self) -> int:
        """For how many items that come, or are written anew, there is room."""
        return self.inventory.num_free

    @property
    def tail_evictions(self) -> Mapping[str, int]:
        """How many items left their slots, by why (`serve.tail.EVICTIONS`); none where all are resident."""
        return {} if self.tail is None else self.tail.evictions()

    def close(self) -> None:
        """Let go of the stores and the threads; the funnel answers no more."""
        self._pool.shutdown()
        if self._on_device is not None:
            self.scorer.tell(None)
            self._on_device.close()
        self._users.close()
        if self._store is not None:
            self._store.close()
        if self.tail is not None:
            self.tail.close()
        if self._counts is not None:
            self._counts.close()
        if self.engine is not None and self._owns_engine:
            self.engine.close()

    def __enter__(self) -> Funnel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _wired(self, users: Users, hosts: IndexHosts | None = None) -> RequestGraph:
        shared = self._bundle, users, self._descriptions, self.tail, self._pool
        return wire(*shared, hosts, self._on_device, self._is_whole)

    def _answer(self, request: Request, run: GraphRun) -> Answer:
        top: TopK = run.outputs["winners"]
        described = run.outputs["described"]
        num = len(described)  # the first so many
        item_ids = top.item_ids[0].numpy()[:num].tolist()
        found_by = run.outputs.get("found_by", [(INDEX,)] * len(item_ids))
        assert len(item_ids) == len(found_by)
        probs = rows_of(self._tasks, [_finite(of_task) for of_task in top.probs[0].numpy()[:num].T])
        utility = _finite(top.utility[0].numpy()[:num])
        winners = list(map(Winner, item_ids, utility, probs, described, found_by))
        said = [run.outputs[notes] for notes in ("user_notes", "retrieve_notes", "rank_notes")]
        left_out = run.outputs.get("left_out", ())
        notes = [*chain.from_iterable(said), *run.notes, *left_out]
        is_degraded = run.degraded or bool(left_out)
        return Answer(request.request_id, self.version, winners, run.reports, is_degraded, notes)


def _items_until(bundle: Bundle) -> int:
    """The moment of the last of the items that came while another version served, and that this one was made with."""
    parents = bundle.manifest.get("parents")
    said = parents.get(ITEMS_UNTIL, "0") if isinstance(parents, Mapping) else "0"
    return int(said) if isinstance(said, str) and said.isdecimal() else 0


_STAGES_AT_ONCE = 32
"""Threads for stages, made as they are needed: of a request that overlap, and those that are waited for no more."""


_MOST_RECENT = 8
"""Of the latest requests, so many are kept to warm the next version with."""


def engine_of(workers: int | None) -> Engine | None:
    """So many native threads, one a core unless told otherwise; None where torch ranks."""
    if workers == 0 or library() is None or level() == "portable":  # which is right, and slower than torch
        return None
    return Engine(len(os.sched_getaffinity(0)) if workers is None else workers, nicer=RANKING_NICER)


_EXAMPLES: tuple[Given, ...] = (1, "text", True, [1], ["text"], None)


def _example_context(transforms: Transforms) -> dict[str, Given]:
    """A value of the right type for each context field."""
    columns = transforms.schema.columns("context")
    return {column: next(v for v in _EXAMPLES if _takes(transforms, columns, column, v)) for column in columns}


def _example_events(names: Sequence[str], item_id: int, context: Mapping[str, Given]) -> list[dict[str, object]]:
    """An exposure of an item there is, and a label of it, with the context that is kept of them."""
    said = {"context": dict(context)} if context else {}
    return [{"user_id": 1, "item_id": item_id, "event": name, **said} for name in names[:2]]


def _takes(transforms: Transforms, columns: Sequence[str], column: str, value: Given) -> bool:
    try:
        transforms.encode_row("context", {**dict.fromkeys(columns), column: value})
    except RequestError:
        return False
    return True


def _finite(numbers: Array) -> list[float | None]:
    plain: list[float | None] = numbers.tolist()
    if np.isfinite(numbers).all():
        return plain
    return [one if one is not None and isfinite(one) else None for one in plain]
