"""A funnel that needs no version, and what every error of its server looks like."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import httpx
import msgspec

from prerank.kernels.stop import Stop
from prerank.serve.answer import Answer, Winner, check_request
from prerank.serve.changes import Changed
from prerank.serve.graph import StageReport
from prerank.serve.metadata import Described
from prerank.serve.record import Recorded, check_events
from prerank.stores.events import LiveEvent
from prerank.types import ItemChange, Request

MAX_K = 100


@dataclass
class FakeFunnel:
    """Answers k winners numbered from 0, and keeps every request and event; `before` may raise or wait."""

    before: Callable[[Request], None] = lambda _: None
    version: str = "20220501T0000-abc"
    ranks_by: str = "avx2"
    tail_counts: dict[str, int] = field(default_factory=lambda: {"slot": 3, "late": 1})
    free_rows: int = 7
    tail_evictions: dict[str, int] = field(default_factory=lambda: {"stale": 5, "room": 2})
    default_deadline_ms: float = 250.0
    example_context: dict[str, str | int] = field(default_factory=lambda: {"hour": 1, "page": '<"top">'})
    example_events: tuple[dict[str, str | int], ...] = ({"user_id": 1, "item_id": 5, "event": "impression"},)
    example_items: tuple[dict[str, int | bool], ...] = ({"item_id": 5, "on": False},)
    degraded: bool = False
    cancelled: Stop | None = None
    asked: list[Request] = field(default_factory=list)
    happened: list[LiveEvent] = field(default_factory=list)
    changed: list[ItemChange] = field(default_factory=list)

    def describe(self, item_ids: Sequence[int], columns: Sequence[str] | None) -> Described:
        return Described(self.version, [{"title": f"item {one}"} if one < 10 else None for one in item_ids])

    def change(self, changes: Sequence[ItemChange]) -> Changed:
        self.changed += changes
        return Changed(len(changes), 1, 7)

    def recommend(self, request: Request, arrived: float | None = None, cancelled: Stop | None = None) -> Answer:
        assert arrived is not None
        assert 0 <= time.perf_counter() - arrived < 60
        check_request(request, MAX_K)
        self.asked.append(request)
        self.cancelled = cancelled
        self.before(request)
        winners = [Winner(n, 2.5, {"click": 0.25}, msgspec.Raw(b'{"title":"item %d"}' % n)) for n in range(request.k)]
        stages = [StageReport("retrieve", 2.0004, 500, 100), StageReport("rank", 1.0, 100, request.k, 2.0)]
        return Answer(request.request_id, self.version, winners, stages, self.degraded, ["a note"])

    def record(self, events: Sequence[LiveEvent]) -> Recorded:
        check_events(events, ["impression", "is_click"], time.time_ns() // 1_000_000)
        self.happened += events
        return Recorded(len(events), unknown_items=1, repeated=2, already_logged=3)


def error_of(response: httpx.Response) -> tuple[int, str, str]:
    """Status, type and message, once the error has the one form and no stack trace."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"type", "message", "request_id"}
    assert "Traceback" not in response.text
    assert body["error"]["request_id"] == response.headers["x-request-id"]
    return response.status_code, body["error"]["type"], body["error"]["message"]
