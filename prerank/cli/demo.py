"""The whole funnel in one command: from tables to winners served in process and over HTTP, with what it measured."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console, Group
from rich.rule import Rule
from rich.text import Text

import prerank
from prerank.bundle.registry import Gate, Registry
from prerank.cli import render
from prerank.cli.progress import progress
from prerank.config import Config, load_config
from prerank.data.check import check
from prerank.data.logs import Tables, open_tables
from prerank.errors import ConfigError, DataError, GateFailed, PrerankError
from prerank.lifecycle.build import evaluate, load_tail, load_users, publish_trained
from prerank.lifecycle.training import Trained, train
from prerank.lifecycle.validate import validate
from prerank.market.generate import generate_market
from prerank.types import Given, Request

MARKET_ADS = 100_000
NUM_REQUESTS = 200
NUM_SHOWN = 3
K = 5
_START_S = 60.0


@dataclass(frozen=True, slots=True)
class Asked:
    """One request taken from the log's last day."""

    user_id: int
    context: dict[str, Given]

    def said(self) -> str:
        """The context in words."""
        return ", ".join(f"{name} {value}" for name, value in self.context.items())


def demo(config_path: Path | None, data: Path | None, store: Path, out: Console, err: Console) -> None:
    """Run everything, print the summary, and write the same to `store`/demo.json."""
    began = time.perf_counter()
    config_path = config_path or _funnel_for(data)
    config = load_config(config_path)
    if data is None:
        data = _market(store, out, err)
    home = store / config.name
    out.print(Rule(f"{config.name}: {config_path} on {data}", style="dim"))
    tables = open_tables(config, data, home / "work")
    _checked(config, tables, out)
    with progress(err) as report:
        trained = train(config, tables, home, report)
        load_users(config, tables, trained.prepared, home, report)
        load_tail(config, tables, trained.prepared, home, report=report)
    quality = evaluate(trained, home)
    version = publish_trained(trained, tables, home, render.plain(quality))
    gates = _promoted(home, version, trained, tables)
    requests = _last_requests(config, tables, NUM_REQUESTS)
    from prerank.serve.funnel import Funnel  # as heavy as a server, so only once there is something to serve
    from prerank.serve.wire import encode_answer

    with Funnel.open(home) as funnel:
        answers = []
        for asked in requests:
            request = Request(asked.user_id, K, int(time.time() * 1000), asked.context)
            start = time.perf_counter()
            answers.append((funnel.recommend(request), (time.perf_counter() - start) * 1000))
    over_http = _over_http(store, config.name, requests)
    told = {
        "funnel": config.name,
        "version": version,
        "sizes": _sizes(trained),
        "quality": render.plain(quality),
        "gates": [render.plain(g) for g in gates],
        "num_requests": len(requests),
        "in_process_ms": _percentiles([ms for _, ms in answers]),
        "http_ms": _percentiles([ms for _, ms in over_http]),
        "stages": render.stage_medians([a for a, _ in answers]),
        "winners": [json.loads(encode_answer(a)) for a, _ in answers[:NUM_SHOWN]],
        "seconds": round(time.perf_counter() - began, 1),
        "prerank": prerank.__version__,
    }
    _same_winners([json.loads(encode_answer(a)) for a, _ in answers], [a for a, _ in over_http])
    shown = list(zip(requests, answers, strict=True))[:NUM_SHOWN]
    path = store / "demo.json"
    path.write_text(json.dumps(told, indent=1))
    sections = [
        render.funnel(told),
        render.quality(quality),
        render.gates(gates),
        *[Group(Text(f"\nuser {asked.user_id}, {asked.said()}"), render.answer(a)) for asked, (a, _) in shown],
        render.next_steps(config_path, data, store, config.name, requests[0].user_id, requests[0].context, path),
    ]
    out.print(Group(*sections))


def _funnel_for(data: Path | None) -> Path:
    """The funnel file a checkout ships for this data: KuaiRand's where its files are, else the market's."""
    root = Path(prerank.__file__).parent.parent
    is_kuairand = data is not None and any(data.glob("impressions_*.parquet")) and any(data.glob("video_features*"))
    path = root / ("examples/kuairand/funnel.toml" if is_kuairand else "funnel.toml")
    if not path.exists():
        raise ConfigError(f"no funnel file at {path.name}: this is no checkout of prerank; name one with --config")
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _market(store: Path, out: Console, err: Console) -> Path:
    folder = store / f"market-{MARKET_ADS}"
    out.print(f"no data was named, so this is a simulated ad market of {MARKET_ADS:,} ads (in {folder})")
    if not (folder / "market.json").exists():
        with progress(err) as report:
            generate_market(
                folder,
                num_ads=MARKET_ADS,
                progress=lambda what, share: report(what, round(100 * share), 100, "%"),
            )
    return folder


def _checked(config: Config, tables: Tables, out: Console) -> None:
    found = check(config, tables)
    if found:
        out.print(render.problems(found))
    if any(p.severity == "error" for p in found):
        raise DataError("the data has errors; mend them, or see `prerank check`")


def _promoted(home: Path, version: str, trained: Trained, tables: Tables) -> list[Gate]:
    gates = validate(home, version, trained.prepared, tables, trained.heavy)
    if not all(gate.holds for gate in gates):
        raise GateFailed(f"{version} stays unpointed: " + "; ".join(render.failed(gates)))
    registry = Registry(home)
    if registry.live() != version:
        registry.promote(version, by="demo", why="every gate holds")
    return gates


def _last_requests(config: Config, tables: Tables, most: int) -> list[Asked]:
    """Different users of the last test day with the context they had, the latest first."""
    names = config.features.columns("context")
    targeted = [name for name in config.targeted("context") if name not in names]
    logged = tables.source("impressions").schema.names  # what targeting alone reads need not be there
    names += [name for name in targeted if name in logged]
    user_id, time_ms = config.data.user_id, config.data.time
    last_day = [config.data.test[1]]
    rows = [row for batch in tables.impressions([user_id, time_ms, *names], last_day) for row in batch.to_pylist()]
    rows.sort(key=lambda row: -row[time_ms])
    latest: dict[int, Asked] = {}
    for row in rows:
        latest.setdefault(row[user_id], Asked(row[user_id], {n: row.get(n) for n in [*names, *targeted]}))
        if len(latest) == most:
            break
    return list(latest.values())


@contextmanager
def _server(store: Path, funnel: str) -> Iterator[str]:
    """`prerank serve` in a process of its own, as a user would start it; gives its address once it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "prerank", "serve", "--store", str(store), "--funnel", funnel, "--port", str(port)]
    log = store / "demo-server.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "NO_COLOR": "1"})
        try:
            address = f"http://127.0.0.1:{port}"
            _wait(address, process, log)
            yield address
        finally:
            process.terminate()
            process.wait(timeout=30)


def _wait(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise PrerankError(f"`prerank serve` ended with {process.returncode}: {log.read_text()[-500:]}")
        try:
            with urllib.request.urlopen(f"{address}/readyz", timeout=1):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.1)
    raise PrerankError(f"`prerank serve` was not ready after {_START_S:.0f} s; see {log}")


def _over_http(store: Path, funnel: str, requests: Sequence[Asked]) -> list[tuple[dict[str, object], float]]:
    """Each request's answer as JSON, and its milliseconds, connection included."""
    answers = []
    with _server(store, funnel) as address:
        for asked in requests:
            body = json.dumps({"user_id": asked.user_id, "context": asked.context, "k": K}).encode()
            headers = {"content-type": "application/json"}
            start = time.perf_counter()
            request = urllib.request.Request(f"{address}/v1/recommend", body, headers)
            with urllib.request.urlopen(request, timeout=10) as response:
                answer = json.load(response)
            answers.append((answer, (time.perf_counter() - start) * 1000))
    return answers


def _same_winners(in_process: Sequence[dict[str, object]], over_http: Sequence[dict[str, object]]) -> None:
    for mine, theirs in zip(in_process, over_http, strict=True):
        if _ids(mine) != _ids(theirs):
            raise PrerankError(f"the server answered {_ids(theirs)} where the process answered {_ids(mine)}")


def _ids(answer: dict[str, object]) -> list[int]:
    winners = answer["winners"]
    assert isinstance(winners, list)
    return [winner["item_id"] for winner in winners]


def _percentiles(milliseconds: Sequence[float]) -> dict[str, float]:
    warm = np.asarray(milliseconds[len(milliseconds) // 10 :])
    return {f"p{p}": round(float(np.percentile(warm, p)), 3) for p in (50, 90, 99)}


def _sizes(trained: Trained) -> dict[str, int]:
    prepared = trained.prepared
    return {
        "items": len(prepared.item_ids),
        "users": len(prepared.user_ids),
        "events": len(prepared.events["day"]),
        "retrieved": trained.config.retrieval.keep,
        "winners": K,
    }
