"""The k most similar rows by a graph where that pays, and by looking at all eligible ones where it does not."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from prerank._tensor_files import read_tensors, write_tensors
from prerank.errors import BundleError
from prerank.index.exact import ExactIndex, models_of
from prerank.index.graph import Graph, Links, build_links
from prerank.index.plan import Plan, Step, measure
from prerank.index.storage import Storage
from prerank.kernels.scan import check_rows, scan_top_k
from prerank.types import Array, CandidateSet

_GRAPH = "graph."


@dataclass(frozen=True, slots=True)
class _Later:
    """What changed since the graph was built; replaced whole, so that who searches sees one state of it.

    `fresh` int64, rising: rows that came, which are looked at one by one. `kept` bool [I]: rows whose vectors are still
    those of the graph, and how many; None while no row has changed.
    """

    fresh: Tensor
    kept: Tensor | None
    num_kept: int


class HNSWIndex:
    """Item vectors float32 [I, D], one a row, stored as in ExactIndex, and beside them a graph that leads to them.

    The graph names rows that may be the best, and what is stored says how similar each is: similarities, ties and what
    is never found are ExactIndex's, only that some of the best can be missing. How many that may be, and below which
    share of eligible rows every one is looked at, is in the `plan` that `prepare` measures; without one the index is
    exact.

    Rows that `put` gives vectors are looked at one by one beside the graph, until the next is built.
    """

    is_exact = False
    threads: int | None = None

    def __init__(self, vectors: Tensor, storage: Storage = "float32") -> None:
        self.models: Mapping[str, str] = {}
        self._later: _Later
        self._set(ExactIndex(vectors, storage), Plan(0, 0.0, 0), None)

    @property
    def storage(self) -> Storage:
        """What the vectors are kept as."""
        return self._exact.storage

    def search(self, query: Tensor, k: int, eligible: Tensor | None) -> CandidateSet:
        """The k rows of largest dot product with each query float32 [B, D], or nearly; see `Index.search`."""
        later = self._later
        if self.graph is None or not len(query):
            return self._all(query, k, eligible)
        is_listed = eligible is not None and eligible.dtype == torch.int64
        if eligible is not None and is_listed:
            check_rows(eligible, self.graph.num_rows)
        fresh = later.fresh if eligible is None else _among(later.fresh, eligible)
        if eligible is None:
            num_eligible = later.num_kept
        else:
            listed = len(eligible) if is_listed else int(np.count_nonzero(eligible.numpy()))
            num_eligible = listed - len(fresh)
        step = self.plan.step(k, num_eligible, len(fresh))
        if step is None:
            return self._all(query, k, eligible)
        return self._by_graph(query, k, eligible, step, later, fresh)

    def prepare(self, query: Tensor, k: int, floor: float) -> None:
        """Build the graph, measure where and how it is searched, and keep it if it ever is; see `Index.prepare`.

        The times are those of this machine, with as many threads as searches have now. Raises ConfigError where faiss
        is not installed.
        """
        exact = self._exact
        vectors = exact.vectors.float()
        if exact.scales is not None:
            vectors *= exact.scales.unsqueeze(1)
        links = build_links(vectors.numpy(), self._num_threads())
        if links is None:
            return
        graph = Graph(links)
        self._set(exact, Plan(0, 0.0, 0), graph)
        later = self._later

        def by_graph(one: Tensor, k: int, eligible: Tensor | None, step: Step) -> CandidateSet:
            return self._by_graph(one, k, eligible, step, later, later.fresh)

        with torch.inference_mode():
            plan = measure(self._all, by_graph, query.contiguous(), vectors, k, floor, time.perf_counter)
        self._set(exact, plan, graph if plan.has_graph else None)

    def put(self, rows: Tensor, vectors: Tensor | None) -> None:
        """Give rows int64 [n] these vectors float32 [n, D], or none; see `Index.put`."""
        self._exact.put(rows, vectors)
        if self.graph is None:
            return
        later = self._later
        kept = self._exact.finite() if later.kept is None else later.kept.clone()
        kept[rows] = False
        fresh = later.fresh[~torch.isin(later.fresh, rows)]
        if vectors is not None:
            fresh = torch.cat([fresh, rows]).sort().values
        self._later = _Later(fresh, kept, int(np.count_nonzero(kept.numpy())))

    def own(self) -> None:
        """See `Index.own`; the graph is in this process's memory as it is."""
        self._exact.own()

    def save(self, path: Path, models: Mapping[str, str]) -> None:
        """Write one safetensors file: what is stored, the graph, and beside them `models` and the plan."""
        note: dict[str, object] = {"index": "hnsw", "storage": self.storage, "models": dict(models)}
        note["plan"] = self.plan.to_plain()
        tensors = self._exact.to_tensors()
        if self.graph is not None:
            tensors |= {_GRAPH + name: tensor for name, tensor in self.graph.links.to_tensors().items()}
            note["entry"] = self.graph.links.entry
        write_tensors(path, tensors, note)

    @classmethod
    def load(cls, path: Path) -> Self:
        """What `save` wrote, with its `models`. Raises BundleError for anything else."""
        tensors, note = read_tensors(path)
        links = {name: tensor for name, tensor in tensors.items() if name.startswith(_GRAPH)}
        stored = {name: tensor for name, tensor in tensors.items() if name not in links}
        exact = ExactIndex.of_stored(path, stored, note, "hnsw")
        try:
            plan = Plan.from_plain(note.get("plan"))
            graph = None
            if plan.has_graph:
                named = {name.removeprefix(_GRAPH): tensor for name, tensor in links.items()}
                num_rows, dim = exact.vectors.shape
                graph = Graph(Links.from_tensors(named, note.get("entry"), num_rows, dim))
        except BundleError as error:
            raise BundleError(f"{path}: {error}") from None
        index = cls(torch.empty(0, 0))
        index._set(exact, plan, graph)
        index.models = models_of(note)
        return index

    def _set(self, exact: ExactIndex, plan: Plan, graph: Graph | None) -> None:
        self._exact, self.plan, self.graph = exact, plan, graph
        num_found = 0 if graph is None else int(exact.finite().sum())
        self._later = _Later(torch.zeros(0, dtype=torch.int64), None, num_found)

    def _num_threads(self) -> int:
        return torch.get_num_threads() if self.threads is None else self.threads

    def _all(self, query: Tensor, k: int, eligible: Tensor | None) -> CandidateSet:
        similarity, rows = self._scan(query, k, eligible, self.threads)
        return CandidateSet(rows=rows, similarity=similarity, valid=rows >= 0)

    def _scan(self, query: Tensor, k: int, eligible: Tensor | None, threads: int | None) -> tuple[Tensor, Tensor]:
        return scan_top_k(self._exact.vectors, self._exact.scales, query, k, eligible, threads)

    def _by_graph(
        self, query: Tensor, k: int, eligible: Tensor | None, step: Step, later: _Later, fresh: Tensor
    ) -> CandidateSet:
        """The best of what the graph names and of `fresh`, the rows of `later.fresh` that are eligible."""
        assert self.graph is not None
        bits = _bits(eligible, later, self.graph.num_rows)
        named = torch.from_numpy(self.graph.find(query, step.width, bits, self._num_threads()))
        # so few are looked at faster than a second thread is woken
        threads = 1 if len(fresh) < step.width else self.threads
        found = []
        for b, rows in enumerate(named):
            some, one = rows[rows >= 0], query[b : b + 1]
            answer = None
            if len(some) >= step.least:
                answer = self._scan(one, k, torch.cat([some, fresh]).sort().values, threads)
            # one that the graph names may have left meanwhile
            if answer is None or int(answer[1][0, -1]) < 0:
                answer = self._scan(one, k, eligible, self.threads)
            found.append(answer)
        similarity, best = (torch.cat(both) for both in zip(*found, strict=True))
        return CandidateSet(rows=best, similarity=similarity, valid=best >= 0)


def _among(fresh: Tensor, eligible: Tensor) -> Tensor:
    """Those of the rows `fresh` that are eligible."""
    if not len(fresh):
        return fresh
    return fresh[torch.isin(fresh, eligible)] if eligible.dtype == torch.int64 else fresh[eligible[fresh]]


def _bits(eligible: Tensor | None, later: _Later, num_rows: int) -> Array | None:
    """The rows of the graph that may be found, a bit each, the lowest first; None for all that it has links to."""
    may = eligible
    if eligible is not None and eligible.dtype == torch.int64:
        may = torch.zeros(num_rows, dtype=torch.bool)
        may[eligible] = True
    if later.kept is not None:
        may = later.kept if may is None else may & later.kept
    return None if may is None else np.packbits(may.numpy(), bitorder="little")
