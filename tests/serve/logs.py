"""A log of requests of the tiny world, made by a server as a user's is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from prerank.serve.http import create_app
from prerank.serve.recommender import Recommender
from prerank.serve.request_log import LogOptions
from prerank.serve.seeing import Sight
from prerank.stores.request_files import read_requests, request_files
from prerank.stores.requests import LoggedRequest
from tests.serve import world
from tests.serve.client import Client

NOW = world.T0 + 10_000
BODY: Mapping[str, object] = {"user_id": 1, "k": 3, "context": {"hour": 1, "surface": "feed"}, "time_ms": NOW}
BODIES: Sequence[Mapping[str, object]] = [
    BODY,
    {**BODY, "user_id": 2, "k": 5, "exclude": [107]},
    {**BODY, "user_id": 404, "time_ms": world.T0 + 2500},
    {**BODY, "time_ms": world.T0 + 2500, "context": {"hour": 7, "surface": "story"}},
]


def log(funnel: Recommender, folder: Path, bodies: Sequence[Mapping[str, object]] = BODIES) -> list[dict]:
    """The answers to `bodies`, whose requests are r0, r1, ...; all of them are logged in `folder`."""
    sight = Sight(requests=LogOptions(folder, share=1.0))
    with Client(create_app(funnel, sight=sight)) as client:
        answers = [
            client.post("/v1/recommend", json=body, headers={"x-request-id": f"r{n}"}) for n, body in enumerate(bodies)
        ]
    return [one.json() for one in answers]


def read(folder: Path) -> list[LoggedRequest]:
    return list(read_requests(request_files(folder)))
