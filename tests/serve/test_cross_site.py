"""What a page of another site can do to a server on the same machine, in a real browser."""

from __future__ import annotations

import json

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse
from starlette.routing import Route

from prerank.serve.http import create_app
from tests.serve.fake import FakeFunnel
from tests.serve.server import listening
from tests.serve.test_trace_page import CHROMIUM, chromium

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

ITEM = json.dumps({"items": [{"item_id": 5, "on": False}]})
NAMES = "--host-resolver-rules=MAP evil.example 127.0.0.1"
"""A name that others own and that leads here: what DNS rebinding does."""


def page(address: str) -> Route:
    """One whose script changes an item at this address, as a page may that never asks whether it may."""
    script = f"""<script>
    fetch("{address}/v1/items", {{ method: "POST", mode: "no-cors", body: {json.dumps(ITEM)} }})
      .then(() => document.body.append("asked"), () => document.body.append("could not ask"))
    </script>"""

    async def show(_: Request) -> HTMLResponse:
        return HTMLResponse(f"<body>{script}</body>")

    return Route("/page", show)


def test_a_page_of_another_site_asks_and_changes_nothing_and_one_of_the_servers_own_does() -> None:
    funnel = FakeFunnel()
    app = create_app(funnel)
    with listening(app) as address, listening(Starlette(routes=[page(address)])) as other:
        for site in (other, other.replace("127.0.0.1", "evil.example")):
            assert "asked" in chromium("--virtual-time-budget=5000", NAMES, "--dump-dom", f"{site}/page")
        metrics = httpx.get(f"{address}/metrics").text
        assert 'prerank_errors_total{type="CrossSite"} 2.0' in metrics, "they came"
        assert not funnel.changed
        app.router.routes.insert(0, page(address))
        assert "asked" in chromium("--virtual-time-budget=5000", "--dump-dom", f"{address}/page")
        assert [one.item_id for one in funnel.changed] == [5]


def test_a_name_that_leads_here_reads_no_traces_and_changes_nothing() -> None:
    funnel = FakeFunnel()
    app = create_app(funnel)
    with listening(app) as address:
        rebound = address.replace("127.0.0.1", "evil.example")
        app.router.routes.insert(0, page(rebound))
        httpx.post(f"{address}/v1/recommend", json={"user_id": 987, "k": 1})
        (trace,) = httpx.get(f"{address}/v1/traces").json()["traces"]
        for path in ("/v1/traces", f"/v1/trace/{trace['request_id']}"):
            told = chromium(NAMES, "--dump-dom", f"{rebound}{path}")
            assert "CrossSite" in told
            assert "987" not in told
        chromium("--virtual-time-budget=5000", NAMES, "--dump-dom", f"{rebound}/page")
        assert not funnel.changed
