"""What one request was answered from, caught while its version still serves, and made a row of the log later.

Rows of a version's ItemTable mean nothing once a request is over (another item may take one), so item_ids are looked up
at once. All else is kept as it stands and costs the request nothing.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prerank.bundle.scorer import Scorer
from prerank.config import INDEX
from prerank.serve.graph import GraphRun, StageReport
from prerank.serve.stages import known_of
from prerank.stores.records import UserRecord, Users
from prerank.stores.requests import LoggedRequest, as_of, digest_of
from prerank.types import CandidateSet, Features, Request, TopK

NUM_LOST = 32
"""Of the candidates that did not win, at most so many are kept."""


@dataclass(frozen=True, slots=True)
class Served:
    """A request, what was known and made of its user, and what became of its candidates.

    `pacing` and `values` [K] are the winners', as they were when it was answered. `lost_item_ids` int64 [S] are drawn
    from those that did not win, with their lost_similarity float32 [S].
    """

    request: Request
    version: str
    record: UserRecord | None
    labels: tuple[str, ...]
    context_columns: tuple[str, ...]
    features: Features
    tasks: tuple[str, ...]
    winners: TopK
    pacing: Tensor
    values: Mapping[str, Tensor]
    found_by: Sequence[Sequence[str]] | None
    generators: tuple[str, ...]
    num_candidates: int
    lost_item_ids: Tensor
    lost_similarity: Tensor
    degraded: bool
    reports: tuple[StageReport, ...]
    notes: tuple[str, ...]

    @classmethod
    def of(
        cls,
        request: Request,
        version: str,
        run: GraphRun,
        scorer: Scorer,
        users: Users,
        generators: tuple[str, ...],
        notes: Sequence[str],
    ) -> Served:
        """What there is to keep of a request whose graph has just run, before its rows may be given away."""
        winners: TopK = run.outputs["winners"]
        candidates: CandidateSet = run.outputs["candidates"]
        rows = winners.rows[winners.valid]
        _, pacing, values = scorer.live.gather(rows)
        lost = _drawn(request, candidates, rows)
        return cls(
            request,
            version,
            run.outputs["record"],
            users.labels,
            users.contexts,
            known_of(run.outputs),
            scorer.ranker.tasks,
            winners,
            pacing,
            values,
            run.outputs.get("found_by"),
            generators,
            candidates.num_valid,
            scorer.items.item_ids[candidates.rows[0][lost]],
            candidates.similarity[0][lost],
            run.degraded,
            run.reports,
            tuple(notes),
        )

    def logged(self, ms: float) -> LoggedRequest:
        """The row of the log, of a request that took `ms` from its arrival to its answer."""
        request, won = self.request, self.winners.valid[0]
        probs = self.winners.probs[0][won].numpy()
        bits = {name: 1 << at for at, name in enumerate(self.generators)}
        found_by = [(INDEX,)] * len(probs) if self.found_by is None else self.found_by
        values = [self.values[name].numpy() for name in self.values]
        return LoggedRequest(
            request_id=request.request_id,
            time_ms=request.time_ms,
            user_id=request.user_id,
            version=self.version,
            k=request.k,
            exclude=request.exclude,
            deadline_ms=request.deadline_ms,
            context=request.context,
            record=None if self.record is None else as_of(self.record, request.time_ms),
            labels=self.labels,
            context_columns=self.context_columns,
            digest=digest_of({name: column.numpy() for name, column in self.features.items()}),
            item_ids=self.winners.item_ids[0][won].numpy(),
            utility=self.winners.utility[0][won].numpy(),
            tasks=self.tasks,
            probs=probs,
            value_names=tuple(self.values),
            values=np.stack(values, axis=1) if values else np.zeros((len(probs), 0), np.float32),
            pacing=self.pacing.numpy(),
            generators=self.generators,
            found_by=np.array([sum(bits[name] for name in names) for names in found_by], np.int32),
            num_candidates=self.num_candidates,
            lost_item_ids=self.lost_item_ids.numpy(),
            lost_similarity=self.lost_similarity.numpy(),
            degraded=self.degraded,
            notes=self.notes,
            ms=ms,
            stages=tuple((one.name, one.start_ms, one.ms, one.num_in, one.num_out) for one in self.reports),
        )


def _drawn(request: Request, candidates: CandidateSet, won: Tensor) -> Tensor:
    """Places int64 [S] among the candidates of some that are valid and did not win, each as likely as any other.

    Drawn by the request's id, so that the same request has the same.
    """
    num = candidates.rows.shape[1]
    # winners among those drawn are let go, which keeps the rest uniform; with as many more there are enough most often
    most = min(num, 2 * NUM_LOST)
    places = torch.tensor(random.Random(request.request_id).sample(range(num), most), dtype=torch.int64)
    rows = candidates.rows[0][places]
    return places[candidates.valid[0][places] & ~torch.isin(rows, won)][:NUM_LOST]
