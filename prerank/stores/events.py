"""Events that came since the log was loaded: one LMDB file that is appended to while it is read.

The key is as the user store's; the value is a byte, how many context columns C its rows have, and the user's latest
events as rows of `row_of(C)`, oldest first. An event's name, and a context column, is a place in this file's own lists,
which only grow, so that a user store with other labels or columns reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from hashlib import blake2b
from itertools import islice
from pathlib import Path

import lmdb
import msgspec
import numpy as np

from prerank.errors import DataError
from prerank.stores.contexts import UNKNOWN, digest
from prerank.stores.environments import SharedEnvironment, share_to_write
from prerank.stores.records import BEFORE_ALL_MS
from prerank.stores.user_file import META, Format, id_of, key_of
from prerank.types import Array, Given

FORMAT = 1
MOST_KEPT = 1_000
"""The latest events of a user that are kept; the log has the rest when it is loaded again."""
MOST_NAMES = 255

_MAP_BYTES = 1 << 36  # address space, not disk: the file is as long as what is in it
_USERS_A_SWEEP = 4096
_LOAD = "load the log again (prerank publish) and promote the version, whose server forgets what the log has by then"
_AGAIN = "move it away to start an empty one: what came since the log was loaded is lost with it"


@dataclass(frozen=True, slots=True)
class LiveEvent:
    """What one user did with one item at `time_ms` (UTC): `event` is "impression" or a label.

    A second event of the user with the same `event_id` is the first one sent again; an empty one is nobody's.
    `context` is that of the request that the item was shown for, by column, as far as it is known.
    """

    user_id: int
    item_id: int
    event: str
    time_ms: int
    event_id: str = ""
    context: Mapping[str, Given] = field(default_factory=dict)


@cache
def row_of(num_contexts: int) -> np.dtype[np.void]:
    """One event: 25 bytes, and 8 a context column.

    `digest` is that of the event_id, 0 without one; `event` a place in `EventStore.names`; `contexts` int64 [C], in the
    order of `EventStore.contexts`, the digest of each value, 0 where it is not known.
    """
    plain = [("item_id", "<i8"), ("time_ms", "<i8"), ("digest", "<u8"), ("event", "u1")]
    return np.dtype([*plain, ("contexts", "<i8", (num_contexts,))])


class _Meta(msgspec.Struct):
    format: int
    names: list[str]
    swept_ms: int
    contexts: list[str] = []


class EventStore:
    """An open store. Threads and processes may share one: they read at once and write in turn."""

    def __init__(
        self, shared: SharedEnvironment, path: Path, names: Sequence[str], contexts: Sequence[str], most_kept: int
    ) -> None:
        self._shared: SharedEnvironment | None = shared
        self._path = path
        self._most_kept = most_kept
        with shared.env.begin(write=True) as transaction:
            meta = _meta(transaction, path)
            meta.names += [name for name in names if name not in meta.names]
            meta.contexts += [column for column in contexts if column not in meta.contexts]
            for what, found in (("names of events", meta.names), ("context columns", meta.contexts)):
                if len(found) > MOST_NAMES:
                    raise DataError(f"{path}: expected at most {MOST_NAMES} {what} ever; {_AGAIN}")
            transaction.put(META, msgspec.msgpack.encode(meta))
        self.names: tuple[str, ...] = tuple(meta.names)
        self.contexts: tuple[str, ...] = tuple(meta.contexts)
        self._place = {name: place for place, name in enumerate(self.names)}
        self._kept_columns = frozenset(contexts)

    @classmethod
    def open(
        cls, path: Path, names: Sequence[str], contexts: Sequence[str] = (), most_kept: int = MOST_KEPT
    ) -> EventStore:
        """The store at `path`, made if there is none, for events of these `names`; `most_kept` a user.

        Of an event's context the columns `contexts` are kept, each an integer, text, a boolean or None.
        Raises DataError if the file cannot be written, is damaged or of another format.
        """
        try:
            shared = share_to_write(path, _MAP_BYTES)
        except (lmdb.Error, OSError) as error:
            raise DataError(
                f"{path}: expected a store of events that can be written (one LMDB file): {error}"
            ) from None
        try:
            expected, found = shared.promised_bytes, shared.num_bytes
            if found < expected:
                raise DataError(
                    f"{path}: expected {expected} bytes of events, found {found}: it is cut short; {_AGAIN}"
                )
            return cls(shared, path, names, contexts, most_kept)
        except lmdb.Error as error:
            shared.release()
            raise DataError(f"{path}: the store of events is damaged: {error}; {_AGAIN}") from None
        except BaseException:
            shared.release()
            raise

    def append(self, events: Sequence[LiveEvent]) -> int:
        """Add all or none; on the disk when this returns. How many were sent before, by their event_id.

        Of one user the latest `most_kept` by time stay; of the same millisecond, those that came last. Raises DataError
        if there is no room, or what is there is damaged.
        """
        by_user: dict[int, list[tuple[int, int, int, int, tuple[int, ...]]]] = {}
        for one in events:
            row = (one.item_id, one.time_ms, _digest(one.event_id), self._place[one.event], self._contexts_of(one))
            by_user.setdefault(one.user_id, []).append(row)
        num_repeated = 0
        try:
            with self._env.begin(write=True) as transaction:
                for user_id, rows in by_user.items():
                    key = key_of(user_id)
                    before = self._rows(transaction.get(key), user_id)
                    fresh = _fresh(before, np.array(rows, row_of(len(self.contexts))))
                    num_repeated += len(rows) - len(fresh)
                    if len(fresh):
                        transaction.put(key, _packed(self._kept(before, fresh)))
        except lmdb.MapFullError:
            raise DataError(f"{self._path}: {_MAP_BYTES} bytes of events are there, and no more fit; {_LOAD}") from None
        except lmdb.Error as error:
            raise DataError(f"{self._path}: the events could not be written: {error}") from None
        return num_repeated

    def get(self, user_id: int) -> Array:
        """The user's rows [E], oldest first; none of a user without. Raises DataError on damage.

        They are of `row_of` as many columns as there were when the user last had an event, the first of `contexts`; or
        more, where another process knows more.
        """
        try:
            with self._env.begin() as transaction:
                value = transaction.get(key_of(user_id))
        except lmdb.Error as error:
            raise DataError(f"{self._path}: the store of events is damaged: {error}; {_AGAIN}") from None
        return self._rows(value, user_id)

    def sweep(self, until_ms: int) -> int:
        """Forget what happened until then, in passes short enough to write between. How many events that were."""
        with self._env.begin() as transaction:
            if _meta(transaction, self._path).swept_ms >= until_ms:
                return 0
        num_swept = 0
        key: bytes | None = b""
        while key is not None:
            with self._env.begin(write=True) as transaction:
                num, key = self._sweep_some(transaction, key, until_ms)
                num_swept += num
        with self._env.begin(write=True) as transaction:
            meta = _meta(transaction, self._path)
            meta.swept_ms = max(meta.swept_ms, until_ms)
            transaction.put(META, msgspec.msgpack.encode(meta))
        return num_swept

    def close(self) -> None:
        """Let go of the file; the store answers no more."""
        if self._shared is not None:
            self._shared.release()
            self._shared = None

    @property
    def _env(self) -> lmdb.Environment:
        assert self._shared is not None, "the store is closed"
        return self._shared.env

    def _rows(self, value: bytes | None, user_id: int) -> Array:
        if not value:
            return np.zeros(0, row_of(0))
        row = row_of(value[0])
        if (len(value) - 1) % row.itemsize:
            raise DataError(f"{self._path}: the events of user {user_id} are damaged; {_AGAIN}")
        return np.frombuffer(value, row, offset=1)

    def _contexts_of(self, one: LiveEvent) -> tuple[int, ...]:
        if not one.context:
            return (UNKNOWN,) * len(self.contexts)
        return tuple(digest(one.context.get(name)) if name in self._kept_columns else UNKNOWN for name in self.contexts)

    def _kept(self, before: Array, fresh: Array) -> Array:
        num_contexts = max(_num_contexts(before), _num_contexts(fresh))
        rows = np.concatenate([_widened(before, num_contexts), _widened(fresh, num_contexts)])
        return np.asarray(rows[np.argsort(rows["time_ms"], kind="stable")][-self._most_kept :])

    def _sweep_some(self, transaction: lmdb.Transaction, key: bytes, until_ms: int) -> tuple[int, bytes | None]:
        """Sweep the users from `key` on; how many events went, and the key to go on at, None after the last."""
        with transaction.cursor() as cursor:
            pairs = cursor.iternext() if cursor.set_range(key) else iter(())
            found = [(bytes(this), bytes(value)) for this, value in islice(pairs, _USERS_A_SWEEP + 1)]
        num_swept = 0
        for this, value in found[:_USERS_A_SWEEP]:
            if this == META:
                continue
            rows = self._rows(value, id_of(this))
            later = rows[rows["time_ms"] > until_ms]
            num_swept += len(rows) - len(later)
            if not len(later):
                transaction.delete(this)
            elif len(later) < len(rows):
                transaction.put(this, _packed(later))
        return num_swept, found[-1][0] if len(found) > _USERS_A_SWEEP else None


def _meta(transaction: lmdb.Transaction, path: Path) -> _Meta:
    plain = transaction.get(META)
    if plain is None:
        if transaction.stat()["entries"]:
            raise DataError(f"{path}: an LMDB file, but not a store of events: it has no {META.decode()!r}; {_AGAIN}")
        return _Meta(FORMAT, [], BEFORE_ALL_MS)
    try:
        found = msgspec.msgpack.decode(plain, type=Format).format
        if found != FORMAT:
            raise DataError(f"{path}: expected event store format {FORMAT}, found {found}; {_AGAIN}")
        return msgspec.msgpack.decode(plain, type=_Meta)
    except msgspec.DecodeError as error:
        raise DataError(f"{path}: the store of events is damaged: {error}; {_AGAIN}") from None


def _num_contexts(rows: Array) -> int:
    return int(rows["contexts"].shape[1])


def _packed(rows: Array) -> bytes:
    return bytes([_num_contexts(rows)]) + rows.tobytes()


def _widened(rows: Array, num_contexts: int) -> Array:
    """The rows with more context columns, of which nothing is known."""
    found = _num_contexts(rows)
    if found == num_contexts:
        return rows
    wide = np.zeros(len(rows), row_of(num_contexts))
    for name in ("item_id", "time_ms", "digest", "event"):
        wide[name] = rows[name]
    wide["contexts"][:, :found] = rows["contexts"]
    return wide


def _digest(event_id: str) -> int:
    """64 bits of the id, never 0; two of the few ids a user has kept agree by chance once in 10^14 events."""
    if not event_id:
        return 0
    return int.from_bytes(blake2b(event_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()) or 1


def _fresh(before: Array, come: Array) -> Array:
    """Those of the rows that come whose event_id neither was there before nor came earlier."""
    named = come["digest"] != 0
    if not named.any():
        return come
    is_first = np.zeros(len(come), bool)
    is_first[np.unique(come["digest"], return_index=True)[1]] = True
    again = named & (~is_first | np.isin(come["digest"], before["digest"]))
    return np.asarray(come[~again])
