"""How long from trained models of a million ads to a served answer, in how much memory, and how long is a request?

Each step runs in a process of its own, so its memory is its own; the server is `prerank serve`, asked from here over
one kept connection. Requests are the last day's, each with the context it had.
"""

from __future__ import annotations

import http.client
import json
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow.parquet as pq

from benchmarks.machine import REPOSITORY, in_own_process, memory_of, say
from benchmarks.result import Row
from benchmarks.run import Measured, Options, run
from benchmarks.server import server
from prerank.bundle.registry import Registry
from prerank.config import Config, parse_config
from prerank.data.logs import open_tables
from prerank.lifecycle.build import load_users, publish_trained
from prerank.lifecycle.training import train
from prerank.lifecycle.validate import validate
from prerank.market.generate import generate_market

NUM_ADS, QUICK_ADS = 1_000_000, 20_000
NUM_REQUESTS, WARM_UP = 400, 40
K = 10
PUBLISH_AND_SERVE_BAR_S, MEMORY_BAR_GIB = 180.0, 6.0


def measure(options: Options, ceilings: Mapping[str, float]) -> Measured:
    num_ads = QUICK_ADS if options.quick else NUM_ADS
    with TemporaryDirectory() as folder:
        root = Path(folder)
        say(f"market_serving: generating {num_ads:,} ads, then training one epoch of each model")
        generate_market(root / "market", num_ads=num_ads)
        trained = in_own_process(_train, root)
        say("market_serving: publishing and validating")
        published = in_own_process(_publish, root)
        promoted = in_own_process(_promote, root)
        rows = [
            Row.of("prepare and train one epoch", trained.seconds, "s", num_ads),
            Row.of("prepare and train: peak memory", trained.peak_gib, "GiB", num_ads),
            Row.of("publish, users loaded", published.seconds, "s", num_ads),
            Row.of("publish: peak memory", published.peak_gib, "GiB", num_ads),
            Row.of("validate and promote", promoted.seconds, "s", num_ads),
            Row.of("validate and promote: peak memory", promoted.peak_gib, "GiB", num_ads),
        ]
        rows += _serving(root, num_ads, published.seconds, max(published.peak_gib, promoted.peak_gib))
        config = {"ads": num_ads, "keep": _config().retrieval.keep, "k": K, "requests": NUM_REQUESTS, "epochs": 1}
    return Measured(rows, config)


def _serving(root: Path, num_ads: int, publish_s: float, publish_gib: float) -> Iterator[Row]:
    requests = _requests(root / "market")
    started = time.perf_counter()
    with server(root / "store") as (port, pid):
        ready_s = time.perf_counter() - started
        say(f"market_serving: {len(requests)} requests over HTTP")
        times, answers = _ask(port, requests)
        server_gib = memory_of("VmHWM", pid) / 2**30
    total = Row.of("publish and start serving", publish_s + ready_s, "s", num_ads)
    memory = Row.of("publish and serve: largest process", max(publish_gib, server_gib), "GiB", num_ads)
    yield Row.of("start serving, until ready", ready_s, "s", num_ads)
    yield Row.of("serve: peak memory", server_gib, "GiB", num_ads)
    yield replace(total, bar=PUBLISH_AND_SERVE_BAR_S, holds=publish_s + ready_s <= PUBLISH_AND_SERVE_BAR_S)
    yield replace(memory, bar=MEMORY_BAR_GIB, holds=max(publish_gib, server_gib) <= MEMORY_BAR_GIB)
    yield Row.timed("request over HTTP", times[WARM_UP:], num_ads)
    for place, stage in enumerate(answers[0]["stages"]):
        warm = [answer["stages"][place] for answer in answers[WARM_UP:]]
        yield Row.timed(
            f"stage {stage['name']}", [one["ms"] for one in warm], round(sum(o["out"] for o in warm) / len(warm))
        )


def _config() -> Config:
    plain = tomllib.loads((REPOSITORY / "funnel.toml").read_text(encoding="utf-8"))
    plain["retrieval"]["epochs"] = 1
    plain["ranker"] = {"model": "two_tower", "epochs": 1}  # what is measured is everything around the ranker
    plain["validate"] = {"golden": {"at_least": 1.0}}
    return parse_config(plain, where="funnel.toml")


def _train(root: Path) -> int:
    config = _config()
    home = root / "store" / config.name
    trained = train(config, open_tables(config, root / "market", home / "work"), home)
    return len(trained.prepared.item_ids)


def _publish(root: Path) -> int:
    config = _config()
    home = root / "store" / config.name
    tables = open_tables(config, root / "market", home / "work")
    trained = train(config, tables, home)  # found done: its checkpoint is read
    load_users(config, tables, trained.prepared, home)
    publish_trained(trained, tables, home, {})
    return len(trained.prepared.item_ids)


def _promote(root: Path) -> int:
    config = _config()
    home = root / "store" / config.name
    registry = Registry(home)
    version = registry.versions()[-1].version
    tables = open_tables(config, root / "market", home / "work")
    trained = train(config, tables, home)
    gates = validate(home, version, trained.prepared, tables)
    registry.promote(version, by="benchmark", why="")
    return len(gates)


def _requests(market: Path) -> list[bytes]:
    log = pq.read_table(market / "impressions.parquet", columns=["user_id", "surface", "hour"])
    rows = log.slice(log.num_rows - NUM_REQUESTS).to_pylist()
    return [
        json.dumps({"user_id": r["user_id"], "k": K, "context": {"surface": r["surface"], "hour": r["hour"]}}).encode()
        for r in rows
    ]


def _ask(port: int, requests: Sequence[bytes]) -> tuple[list[float], list[dict[str, list[dict[str, float]]]]]:
    """Milliseconds of each request, and its answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    times, answers = [], []
    for body in requests:
        start = time.perf_counter()
        connection.request("POST", "/v1/recommend", body, {"content-type": "application/json"})
        content = connection.getresponse().read()
        times.append(1000 * (time.perf_counter() - start))
        answers.append(json.loads(content))
    connection.close()
    return times, answers


def main() -> None:
    run("market_serving", __doc__ or "", measure)


if __name__ == "__main__":
    main()
