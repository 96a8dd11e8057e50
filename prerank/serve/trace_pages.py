"""`/v1/trace/{id}` and `/v1/traces` as JSON, and the same as plain pages: a waterfall, and counts that narrow."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from math import floor, log, log10
from urllib.parse import quote

import jinja2
import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from prerank.serve.envelope import Refused
from prerank.serve.graph import StageReport
from prerank.serve.traces import Trace, TraceBody, Traces, TracesBody
from prerank.serve.whole import BY_SIMILARITY, Whole

_WAIT, _SEND, _NEVER = "waited for a worker", "made the answer", "no stage began"
_RANKS = ("rank", "rank_by_similarity")
_LEAST_SHARE = 0.004  # of the lane, so that a stage that took nothing is still seen
_SELF_CONTAINED = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"}


@dataclass(frozen=True, slots=True)
class Bar:
    """One row of the waterfall: when it began and how long it took, also as shares of the whole request."""

    name: str
    kind: str
    start_ms: float
    ms: float
    counts: str
    left: float
    width: float


@dataclass(frozen=True, slots=True)
class Level:
    """How many were left at one point of the funnel; `width` is a share of the widest, on a logarithm's scale."""

    name: str
    num: int
    width: float
    passed: str


def waterfall(trace: Trace) -> list[Bar]:
    """A bar for each stage that ran, between what came before the first and after the last."""
    began = trace.ms if trace.began_ms is None else trace.began_ms
    rows = [(_NEVER if trace.began_ms is None else _WAIT, "around", 0.0, began, "")]
    for stage in trace.stages:
        kind = "fallback" if stage.name in (_RANKS[1], BY_SIMILARITY) else "stage"
        rows.append((stage.name, kind, began + stage.start_ms, stage.ms, f"{stage.num_in:,} in, {stage.num_out:,} out"))
    if trace.stages and trace.error is None:
        done = max(began + stage.start_ms + stage.ms for stage in trace.stages)
        rows.append((_SEND, "around", done, max(0.0, trace.ms - done), ""))
    whole = max([trace.ms, *(start + ms for _, _, start, ms, _ in rows)]) or 1.0
    return [
        Bar(name, kind, start, ms, counts, start / whole, max(ms / whole, _LEAST_SHARE))
        for name, kind, start, ms, counts in rows
    ]


def narrowing(stages: Sequence[StageReport]) -> list[Level]:
    """Items, those eligible, candidates, those ranked and winners: as many of these as the stages that ran tell."""
    by_name = {stage.name: stage for stage in stages}
    counts: list[tuple[str, int]] = []
    if target := by_name.get("target"):
        counts += [("items", target.num_in), ("eligible", target.num_out)]
    # of several generators, what they found together
    if found := by_name.get("merge", by_name.get("retrieve")):
        counts.append(("candidates", found.num_out))
    if whole := by_name.get(Whole.name, by_name.get(BY_SIMILARITY)):
        counts += [("items", whole.num_in), ("winners", whole.num_out)]
    if rank := next((by_name[name] for name in _RANKS if name in by_name), None):
        fetched = by_name.get("fetch_tail") if rank.name == _RANKS[0] else None
        counts += [("ranked", rank.num_in if fetched is None else fetched.num_out), ("winners", rank.num_out)]
    most = log(1 + max([1, *(num for _, num in counts)]))
    levels, before = [], None
    for name, num in counts:
        passed = "" if before is None else _share(num, before)
        levels.append(Level(name, num, log(1 + num) / most, passed))
        before = num
    return levels


def ticks(ms: float) -> list[tuple[str, float]]:
    """Four to ten round times up to `ms`, each with its share of it."""
    if ms <= 0:
        return []
    step = next(s for s in (m * 10.0 ** floor(log10(ms) - 1) for m in (1, 2, 5, 10)) if ms / s <= 10)
    return [(f"{n * step:g}", min(1.0, n * step / ms)) for n in range(int(ms / step + 1e-9) + 1)]


def trace_routes(traces: Traces, check: Callable[[Mapping[str, str]], None]) -> list[Route]:
    """What a server shows of `traces`, to whom `check` lets by a request's headers: they tell of users."""
    shown = _Shown(traces)

    def route(path: str, show: Callable[[HttpRequest], Awaitable[Response]]) -> Route:
        async def checked(http: HttpRequest) -> Response:
            check(http.headers)
            return await show(http)

        return Route(path, checked)

    return [
        route("/v1/traces", shown.list_json),
        route("/v1/trace/{request_id:path}", shown.one_json),  # an id may hold a slash
        route("/traces", shown.list_page),
        route("/trace/{request_id:path}", shown.one_page),
    ]


class _Shown:
    def __init__(self, traces: Traces) -> None:
        self._traces = traces
        self._pages = jinja2.Environment(
            loader=jinja2.PackageLoader("prerank.serve", "pages"), autoescape=True, undefined=jinja2.StrictUndefined
        )
        self._pages.filters |= {"moment": _moment, "id_path": lambda text: quote(text, safe="")}

    async def list_json(self, _: HttpRequest) -> Response:
        return Response(msgspec.json.encode(TracesBody.of(self._traces)), media_type="application/json")

    async def one_json(self, http: HttpRequest) -> Response:
        return Response(msgspec.json.encode(TraceBody.of(self._found(http))), media_type="application/json")

    async def list_page(self, _: HttpRequest) -> Response:
        latest = self._traces.latest()
        longest = max([1e-9, *(trace.ms for trace in latest)])
        return self._page("traces.html", {"traces": latest, "longest": longest, "most": self._traces.most})

    async def one_page(self, http: HttpRequest) -> Response:
        trace = self._found(http)
        bars = waterfall(trace)
        whole = max([trace.ms, *(bar.start_ms + bar.ms for bar in bars)])
        late = None if trace.deadline_ms is None or trace.deadline_ms > whole else trace.deadline_ms / whole
        return self._page(
            "trace.html",
            {
                "trace": trace,
                "bars": bars,
                "levels": narrowing(trace.stages),
                "ticks": ticks(whole),
                "deadline": late,
            },
        )

    def _found(self, http: HttpRequest) -> Trace:
        request_id = http.path_params["request_id"]
        trace = self._traces.get(request_id)
        if trace is None:
            kept = f"the latest {self._traces.most} are kept" if self._traces.most else "none are kept: --traces is 0"
            raise Refused(404, "NotFound", f"trace {request_id!r}: expected the id of a recent request; {kept}")
        return trace

    def _page(self, name: str, said: Mapping[str, object]) -> Response:
        return HTMLResponse(self._pages.get_template(name).render(said), headers=_SELF_CONTAINED)


def _share(num: int, of: int) -> str:
    return "" if not of else f"{100 * num / of:.3g}%"


def _moment(time_ms: int) -> str:
    now = datetime.fromtimestamp(time.time(), UTC).date()
    moment = datetime.fromtimestamp(time_ms / 1000, UTC)
    return moment.strftime("%H:%M:%S" if moment.date() == now else "%Y-%m-%d %H:%M:%S") + f".{time_ms % 1000:03d} UTC"
