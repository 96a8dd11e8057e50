"""The logged requests that a training reads: encoded once, and which impressions each was answered with."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa

from prerank.errors import DataError
from prerank.features.histories import Timeline
from prerank.features.reading import is_text, texts
from prerank.stores.request_files import read_requests
from prerank.train.served import ServedFeatures
from prerank.train.spool import Spool
from prerank.types import Array, Columns, Report

_USER, _TIME, _ID = "__user__", "__time_ms__", "__id__"  # beside features of any name
_SKIPPED = "skipped.json"
_AT_ONCE = 1024


class ServedLog:
    """Encoded requests in `folder`, ordered by user, then time.

    `features` [R, ...] are of all that could be read, `skipped` how many could not, by why.
    """

    def __init__(self, folder: Path, num_users: int) -> None:
        self._num_users = num_users
        columns = {file.stem: np.load(file, mmap_mode="r") for file in sorted(folder.glob("*.npy"))}
        none = np.zeros(0, np.int64)
        self._user, self._time_ms, self._ids = (columns.pop(name, none) for name in (_USER, _TIME, _ID))
        self.features: Columns = columns
        self.skipped: Mapping[str, int] = json.loads((folder / _SKIPPED).read_text())
        self._line = Timeline.build(num_users, self._user, self._time_ms, np.zeros(len(self._user), np.int32))
        self._by_id = np.argsort(self._ids, kind="stable")

    @classmethod
    def write(
        cls, files: Sequence[Path], served: ServedFeatures, user_ids: Array, folder: Path, report: Report
    ) -> ServedLog:
        """That of the log's `files`, written to `folder`; users are positions in `user_ids` int64 [U], ascending."""
        folder.mkdir()
        spool, skipped, num = Spool(folder, (_USER, _TIME)), Counter[str](), 0
        requests = read_requests(files)
        while some := list(islice(requests, _AT_ONCE)):
            num += len(some)
            encoded = served.encode(some)
            skipped.update(encoded.skipped)
            if encoded.requests:
                ids = np.array([one.user_id for one in encoded.requests], np.int64)
                user = np.searchsorted(user_ids, ids).clip(max=len(user_ids) - 1)
                known = np.flatnonzero(user_ids[user] == ids)
                if len(known) < len(ids):
                    skipped["the users table does not have the user"] += len(ids) - len(known)
                columns = {name: column[known] for name, column in encoded.features.items()}
                columns[_USER] = user[known]
                columns[_TIME] = np.array([one.time_ms for one in encoded.requests], np.int64)[known]
                columns[_ID] = np.array([_digest(one.request_id) for one in encoded.requests], np.int64)[known]
                spool.append(columns)
            report("encode logged requests", num, 0, "requests")
        report("encode logged requests", num, num, "requests")
        if spool.num_rows:
            spool.write_sorted("order logged requests", report)
        (folder / _SKIPPED).write_text(json.dumps(dict(skipped.most_common())))
        return cls(folder, len(user_ids))

    @property
    def num_requests(self) -> int:
        """How many there are of which features could be made."""
        return len(self._user)

    def of_moments(self, user: Array, time_ms: Array) -> Array:
        """int32 [B]: the place of the request of each user int [B] at that very moment int64 [B], -1 without one."""
        user = np.asarray(user, np.int64)
        end = self._line.ends(user, time_ms + 1)
        return np.where(end > self._line.ends(user, time_ms), end - 1, -1).astype(np.int32)

    def of_ids(self, request_ids: pa.Array, user: Array) -> Array:
        """int32 [B]: the place of the request of each id, if it was that user's, int [B]; -1 without one.

        Raises DataError where the ids are not text.
        """
        if not is_text(request_ids.type) and not pa.types.is_null(request_ids.type):
            raise DataError(f"[data].request_id: expected a column of text, got {request_ids.type}")
        distinct, places = texts(request_ids)
        if not self.num_requests:
            return np.full(len(places), -1, np.int32)
        wanted = np.array([0 if one is None else _digest(one) for one in distinct], np.int64)[places]
        ordered = self._ids[self._by_id]
        # of a request that was sent twice, the later one
        at = np.searchsorted(ordered, wanted, side="right") - 1
        place = self._by_id[at.clip(min=0)]
        same = (at >= 0) & (self._ids[place] == wanted) & (self._user[place] == user)
        return np.where(same, place, -1).astype(np.int32)


def _digest(request_id: str) -> int:
    """int64 of an id, never 0, which is no id's."""
    plain = request_id.encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(plain, digest_size=8).digest(), "little", signed=True) or 1
