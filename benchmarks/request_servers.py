"""Our server around an empty model beside FastAPI, LitServe and Ray Serve around the same, each in its own process."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.machine import REPOSITORY, say, times_ms
from benchmarks.result import Row
from benchmarks.server import free_port, is_ready
from benchmarks.serving_world import ask

CALLS, QUICK_CALLS = 3_000, 60
BODY = json.dumps({"user_id": 1, "k": 20, "context": {}}).encode()
WINNERS = """
WINNERS = [
    {"item_id": n, "utility_micros": 2.5 * n, "prob": {"click": 0.25},
     "metadata": {"advertiser_id": n, "title": f"title {n}", "format": "image"}, "found_by": ["index"]}
    for n in range(20)
]
STAGES = [{"name": f"stage {n}", "start_ms": 0.0, "ms": 0.0, "in": 1, "out": 1} for n in range(4)]
ANSWER = {"request_id": "r", "version": "v", "winners": WINNERS, "stages": STAGES, "degraded": False, "notes": []}
"""
_OURS = """
import sys, uvicorn
from benchmarks.serving_world import Ready
from prerank.serve.http import create_app
uvicorn.run(create_app(Ready()), port=int(sys.argv[1]), access_log=False, log_level="warning")
"""
_FASTAPI = (
    WINNERS
    + """
import sys, uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
class Body(BaseModel):
    user_id: int
    k: int
    context: dict[str, str | int | float | bool | None] = {}
app = FastAPI()
@app.post("/v1/recommend")
def recommend(body: Body):
    return ANSWER
@app.get("/readyz")
def ready():
    return "ok"
uvicorn.run(app, port=int(sys.argv[1]), access_log=False, log_level="warning")
"""
)
_LITSERVE = (
    WINNERS
    + """
import sys
import litserve
class Empty(litserve.LitAPI):
    def setup(self, device):
        pass
    def decode_request(self, request):
        return request["user_id"]
    def predict(self, user_id):
        return ANSWER
    def encode_response(self, answer):
        return answer
if __name__ == "__main__":
    server = litserve.LitServer(Empty(api_path="/v1/recommend"), accelerator="cpu", healthcheck_path="/readyz")
    server.run(port=int(sys.argv[1]), log_level="warning", generate_client_file=False)
"""
)
_RAY = (
    WINNERS
    + """
import sys, time
import ray
from ray import serve
@serve.deployment
class Empty:
    async def __call__(self, request):
        if request.method == "POST":
            await request.json()
            return ANSWER
        return "ok"
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
serve.run(Empty.bind(), route_prefix="/")
while True:
    time.sleep(1)
"""
)
SERVERS = {"prerank": ("prerank", _OURS), "FastAPI": ("fastapi", _FASTAPI), "LitServe": ("litserve", _LITSERVE)}
SERVERS["Ray Serve"] = ("ray", _RAY)
_READY_S, _TRIES = 90.0, 3


def server_rows(is_quick: bool) -> Iterator[Row]:
    """Round trips over one kept connection to each, by turns in blocks; a server that cannot run says why."""
    calls = QUICK_CALLS if is_quick else CALLS
    ports: dict[str, int] = {}
    with ExitStack() as running, TemporaryDirectory() as folder:
        for name, (module, code) in SERVERS.items():
            say(f"request_path: starting {name}")
            try:
                if find_spec(module) is None:
                    raise RuntimeError("it is not installed")
                ports[name] = running.enter_context(_server(code, Path(folder) / f"{module}_server.py"))
            except RuntimeError as error:
                yield Row.skipped(f"empty model, {name}", str(error))
        times: dict[str, list[float]] = {name: [] for name in ports}
        for turn in range(11):
            for name, port in ports.items():  # a connection a turn, for idle ones are closed
                with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
                    work = partial(ask, connection, "POST", "/v1/recommend", BODY)
                    spent = times_ms(work, calls // 10, warm_up=5)
                times[name] += spent if turn else []  # the first is to warm up
    for name, spent in times.items():
        yield Row.timed(f"empty model, {name}", spent, 20)
    for name, spent in times.items():
        for percentile in (50, 99) if name != "prerank" else ():
            ratio = float(np.percentile(times["prerank"], percentile) / np.percentile(spent, percentile))
            row = Row.of(f"empty model: prerank over {name}, p{percentile}", ratio, "times", 20)
            yield replace(row, bar=1.0, holds=ratio < 1.0)


@contextmanager
def _server(code: str, path: Path) -> Iterator[int]:
    path.write_text(code, encoding="utf-8")
    process, port = _started(path)
    try:
        yield port
    finally:
        _end(process)


def _started(path: Path) -> tuple[subprocess.Popen[bytes], int]:
    """A server and its port; another where a part of it took that for itself, as Ray's do."""
    for _ in range(_TRIES):
        port = free_port()
        process = subprocess.Popen(
            [sys.executable, str(path), str(port)],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            deadline = time.monotonic() + _READY_S
            while not is_ready(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"it did not start (exit status {process.poll()})")
                time.sleep(0.05)
        except http.client.HTTPException:
            _end(process)
        except BaseException:
            _end(process)
            raise
        else:
            return process, port
    raise RuntimeError(f"something else listened on each of {_TRIES} ports that were free")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
