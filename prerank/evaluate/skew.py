"""Train/serve skew, seen: the features of logged requests as served, beside those that training makes of the same.

Both are of the same user at the same moment, by the same fitted transforms; where they differ, serving and the tables
did not know the same.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, islice

import numpy as np

from prerank.evaluate.feature_words import Words
from prerank.schema import Owner
from prerank.stores.requests import LoggedRequest
from prerank.train.examples import UserExamples
from prerank.train.prepare import Prepared
from prerank.train.served import ServedFeatures
from prerank.types import Array, Report, silent

NUM_WORST = 3
_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class Example:
    """One request in which a feature is not the same; the two values in words."""

    request_id: str
    user_id: int
    time_ms: int
    served: str
    trained: str


@dataclass(frozen=True, slots=True)
class FeatureSkew:
    """One feature: in how many of the requests compared it is the same to the bit.

    Of histories and counters `num_fewer` is in how many serving knew fewer events than training, `num_more` of more.
    `worst` differ most.
    """

    owner: str
    name: str
    num_compared: int
    num_same: int
    num_fewer: int
    num_more: int
    worst: tuple[Example, ...]

    @property
    def agreement(self) -> float | None:
        """The share that is the same; None where nothing was compared."""
        return self.num_same / self.num_compared if self.num_compared else None


@dataclass(frozen=True, slots=True)
class Skew:
    """A log against the tables: the features by how little they agree, and the requests not compared, by why.

    Context features are compared where the log has an impression of the same user and moment: `num_joined` requests.
    """

    num_requests: int
    num_compared: int
    num_joined: int
    skipped: Mapping[str, int]
    features: tuple[FeatureSkew, ...]


@dataclass(slots=True)
class _Tally:
    owner: Owner | str
    compared: int = 0
    same: int = 0
    fewer: int = 0
    more: int = 0
    worst: list[tuple[float, int, Example]] = field(default_factory=list)


def audit_skew(requests: Iterable[LoggedRequest], prepared: Prepared, report: Report = silent) -> Skew:
    """What of `requests` is not as training makes it of `prepared`, whose transforms encode both.

    A request of a user who is not in the tables, or later than their last event, is not compared: they cannot know.
    """
    audit = _Audit(prepared)
    num, left = 0, iter(requests)
    while some := list(islice(left, _AT_ONCE)):
        num += len(some)
        audit.take(some)
        report("compare", num, 0, "requests")
    report("compare", num, num, "requests")
    return audit.told(num)


class _Audit:
    def __init__(self, prepared: Prepared) -> None:
        self._prepared, schema = prepared, prepared.transforms.schema
        self._served = ServedFeatures(prepared.transforms, prepared.item_ids, prepared.items)
        self._trained = UserExamples(prepared, schema)
        self._words = Words(prepared.transforms)
        log = prepared.events
        self._until_ms = int(log["time_ms"].max(initial=0))
        self._shown = prepared.shown()
        owners = {**dict.fromkeys(self._trained.profile, "user"), **dict.fromkeys(schema.histories(), "history")}
        owners |= dict.fromkeys(schema.interaction, "counter") | dict.fromkeys(schema.context, "context")
        self._tallies = {name: _Tally(owner) for name, owner in owners.items()}
        self._counted = {n for n, one in schema.interaction.items() if not one.by}
        self._skipped: Counter[str] = Counter()
        self._num_joined = self._num_compared = 0
        self._order = count()

    def take(self, requests: Sequence[LoggedRequest]) -> None:
        known = [one for one in requests if self._is_in_tables(one)]
        encoded = self._served.encode(known)
        self._skipped.update(encoded.skipped)
        if not encoded.requests:
            return
        user = self._place(np.array([one.user_id for one in encoded.requests], np.int64))
        moment = np.array([one.time_ms for one in encoded.requests], np.int64)
        context = {name: encoded.features[name] for name in self._trained.context}
        trained = self._trained.of(user, moment, context)
        self._num_compared += len(user)
        joined, events = self._impressions(user, moment)
        self._num_joined += len(joined)
        logged = {name: self._prepared.events[name][events] for name in context}
        everyone = np.arange(len(user))
        for name, tally in self._tallies.items():
            if tally.owner == "context":
                self._compare(name, encoded.requests, encoded.features[name][joined], logged[name], joined)
            else:
                self._compare(name, encoded.requests, encoded.features[name], trained[name], everyone)

    def told(self, num: int) -> Skew:
        features = [
            FeatureSkew(
                one.owner,
                name,
                one.compared,
                one.same,
                one.fewer,
                one.more,
                tuple(example for *_, example in sorted(one.worst, key=lambda entry: entry[:2], reverse=True)),
            )
            for name, one in self._tallies.items()
        ]
        features.sort(key=lambda one: 2.0 if one.agreement is None else one.agreement)
        return Skew(num, self._num_compared, self._num_joined, dict(self._skipped.most_common()), tuple(features))

    def _is_in_tables(self, one: LoggedRequest) -> bool:
        if self._place(np.array([one.user_id], np.int64))[0] < 0:
            self._skipped["the users table does not have the user"] += 1
        elif one.time_ms > self._until_ms:
            self._skipped["it is later than the log's last event"] += 1
        elif one.degraded and one.record is None:
            self._skipped["the store of users failed, and the answer was a new user's"] += 1
        else:
            return True
        return False

    def _place(self, user_ids: Array) -> Array:
        known = self._prepared.user_ids
        places = np.searchsorted(known, user_ids).clip(max=max(len(known) - 1, 0))
        return np.where(known[places] == user_ids, places, -1)

    def _impressions(self, user: Array, moment: Array) -> tuple[Array, Array]:
        """Which of these have an impression at their very moment, and its event, int64 [J] each."""
        first, end = self._shown.ends(user, moment), self._shown.ends(user, moment + 1)
        joined = np.flatnonzero(end > first)
        return joined, first[joined]  # events are in the order of user and time, as the timeline's are

    def _compare(
        self, name: str, requests: Sequence[LoggedRequest], served: Array, trained: Array, which: Array
    ) -> None:
        tally = self._tallies[name]
        apart = _apart(served, trained)
        tally.compared += len(which)
        tally.same += int((apart == 0).sum())
        if tally.owner in ("history", "counter"):
            known = served if name in self._counted else (served >= 0).sum(1)
            theirs = trained if name in self._counted else (trained >= 0).sum(1)
            tally.fewer += int((known < theirs).sum())
            tally.more += int((known > theirs).sum())
        for at in np.argsort(-apart, kind="stable")[:NUM_WORST].tolist():
            if not apart[at]:
                break
            one = requests[int(which[at])]
            words = (self._words.of(name, served[at]), self._words.of(name, trained[at]))
            example = Example(one.request_id, one.user_id, one.time_ms, *words)
            entry = (float(apart[at]), -next(self._order), example)
            push = heapq.heappush if len(tally.worst) < NUM_WORST else heapq.heappushpop
            push(tally.worst, entry)


def _apart(served: Array, trained: Array) -> Array:
    """How far two encoded columns [R, ...] are, float64 [R]: 0 where they are the same.

    Codes by how many differ; numbers by their largest distance.
    """
    assert served.shape == trained.shape
    differs = (served != trained) & ~((served != served) & (trained != trained))
    if served.dtype.kind == "f" or served.ndim == 1:
        with np.errstate(invalid="ignore"):
            distance = np.abs(served.astype(np.float64) - trained.astype(np.float64))
        # NaN beside a number is as far as can be
        size = np.where(differs, np.where(np.isfinite(distance), np.maximum(distance, 5e-324), np.inf), 0.0)
        return np.asarray(size.reshape(len(size), -1).max(axis=1, initial=0.0))
    return np.asarray(differs.reshape(len(differs), -1).sum(axis=1), np.float64)
