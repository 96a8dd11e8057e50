"""Requests that a version can be asked again and again: its golden ones, or those of a log."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import ClassVar

from prerank._tensor_files import read_tensors
from prerank.bundle.golden import Golden
from prerank.bundle.manifest import GOLDEN
from prerank.errors import DataError
from prerank.serve.answer import Answer
from prerank.serve.expand import CountEvents, ExpandUser
from prerank.serve.funnel import Funnel
from prerank.serve.graph import Values
from prerank.serve.replaying import LoggedUsers, request_of
from prerank.serve.stages import Target
from prerank.stores.requests import LoggedRequest
from prerank.types import Features, Request


@dataclass(frozen=True, slots=True)
class GiveUser:
    """In the place of `ExpandUser`: the features [G, ...] of golden requests, of which user_id says which."""

    features: Features

    name: ClassVar[str] = ExpandUser.name
    reads: ClassVar[frozenset[str]] = ExpandUser.reads
    writes: ClassVar[frozenset[str]] = ExpandUser.writes

    def run(self, values: Values) -> Values:
        """One request's, leading shape [1]."""
        number = values["request"].user_id
        one = {name: column[number : number + 1] for name, column in self.features.items()}
        return {"features": one, "past": None, "user_notes": (), "record": None}

    def count(self, values: Values, written: Values) -> tuple[int, int]:
        """One user in, its features out."""
        return 1, len(written["features"])


@dataclass(frozen=True, slots=True)
class GiveNoCounters:
    """In the place of `CountEvents`: those of golden requests are among their features."""

    name: ClassVar[str] = CountEvents.name
    reads: ClassVar[frozenset[str]] = CountEvents.reads
    writes: ClassVar[frozenset[str]] = CountEvents.writes

    def run(self, values: Values) -> Values:
        """Nothing."""
        return {"counters": {}}

    def count(self, values: Values, written: Values) -> tuple[int, int]:
        """Nothing in, nothing out."""
        return 0, 0


class GoldenRequests:
    """The golden requests of `funnel`'s version, in the folder `path`; from here on it answers no others.

    Their users are features, not ids: nobody is looked up, and as when they were published every item that is on is
    eligible.
    """

    def __init__(self, funnel: Funnel, path: Path) -> None:
        golden = Golden.from_tensors(read_tensors(path / GOLDEN)[0])
        scorer = funnel.scorer
        counting = [GiveNoCounters()] if funnel.ranking.transforms.schema.interaction else []
        funnel.put_stages(GiveUser(golden.user), *counting, Target(scorer.items, None, scorer.live))
        self._funnel, self._k = funnel, min(golden.answers.won.shape[1], funnel.max_k)
        self.num = len(golden.answers.won)

    def ask(self, number: int) -> Answer:
        """See `serve.profiling.Asking`."""
        return self._funnel.recommend(Request(number, self._k, time.time_ns() // 1_000_000))


class LoggedRequests:
    """The first `limit` requests of a log, asked of `funnel`, which from here on knows no users but theirs.

    Raises DataError where there is none.
    """

    def __init__(self, funnel: Funnel, rows: Iterable[LoggedRequest], limit: int) -> None:
        self._rows = list(islice(rows, limit))
        if not self._rows:
            raise DataError("the log has no request: expected one or more")
        self._users = LoggedUsers(funnel.ranking.transforms, funnel.scorer.targeting)
        funnel.look_up_in(self._users)
        self._funnel, self.num = funnel, len(self._rows)

    def ask(self, number: int) -> Answer:
        """See `serve.profiling.Asking`. Raises what `LoggedUsers.take` and `Funnel.recommend` do."""
        logged = self._rows[number]
        self._users.take(logged)
        return self._funnel.recommend(replace(request_of(logged), metadata=None))
