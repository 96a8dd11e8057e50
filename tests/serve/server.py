"""A server that listens, in this process: for tests of what only a real connection shows."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.applications import Starlette


@contextmanager
def listening(app: Starlette) -> Iterator[str]:
    """The address of `app`, served by a thread."""
    with running(uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))) as (address, _):
        yield address


@contextmanager
def running(server: uvicorn.Server) -> Iterator[tuple[str, threading.Thread]]:
    """The address of a server of port 0, and the thread that it is run by."""
    server.config.timeout_graceful_shutdown = 10
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", thread
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive()
