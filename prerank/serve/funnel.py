"""One version of a funnel, in this process: a request in, an answer out. The server and the command line are shells."""

from __future__ import annotations

import time
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from types import TracebackType

import torch

from prerank.bundle.load import Bundle, load
from prerank.bundle.registry import Registry
from prerank.errors import BundleError, RegistryError, RequestError
from prerank.features.transforms import Transforms
from prerank.serve.answer import Answer, Winner, check_request
from prerank.serve.graph import Deadline, GraphRun, RequestGraph
from prerank.serve.stages import Describe, ExpandUser, Rank, RankBySimilarity, Retrieve
from prerank.stores.metadata import MetadataTable
from prerank.stores.users import UserStore
from prerank.types import Given, Request, TopK


class Funnel:
    """A loaded version with its stores. Threads may share one; each `recommend` uses the calling thread."""

    def __init__(self, bundle: Bundle, users: UserStore, metadata: MetadataTable) -> None:
        items, config = bundle.scorer.items, bundle.config
        if metadata.columns and metadata.num_rows != items.num_items:
            raise BundleError(
                f"{bundle.path}: metadata of {metadata.num_rows} rows for {items.num_items} items; publish again"
            )
        self.version = bundle.version
        self.max_k = min(config.serve.max_k, config.ranker.keep)
        self.default_deadline_ms = config.serve.deadline_ms
        self.example_context = _example_context(bundle.transforms)
        self._users = users
        self._tasks = bundle.scorer.ranker.tasks
        self._graph = RequestGraph(
            [
                ExpandUser(users, bundle.transforms, items),
                Retrieve(bundle.towers, bundle.index, items.num_items, min(config.retrieval.keep, items.num_items)),
                Rank(bundle.scorer),
                Describe(metadata, config.metadata.columns),
            ],
            inputs=frozenset({"request"}),
            outputs=frozenset({"winners", "described", "user_notes", "rank_notes"}),
            answer="winners",
            fallbacks={Rank.name: RankBySimilarity(items, len(self._tasks))},
        )

    @classmethod
    def open(cls, store: Path, version: str | None = None) -> Funnel:
        """`version` of the funnel at `store`, the live one unless named.

        Raises RegistryError if there is no such version, BundleError for one that is damaged, DataError for a user
        store that is. Nothing half-loaded is ever returned.
        """
        registry = Registry(store)
        chosen = version or registry.live()
        if chosen is None:
            raise RegistryError(f"{store}: no version is live; promote one, or name one with --version")
        path = registry.path(chosen)
        bundle = load(path)
        metadata = MetadataTable.open(path / "metadata.arrow")
        users = UserStore.open(store / "users.lmdb")
        try:
            funnel = cls(bundle, users, metadata)
            # the first use of a library loads code, pyarrow's most of all: no caller should wait for that
            funnel.recommend(Request(user_id=0, k=1, time_ms=0, context=funnel.example_context))
            return funnel
        except BaseException:
            users.close()
            raise

    def recommend(self, request: Request, arrived: float | None = None) -> Answer:
        """The request's winners. `arrived` is when it came (`time.perf_counter`); its deadline counts from there.

        Raises RequestError for a field that is wrong, DeadlineExceeded if time runs out before there is an answer.
        """
        start = time.perf_counter() if arrived is None else arrived
        check_request(request, self.max_k)
        deadline = None if request.deadline_ms is None else Deadline(start, request.deadline_ms)
        with torch.inference_mode():
            run = self._graph.run({"request": request}, deadline)
            return self._answer(request, run)

    def close(self) -> None:
        """Let go of the user store; the funnel answers no more."""
        self._users.close()

    def __enter__(self) -> Funnel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _answer(self, request: Request, run: GraphRun) -> Answer:
        top: TopK = run.outputs["winners"]
        kept = top.valid[0]
        columns = (top.item_ids[0][kept].tolist(), top.utility[0][kept].tolist(), top.probs[0][kept].tolist())
        winners = [
            Winner(item_id, _finite(utility), dict(zip(self._tasks, map(_finite, probs), strict=True)), metadata)
            for item_id, utility, probs, metadata in zip(*columns, run.outputs["described"], strict=True)
        ]
        notes = [*run.outputs["user_notes"], *run.outputs["rank_notes"], *run.notes]
        return Answer(request.request_id, self.version, winners, run.reports, run.degraded, notes)


_EXAMPLES: tuple[Given, ...] = (1, "text", True, [1], ["text"], None)


def _example_context(transforms: Transforms) -> dict[str, Given]:
    """A value of the right type for each context field."""
    columns = transforms.schema.columns("context")
    return {column: next(v for v in _EXAMPLES if _takes(transforms, columns, column, v)) for column in columns}


def _takes(transforms: Transforms, columns: Sequence[str], column: str, value: Given) -> bool:
    try:
        transforms.encode_row("context", {**dict.fromkeys(columns), column: value})
    except RequestError:
        return False
    return True


def _finite(number: float) -> float | None:
    return number if isfinite(number) else None
