"""A user's record as bytes, read back: the same in every store of users, as `stores.user_file` lays it out."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import numpy as np

from prerank.errors import DataError
from prerank.stores.records import UserRecord
from prerank.stores.user_file import FORMAT, HEAD, PROFILE, Format, Meta, event_bytes
from prerank.types import Given


def read_meta(plain: bytes | memoryview[int], where: str, again: str) -> Meta:
    """What holds for every record of a store. Raises DataError for damage and another format; `again` says what to
    do."""
    try:
        found_format = msgspec.msgpack.decode(plain, type=Format).format
        if found_format != FORMAT:
            raise DataError(f"{where}: expected user store format {FORMAT}, found {found_format}; {again}")
        return msgspec.msgpack.decode(plain, type=Meta)
    except msgspec.DecodeError as error:
        raise DataError(f"{where}: the user store is damaged: {error}; {again}") from None


class UserRecords:
    """Reads the records of the store that `meta` is of, which is called `where`; `again` says what to do about damage.

    Threads may share one.
    """

    def __init__(self, meta: Meta, where: str, again: str) -> None:
        self._profile = msgspec.msgpack.Decoder(PROFILE)
        self._user_id, self._stored, self._num_contexts = meta.user_id, meta.columns, len(meta.contexts)
        self._where, self._again = where, again

    def record(self, user_id: int, value: bytes | None) -> UserRecord | None:
        """The whole record; None of none. Raises DataError where it is damaged."""
        if value is None:
            return None
        profile = self._decoded(user_id, value)
        num_events, num_rows = HEAD.unpack_from(value)[0], 3 + self._num_contexts
        columns = np.frombuffer(value, "<i8", num_rows * num_events, HEAD.size).reshape(num_rows, num_events)
        return UserRecord(
            profile=profile,
            item_ids=columns[0],
            time_ms=columns[1],
            known_ms=columns[2],
            flags=np.frombuffer(value, "<u4", num_events, HEAD.size + columns.nbytes),
            contexts=columns[3:].T,
        )

    def profile(self, user_id: int, value: bytes | None) -> Mapping[str, Given] | None:
        """The profile alone; None of none. Raises DataError where the record is damaged."""
        return None if value is None else self._decoded(user_id, value)

    def _decoded(self, user_id: int, value: bytes) -> dict[str, Given]:
        """The profile of a record, all of whose lengths fit."""
        num_events, num_bytes = HEAD.unpack_from(value) if len(value) >= HEAD.size else (0, 0)
        profile_at = HEAD.size + num_events * event_bytes(self._num_contexts)
        if len(value) != profile_at + num_bytes:
            raise DataError(f"{self._where}: the record of user {user_id} is damaged; {self._again}")
        try:
            profile = dict(zip(self._stored, self._profile.decode(value[profile_at:]), strict=True))
        except ValueError as error:  # msgspec's DecodeError is one
            raise DataError(
                f"{self._where}: the profile of user {user_id} is damaged: {error}; {self._again}"
            ) from None
        return {self._user_id: user_id, **profile}
