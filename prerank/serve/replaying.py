"""A version asked the requests of a log again, each user as he was known when it was answered."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from prerank.business.targeting import Targeting
from prerank.errors import SchemaMismatch
from prerank.features.transforms import Transforms
from prerank.schema import IMPRESSION
from prerank.serve.asked import Asked, Standing
from prerank.serve.funnel import Funnel
from prerank.serve.seen import Seen, begin, end
from prerank.stores.contexts import columns_of
from prerank.stores.records import EXPOSED, UserRecord
from prerank.stores.requests import LoggedRequest, digest_of
from prerank.types import Array, Given, Request

_MOST_TIMES = 5
"""So often a request is asked in all, where items that are not resident are not fetched yet."""


class LoggedUsers:
    """A store of one user, who is another one after each `take`: that of a logged request, as a version reads him."""

    is_near = True

    def __init__(self, transforms: Transforms, targeting: Targeting | None) -> None:
        schema = transforms.schema
        targeted = [] if targeting is None else targeting.columns("user")
        self.columns: tuple[str, ...] = tuple(dict.fromkeys([*schema.columns("user"), *targeted]))
        self.labels: tuple[str, ...] = tuple(event for event in schema.events() if event != IMPRESSION)
        self.contexts: tuple[str, ...] = tuple(dict.fromkeys(columns_of(schema).values()))
        self._record: UserRecord | None = None

    def take(self, logged: LoggedRequest) -> None:
        """Be the user of this request from here on. Raises SchemaMismatch where what a version reads was not logged."""
        record = logged.record
        for what, needed, found in (
            ("label", self.labels, logged.labels),
            ("context column", self.contexts, logged.context_columns),
            ("column of the user", self.columns, record.profile if record and record.profile else self.columns),
        ):
            for name in needed:
                if name not in found:
                    raise SchemaMismatch(f"no {what} {name!r}, which the version reads, was logged")
        self._record = None if record is None else self._as_read(record, logged)

    def get(self, user_id: int) -> UserRecord | None:
        """See `stores.records.Users`."""
        return self._record

    def profile(self, user_id: int) -> Mapping[str, Given] | None:
        """See `stores.records.Users`."""
        return self._record.profile if self._record is not None and self._record.profile else None

    def _as_read(self, record: UserRecord, logged: LoggedRequest) -> UserRecord:
        """The record with the labels and contexts in the places that this store says."""
        flags = record.flags & EXPOSED
        for bit, label in enumerate(self.labels):
            had = record.flags >> np.uint32(logged.labels.index(label)) & np.uint32(1)
            flags = flags | had << np.uint32(bit)
        places = [logged.context_columns.index(column) for column in self.contexts]
        return replace(record, flags=flags, contexts=record.contexts[:, places])


def request_of(logged: LoggedRequest) -> Request:
    """What was asked, without a deadline."""
    return Request(
        logged.user_id,
        logged.k,
        logged.time_ms,
        logged.context,
        request_id=logged.request_id,
        exclude=logged.exclude,
    )


class Replaying:
    """`funnel`, which from here on knows no users but those of the log that it is asked for. One thread at a time."""

    def __init__(self, funnel: Funnel) -> None:
        self._funnel = funnel
        self._users = LoggedUsers(funnel.ranking.transforms, funnel.scorer.targeting)
        funnel.look_up_in(self._users)

    @property
    def version(self) -> str:
        """The version that is asked."""
        return self._funnel.version

    def ask(self, logged: LoggedRequest) -> Asked:
        """What it answers to this request today, without a deadline.

        Raises SchemaMismatch where what the version reads was not logged, RequestError where it does not take the
        request, such as for a context field that it needs.
        """
        self._users.take(logged)
        request = replace(request_of(logged), metadata=())
        for _ in range(_MOST_TIMES):
            asked, num_absent = self._ask(request)
            if not num_absent:
                break
            time.sleep(0.02)  # they are being fetched
        return asked

    def standing(self, item_ids: Array) -> Standing:
        """How items int64 [n] stand in this version today."""
        scorer = self._funnel.scorer
        with torch.inference_mode():
            rows = scorer.items.rows_of(torch.tensor(item_ids))
            on, pacing, values = scorer.live.gather(rows.clamp_min(0))
        return Standing(
            is_known=(rows >= 0).numpy(),
            is_on=on.numpy(),
            pacing=pacing.numpy(),
            values={name: column.numpy() for name, column in values.items()},
        )

    def _ask(self, request: Request) -> tuple[Asked, int]:
        seen = Seen(request.request_id, is_logged=True)
        token, start = begin(seen), time.perf_counter()
        try:
            answer = self._funnel.recommend(request)
        finally:
            ms = (time.perf_counter() - start) * 1000.0
            end(token)
        served = seen.served
        assert served is not None, "what is logged is kept"
        top, won = served.winners, served.winners.valid[0]
        asked = Asked(
            item_ids=top.item_ids[0][won].numpy(),
            utility=top.utility[0][won].numpy(),
            digest=digest_of({name: column.numpy() for name, column in served.features.items()}),
            degraded=answer.degraded,
            ms=ms,
        )
        absent = getattr(top, "num_absent", None)
        return asked, 0 if absent is None else int(absent.sum())
