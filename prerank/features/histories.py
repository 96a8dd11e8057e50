"""What each user did before a moment: events in time order, one slice a user, cut strictly before.

Training asks for millions of moments of all users, serving for one of one user; both run this file.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prerank.types import Array

_CELLS_AT_ONCE = 1 << 20
_LONG_AGO_MS = np.int64(-(1 << 62))


@dataclass(frozen=True, slots=True, eq=False)
class Timeline:
    """Events of one kind of U users; user u's are offsets[u]:offsets[u + 1], oldest first.

    offsets int64 [U+1]; time_ms int64 [E]; values int32 [E], an encoded item feature. Events of the same millisecond
    keep the order they came in.
    """

    offsets: Array
    time_ms: Array
    values: Array

    @classmethod
    def build(cls, num_users: int, user: Array, time_ms: Array, values: Array) -> Timeline:
        """Events in any order: user int [E] in 0..num_users-1, time_ms int64 [E], values int [E]."""
        assert user.shape == time_ms.shape == values.shape
        if num_users == 1:  # as when serving
            assert not user.any(), "every event is some user's"
            return cls._of_one(time_ms, values)
        assert not len(user) or (user.min() >= 0 and user.max() < num_users), "every event is some user's"
        if not _in_order(user, time_ms):
            order = np.lexsort((time_ms, user))
            user, time_ms, values = user[order], time_ms[order], values[order]
        offsets = np.zeros(num_users + 1, dtype=np.int64)
        np.cumsum(np.bincount(user, minlength=num_users), out=offsets[1:])
        return cls(offsets, time_ms.astype(np.int64, copy=False), values.astype(np.int32, copy=False))

    @classmethod
    def _of_one(cls, time_ms: Array, values: Array) -> Timeline:
        if not (time_ms[1:] >= time_ms[:-1]).all():
            order = np.argsort(time_ms, kind="stable")
            time_ms, values = time_ms[order], values[order]
        offsets = np.array([0, len(time_ms)], dtype=np.int64)
        return cls(offsets, time_ms.astype(np.int64, copy=False), values.astype(np.int32, copy=False))

    def ends(self, user: Array, time_ms: Array) -> Array:
        """int64 [B]: one past the last event strictly before `time_ms` int64 [B] in the slice of `user` int [B].

        User -1 is nobody, whose slice is empty.
        """
        if len(self.offsets) == 2:  # one user, as when serving
            assert user.max(initial=-1) < 1, "a user is a position in this timeline"
            return np.where(user < 0, 0, np.searchsorted(self.time_ms, time_ms, side="left"))
        start, stop = self._slices(user)
        longest = int((stop - start).max(initial=0))
        if not longest:
            return start
        # bisection of all slices at once: `end` only ever moves past events known to be before the moment
        end = start.copy()
        step = 1 << (longest.bit_length() - 1)
        while step:
            probe = end + step
            last = np.minimum(probe, stop) - 1
            np.maximum(last, 0, out=last)
            before = self.time_ms[last] < time_ms
            before &= probe <= stop
            end += before * step
            step >>= 1
        return end

    def before(self, user: Array, time_ms: Array, length: int) -> Array:
        """int32 [B, L]: the last `length` values strictly before `time_ms`, newest last, -1 on the left where fewer."""
        return self.gather(user, self.ends(user, time_ms), length)

    def moment_of_last(self, user: Array, time_ms: Array, number: int) -> Array:
        """int64 [B]: when the `number`th last event strictly before `time_ms` was; long ago where there were fewer."""
        place = self.ends(user, time_ms) - number
        known = place >= self._slices(user)[0]
        if not len(self.time_ms):
            return np.full(len(user), _LONG_AGO_MS)
        return np.where(known, self.time_ms[np.maximum(place, 0)], _LONG_AGO_MS)

    def gather(self, user: Array, ends: Array, length: int, first: Array | None = None) -> Array:
        """int32 [B, L]: `before`, from the positions int64 [B] that `ends` gave; none before positions `first`."""
        start = self._slices(user)[0] if first is None else first
        out = np.full((len(user), length), -1, dtype=np.int32)
        if not len(self.values):
            return out
        if len(user) == 1:  # as when serving
            end = int(ends[0])
            begin = max(int(start[0]), end - length)
            out[0, length - max(end - begin, 0) :] = self.values[begin:end]
            return out
        back = np.arange(-length, 0)
        rows = max(1, _CELLS_AT_ONCE // max(length, 1))  # pieces that stay in the cache
        for begin in range(0, len(user), rows):
            piece = slice(begin, begin + rows)
            places = ends[piece, None] + back
            taken = places >= start[piece, None]
            np.maximum(places, 0, out=places)
            np.copyto(out[piece], self.values[places], where=taken)
        return out

    def _slices(self, user: Array) -> tuple[Array, Array]:
        """Start and stop int64 [B] of each user's slice."""
        assert user.min(initial=0) >= -1, "a user is a position, or -1 for nobody"
        assert user.max(initial=-1) < len(self.offsets) - 1, "a user is a position in this timeline"
        # -1 becomes the empty slice from 0 to offsets[0], which is 0
        return self.offsets.take(user, mode="clip"), self.offsets.take(user + 1)


def _in_order(user: Array, time_ms: Array) -> bool:
    """Whether events are by user, then time, already, as a prepared log's are."""
    later = user[1:] > user[:-1]
    later |= (user[1:] == user[:-1]) & (time_ms[1:] >= time_ms[:-1])
    return bool(later.all())
