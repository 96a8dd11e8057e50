"""The ranking stage alone: candidates that somebody else retrieved in, the winners out.

The same user, items and scorer as in a whole request; who may be shown was the retrieval's to ask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from prerank._toml import nearest
from prerank.bundle.judge import Ranked
from prerank.bundle.load import Bundle
from prerank.bundle.readers import Readers
from prerank.errors import RequestError
from prerank.features.transforms import Transforms
from prerank.serve.answer import check_request
from prerank.serve.device_engines import LoadedVersion
from prerank.serve.expand import ExpandUser
from prerank.serve.tail import Tail
from prerank.serve.threads import settle
from prerank.types import CandidateSet, Features, Given, Request

PADDING = -1
"""The item_id that is no item: it fills requests of fewer candidates than the longest, and answers of fewer winners."""
MOST_USERS = 256
"""The most users one call may rank for."""
MOST_CANDIDATES = 1 << 20
"""The most candidates one call may bring, padding included."""
_AT_ONCE = 1 << 16  # candidates that are ranked together; a ranker's activations of more would not fit a small machine


@dataclass(frozen=True, slots=True)
class Asker:
    """For whom one row of candidates is ranked, as of `time_ms`.

    `user_id` is looked up in the store; None is a user with no past. What `profile` says by column counts in place of
    what the store has. `context` is a request's.
    """

    time_ms: int
    user_id: int | None = None
    profile: Mapping[str, Given] = field(default_factory=dict)
    context: Mapping[str, Given] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RankedItems:
    """`winners` [B, k], and what was odd about each row of candidates.

    num_unknown int64 [B] of the item_ids are none of this version's; is_unknown_user bool [B], of whom neither the
    store nor the caller knows a profile.
    """

    winners: Ranked
    num_unknown: Tensor
    is_unknown_user: Tensor


class Ranking:
    """The ranking stage of a loaded version. Threads may share one; each call computes on the thread that makes it."""

    def __init__(
        self,
        bundle: Bundle,
        expand: ExpandUser,
        tail: Tail | None,
        readers: Readers,
        max_k: int,
        device: LoadedVersion | None = None,
    ) -> None:
        self.name, self.version, self.max_k = bundle.config.name, bundle.version, max_k
        self.tasks = bundle.scorer.ranker.tasks
        self.values = bundle.scorer.utility.values
        self._scorer, self._expand, self._tail, self._readers = bundle.scorer, expand, tail, readers
        self._rank = bundle.scorer.rank if device is None else device.rank

    @property
    def transforms(self) -> Transforms:
        """What reads profiles and contexts."""
        return self._expand.transforms

    def rank(self, item_ids: Tensor, askers: Sequence[Asker], k: int, values: Features | None = None) -> RankedItems:
        """item_ids int64 [B, N] and B askers -> the k of highest utility of each row, as `Scorer.rank` says.

        PADDING and ids of no item of this version are not ranked; an id given twice is ranked twice. `values`, float
        [B, N] by the name of an item value that the utility reads, count in place of the items' own.
        Raises RequestError naming what is wrong: too much of it, a `k` out of its range, a value no utility reads, a
        profile's or a context's column.
        """
        settle()
        values = values or {}
        self._check(item_ids, askers, k, values)
        items = self._scorer.items
        with torch.inference_mode(), self._readers.reading():
            expanded = [self._features(asker) for asker in askers]
            is_item = item_ids != PADDING
            rows = items.rows_of(item_ids)
            valid = is_item & (rows >= 0)
            step = max(1, _AT_ONCE // item_ids.shape[1])
            ranked = []
            for start in range(0, len(askers), step):
                part = slice(start, start + step)
                own = {name: column[part].float() for name, column in values.items()}
                candidates = CandidateSet(rows[part], torch.zeros(rows[part].shape), valid[part], values=own)
                if self._tail is not None:
                    candidates = self._tail.locate(candidates)
                user = _joined([features for features, _ in expanded[part]])
                ranked.append(self._rank(self._scorer.ranker.user_side(user), candidates, k))
            winners = {f.name: torch.cat([getattr(one, f.name) for one in ranked]) for f in fields(Ranked)}
            return RankedItems(
                winners=Ranked(**winners),
                num_unknown=(is_item & ~valid).sum(1),
                is_unknown_user=torch.tensor([is_unknown for _, is_unknown in expanded]),
            )

    def _features(self, asker: Asker) -> tuple[Features, bool]:
        """The asker's features, leading shape [1], and whether nothing was known of his profile."""
        record = None if asker.user_id is None else self._expand.users.get(asker.user_id)
        if asker.profile:
            record = self._expand.said(record, asker.profile)
        features, _ = self._expand.expand(record, _request(asker, 1))
        return features, record is None or not record.profile

    def _check(self, item_ids: Tensor, askers: Sequence[Asker], k: int, values: Features) -> None:
        assert item_ids.dtype == torch.int64
        assert item_ids.shape[0] == len(askers)
        check_size(*item_ids.shape)
        for asker in askers:
            check_request(_request(asker, k), self.max_k)
        for name, column in values.items():
            if name not in self.values:
                raise RequestError(f"{name}: expected one of {list(self.values)}{nearest(name, self.values)}")
            assert column.shape == item_ids.shape


def check_size(num_users: int, num: int) -> None:
    """Raises RequestError for more or fewer users, or candidates of each, than one call may rank."""
    if not 1 <= num_users <= MOST_USERS:
        raise RequestError(f"item_ids: expected 1 to {MOST_USERS} rows, one a user, got {num_users}")
    if not 1 <= num <= MOST_CANDIDATES // num_users:
        most = f"at most {MOST_CANDIDATES:,} in all"
        raise RequestError(f"item_ids: expected 1 candidate a row or more, {most}, got {num_users:,} x {num:,}")


def _request(asker: Asker, k: int) -> Request:
    return Request(asker.user_id or 0, k, asker.time_ms, asker.context)


def _joined(parts: Sequence[Features]) -> dict[str, Tensor]:
    """Features of one user each -> those of all, leading shape [B]."""
    return {name: torch.cat([one[name] for one in parts]) for name in parts[0]}
