"""What a server needs of a funnel, and nothing else of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from prerank.kernels.stop import Stop
from prerank.serve.answer import Answer
from prerank.serve.changes import Changed
from prerank.serve.metadata import Described
from prerank.serve.ranking import Ranking
from prerank.serve.record import Recorded
from prerank.stores.events import LiveEvent
from prerank.types import Given, ItemChange, Request


class Recommender(Protocol):
    """One version that answers; `serve.funnel.Funnel` is one, and so is `LiveVersion`, which is one after another."""

    @property
    def version(self) -> str:
        """The version every answer is of."""
        ...

    @property
    def ranks_by(self) -> str:
        """What ranks: a level of the native kernels, or "torch"."""
        ...

    @property
    def default_deadline_ms(self) -> float:
        """The deadline of a request that names none."""
        ...

    @property
    def example_context(self) -> Mapping[str, Given]:
        """A context that works, one value a field."""
        ...

    @property
    def example_events(self) -> Sequence[Mapping[str, object]]:
        """Events that work, as `POST /v1/events` takes them."""
        ...

    @property
    def example_items(self) -> Sequence[Mapping[str, object]]:
        """Changes of items that work, as `POST /v1/items` takes them."""
        ...

    @property
    def tail_counts(self) -> Mapping[str, int]:
        """What came of candidates that are not resident, by outcome; nothing where all are."""
        ...

    @property
    def free_rows(self) -> int:
        """For how many items that come, or are written anew, there is room."""
        ...

    @property
    def tail_evictions(self) -> Mapping[str, int]:
        """How many items that are not resident left memory again, by why; nothing where all are resident."""
        ...

    @property
    def ranking(self) -> Ranking:
        """The ranking stage alone."""
        ...

    def describe(self, item_ids: Sequence[int], columns: Sequence[str] | None) -> Described:
        """Metadata of items; see `Funnel.describe`."""
        ...

    def recommend(self, request: Request, arrived: float | None = None, cancelled: Stop | None = None) -> Answer:
        """The winners; see `Funnel.recommend`."""
        ...

    def record(self, events: Sequence[LiveEvent]) -> Recorded:
        """Keep what happened; see `Funnel.record`."""
        ...

    def change(self, changes: Sequence[ItemChange]) -> Changed:
        """Change items; see `Funnel.change`."""
        ...
