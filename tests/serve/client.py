"""A client that calls an app in this process, with the app's start and end around it."""

from __future__ import annotations

import asyncio
from types import TracebackType

import httpx
from starlette.applications import Starlette


class Client:
    """`get` and `post` one after another; use it as a context."""

    def __init__(self, app: Starlette) -> None:
        self._app = app
        self._runner = asyncio.Runner()
        self._http = httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://localhost")

    def get(self, path: str, **options: object) -> httpx.Response:
        return self._runner.run(self._http.get(path, **options))  # type: ignore[arg-type]

    def post(self, path: str, **options: object) -> httpx.Response:
        return self._runner.run(self._http.post(path, **options))  # type: ignore[arg-type]

    async def _enter(self) -> None:
        self._lifespan = self._app.router.lifespan_context(self._app)
        await self._lifespan.__aenter__()

    async def _exit(self) -> None:
        await self._http.aclose()
        await self._lifespan.__aexit__(None, None, None)

    def __enter__(self) -> Client:
        self._runner.run(self._enter())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runner.run(self._exit())
        self._runner.close()
