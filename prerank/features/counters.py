"""What this user did lately on what the candidate is by: the events of a window, cut strictly before a moment.

Training asks for millions of moments of all users, serving for one of one user; both run this file. The candidate is
not known here: its `by` is looked up among the codes by `models.matching`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prerank.features.histories import Timeline
from prerank.schema import Counter
from prerank.types import Array


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """Users in one context value each, as if they were users: `keys` int64 [P], distinct and ascending.

    An unknown value (0) is nobody's.
    """

    keys: Array
    num_codes: int

    @classmethod
    def build(cls, user: Array, code: Array, num_codes: int) -> Pairs:
        """Those of events: user int [E], code int [E] of a context category with `num_codes` rows."""
        known = np.asarray(code) > 0
        return cls(np.unique(_pair(user[known], code[known], num_codes)), num_codes)

    def place(self, user: Array, code: Array) -> Array:
        """int64 [B]: the pair's position, -1 for one that no event had, for nobody (-1) and for an unknown value."""
        wanted = _pair(user, code, self.num_codes)
        if not len(self.keys):
            return np.full(len(wanted), -1, dtype=np.int64)
        place = np.searchsorted(self.keys, wanted).clip(max=len(self.keys) - 1)
        return np.where((self.keys[place] == wanted) & (user >= 0) & (np.asarray(code) > 0), place, -1)


def _pair(user: Array, code: Array, num_codes: int) -> Array:
    found: Array = np.asarray(user, dtype=np.int64) * num_codes + code
    return found


def counted(counter: Counter, num_users: int, user: Array, time_ms: Array, codes: Array | None) -> Timeline:
    """What a counter reads, of events: user int [E], time_ms int64 [E], `by` codes int [E] or of a bag [E, M].

    For a counter `on` something a user is a place of `Pairs`, and -1 is left out. `codes` are not read, and may be
    None, where `by` is empty. Members of a bag become events of their own.
    """
    if counter.on and len(user) and user.min() < 0:
        kept = np.flatnonzero(user >= 0)
        user, time_ms, codes = user[kept], time_ms[kept], None if codes is None else codes[kept]
    if not counter.by or codes is None:
        assert not counter.by, "a counter by something reads its codes"
        return Timeline.build(num_users, user, time_ms, np.zeros(len(user), dtype=np.int32))
    if codes.ndim == 1:
        return Timeline.build(num_users, user, time_ms, codes)
    row, slot = np.nonzero(codes >= 0)
    return Timeline.build(num_users, user[row], time_ms[row], codes[row, slot])


def reads_shown(counter: Counter) -> bool:
    """Whether a counter looks at the impressions beside what it counts."""
    return bool(counter.last) or counter.share


def encode(counter: Counter, line: Timeline, shown: Timeline | None, user: Array, time_ms: Array) -> Array:
    """The counter's feature for users int [B] (-1 is nobody) at moments int64 [B].

    `line` is what `counted` gave, `shown` the users' impressions, of a counter `on` something those on it, and None
    where it does not read them. With a `by` int32 [B, length], the codes of the latest events, newest last, -1 on the
    left where fewer; without one int32 [B], how many events there were. Of a share float32 [B], their log odds among
    the impressions; 0 where there was nothing.
    """
    since = (
        time_ms - counter.window_ms if not counter.last else _seen(shown).moment_of_last(user, time_ms, counter.last)
    )
    end, start = line.ends(user, time_ms), line.ends(user, since)
    if counter.by:
        return line.gather(user, end, counter.length, start)
    number: Array = (end - start).astype(np.int32)
    if not counter.share:
        return number
    return _log_odds(number, _seen(shown).ends(user, time_ms) - _seen(shown).ends(user, since))


def _seen(shown: Timeline | None) -> Timeline:
    assert shown is not None, "see reads_shown"
    return shown


def _log_odds(happened: Array, shown: Array) -> Array:
    """The empirical logit log (h + 1/2) / (n - h + 1/2) of h in n, float32 (Cox & Snell 1989, Binary Data, 2.1).

    A label may be known in a window that its impression is not in: then there are more of them than impressions.
    """
    missed = np.maximum(shown - happened, 0)
    odds: Array = np.log((happened + 0.5) / (missed + 0.5)).astype(np.float32)
    return odds
