"""Events that came since the log was loaded: one LMDB file that is appended to while it is read.

The key is as the user store's, the value as `stores.event_rows` has it. `stores.redis_events` is the same in Redis.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import lmdb

from prerank.errors import DataError
from prerank.stores.environments import SharedEnvironment, share_to_write
from prerank.stores.event_rows import MOST_KEPT, EventMeta, EventRows
from prerank.stores.event_rows import LiveEvent as LiveEvent
from prerank.stores.user_file import META, id_of, key_of
from prerank.types import Array

_MAP_BYTES = 1 << 36  # address space, not disk: the file is as long as what is in it
_USERS_A_SWEEP = 4096
_LOAD = "load the log again (prerank publish) and promote the version, whose server forgets what the log has by then"
_AGAIN = "move it away to start an empty one: what came since the log was loaded is lost with it"


class EventStore:
    """An open store. Threads and processes may share one: they read at once and write in turn."""

    def __init__(
        self, shared: SharedEnvironment, path: Path, names: Sequence[str], contexts: Sequence[str], most_kept: int
    ) -> None:
        self._shared: SharedEnvironment | None = shared
        self._path = path
        with shared.env.begin(write=True) as transaction:
            meta = _meta(transaction, path)
            meta.grow(names, contexts, str(path), _AGAIN)
            transaction.put(META, meta.encoded())
        self._rows = EventRows(meta, contexts, most_kept, str(path), _AGAIN)
        self.names, self.contexts = self._rows.names, self._rows.contexts

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
        num_repeated = 0
        try:
            with self._env.begin(write=True) as transaction:
                for user_id, come in self._rows.of(events).items():
                    key = key_of(user_id)
                    merged, num_again = self._rows.merged(transaction.get(key), come, user_id)
                    num_repeated += num_again
                    if merged is not None:
                        transaction.put(key, merged)
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
        return self._rows.read(value, user_id)

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
            transaction.put(META, meta.encoded())
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

    def _sweep_some(self, transaction: lmdb.Transaction, key: bytes, until_ms: int) -> tuple[int, bytes | None]:
        """Sweep the users from `key` on; how many events went, and the key to go on at, None after the last."""
        with transaction.cursor() as cursor:
            pairs = cursor.iternext() if cursor.set_range(key) else iter(())
            found = [(bytes(this), bytes(value)) for this, value in islice(pairs, _USERS_A_SWEEP + 1)]
        num_swept = 0
        for this, value in found[:_USERS_A_SWEEP]:
            if this == META:
                continue
            left, num = self._rows.swept(value, until_ms, id_of(this))
            num_swept += num
            if left is None:
                transaction.delete(this)
            elif num:
                transaction.put(this, left)
        return num_swept, found[-1][0] if len(found) > _USERS_A_SWEEP else None


def _meta(transaction: lmdb.Transaction, path: Path) -> EventMeta:
    plain = transaction.get(META)
    if plain is not None:
        return EventMeta.read(plain, str(path), _AGAIN)
    if transaction.stat()["entries"]:
        raise DataError(f"{path}: an LMDB file, but not a store of events: it has no {META.decode()!r}; {_AGAIN}")
    return EventMeta.new()
