"""Whichever version is live, as one recommender: another takes its place between two requests.

A request takes the version that serves when it begins and is its user until it ends, so nothing of it is of another;
a version that was left ends with its last user. What loads the next one is `serve.watch`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from prerank.errors import PrerankError
from prerank.kernels.stop import Stop
from prerank.serve.answer import Answer
from prerank.serve.changes import Changed
from prerank.serve.metadata import Described
from prerank.serve.ranking import Ranking
from prerank.serve.recommender import Recommender
from prerank.serve.record import Recorded
from prerank.stores.events import LiveEvent
from prerank.types import Given, ItemChange, Request


@dataclass(frozen=True, slots=True)
class Loads:
    """What came of versions that went live while this process served: how many serve or served, how many could not.

    `last_s` is what loading the last one took, in seconds, until it served. `kept` are in memory though another serves,
    for requests that use them have not ended.
    """

    switched: int = 0
    failed: int = 0
    last_s: float = 0.0
    kept: int = 0


class Held:
    """A version and how many use it."""

    def __init__(self, funnel: Recommender) -> None:
        self.funnel = funnel
        self.num_users = 0
        self.was_left = False
        self.ended = threading.Event()
        """Set when it was left and nobody uses it."""


class LiveVersion:
    """`first`, or the error that kept it from loading, until `switch` gives another. Threads may share one."""

    def __init__(self, first: Recommender | PrerankError) -> None:
        self._lock = threading.Lock()
        self._held = None if isinstance(first, PrerankError) else Held(first)
        self._error = first if isinstance(first, PrerankError) else None
        self._changing = threading.Lock()
        self._noted: set[int] | None = None
        self.loads = Loads()

    @property
    def error(self) -> PrerankError | None:
        """Why no version serves; None where one does."""
        return self._error

    @contextmanager
    def taken(self) -> Iterator[Recommender]:
        """The version that serves now, which is not closed while this lasts. Raises `error` where there is none."""
        with self._lock:
            held = self._now()
            held.num_users += 1
        try:
            yield held.funnel
        finally:
            with self._lock:
                held.num_users -= 1
                if held.was_left and not held.num_users:
                    held.ended.set()

    def note_changes(self) -> None:
        """From here on, note which items change; a version that is read from the disk after this may miss them."""
        with self._changing:
            self._noted = set()

    def note_no_changes(self) -> None:
        """There is no other version that would miss any."""
        with self._changing:
            self._noted = None

    def noted(self) -> set[int]:
        """The items that changed since this or `note_changes` was called."""
        with self._changing:
            found, self._noted = self._noted or set(), set()
            return found

    def switch(self, following: Recommender, catch_up: Callable[[Collection[int]], None]) -> Held | None:
        """Let `following` serve whoever comes from now on; what was left, if anything, which may have users still.

        `catch_up` is called before with the items that changed meanwhile; no item changes until it is done.
        """
        with self._changing:
            catch_up(self._noted or ())
            with self._lock:
                left, self._held, self._error = self._held, Held(following), None
                if left is not None:
                    left.was_left = True
                    if not left.num_users:
                        left.ended.set()
            self._noted = None
            return left

    def end(self) -> Held | None:
        """Answer no more; what served, if anything."""
        with self._lock:
            left, self._held = self._held, None
            self._error = PrerankError("the server has ended")
            return left

    def recommend(self, request: Request, arrived: float | None = None, cancelled: Stop | None = None) -> Answer:
        """See `Funnel.recommend`."""
        with self.taken() as funnel:
            return funnel.recommend(request, arrived, cancelled)

    def describe(self, item_ids: Sequence[int], columns: Sequence[str] | None) -> Described:
        """See `Funnel.describe`."""
        with self.taken() as funnel:
            return funnel.describe(item_ids, columns)

    def record(self, events: Sequence[LiveEvent]) -> Recorded:
        """See `Funnel.record`."""
        with self.taken() as funnel:
            return funnel.record(events)

    def change(self, changes: Sequence[ItemChange]) -> Changed:
        """See `Funnel.change`."""
        with self._changing, self.taken() as funnel:
            if self._noted is not None:
                self._noted.update(one.item_id for one in changes)
            return funnel.change(changes)

    @property
    def version(self) -> str:
        """See `Recommender`, as for all below."""
        return self._now().funnel.version

    @property
    def ranking(self) -> Ranking:
        """The ranking stage alone; take the version, where it must not be left meanwhile."""
        return self._now().funnel.ranking

    @property
    def ranks_by(self) -> str:
        """What ranks."""
        return self._now().funnel.ranks_by

    @property
    def default_deadline_ms(self) -> float:
        """Of a request that names none."""
        return self._now().funnel.default_deadline_ms

    @property
    def example_context(self) -> Mapping[str, Given]:
        """A context that works."""
        return self._now().funnel.example_context

    @property
    def example_events(self) -> Sequence[Mapping[str, object]]:
        """Events that work."""
        return self._now().funnel.example_events

    @property
    def example_items(self) -> Sequence[Mapping[str, object]]:
        """Changes of items that work."""
        return self._now().funnel.example_items

    @property
    def tail_counts(self) -> Mapping[str, int]:
        """What came of candidates that are not resident."""
        return self._now().funnel.tail_counts

    @property
    def free_rows(self) -> int:
        """For how many items that come there is room."""
        return self._now().funnel.free_rows

    @property
    def tail_evictions(self) -> Mapping[str, int]:
        """How many items that are not resident left memory again."""
        return self._now().funnel.tail_evictions

    def _now(self) -> Held:
        held, error = self._held, self._error
        if held is None:
            raise PrerankError("the version has just been left") if error is None else error
        return held
