"""The commands that serve a version, ask one, and tell what servers were used for."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from prerank.bundle.manifest import CONFIG as CONFIG_FILE
from prerank.bundle.manifest import METADATA
from prerank.bundle.registry import Registry
from prerank.cli import render, requests
from prerank.cli.device import (
    DeviceDtype,
    DeviceNames,
    DeviceShards,
    DeviceWaitMs,
    DeviceWhole,
    DeviceWorkers,
    Dtype,
    placed,
)
from prerank.cli.options import (
    CONFIG,
    DATA,
    STORE,
    ConfigPath,
    DataFolder,
    FunnelName,
    HostsCa,
    HostsCert,
    HostsKey,
    StoreFolder,
    TailUrl,
    UsersUrl,
    err,
    found_in,
    home_of,
    live_of,
    out,
    resolved,
)
from prerank.cli.progress import progress
from prerank.config import load_config
from prerank.data.logs import open_tables
from prerank.errors import RequestError
from prerank.stores.metadata import MetadataTable
from prerank.stores.reads import FILE as READS
from prerank.stores.reads import ReadCounts
from prerank.types import Given, Request

serving = typer.Typer()
audit = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
serving.add_typer(audit, name="audit", help="Tell what a store's servers were used for.")


@serving.command()
def serve(
    store: StoreFolder = STORE,
    funnel: FunnelName = "",
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")] = 8000,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Native threads that rank; one a core by default, 0 lets torch rank.")
    ] = None,
    device: DeviceNames = [],  # noqa: B006 - typer reads the default
    device_workers: DeviceWorkers = 2,
    device_wait_ms: DeviceWaitMs = 0.2,
    device_dtype: DeviceDtype = Dtype.BFLOAT16,
    device_whole: DeviceWhole = False,
    device_shards: DeviceShards = False,
    threads: Annotated[
        int, typer.Option(min=1, max=1024, help="Requests that run at once; more where they wait for a --device.")
    ] = 2,
    tail: TailUrl = None,
    users: UsersUrl = None,
    grpc_port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="The port for the Open Inference Protocol over gRPC; none by default."),
    ] = None,
    admin_token_file: Annotated[
        Path | None,
        typer.Option(help="A file with the token that events, items and traces need; or set PRERANK_ADMIN_TOKEN."),
    ] = None,
    allow_host: Annotated[
        list[str],
        typer.Option(help="A name beside localhost that a server without a token may be called by; repeat."),
    ] = [],  # noqa: B006 - typer reads the default
    linger_s: Annotated[
        float, typer.Option(min=0, help="Seconds to say not ready before ending, for a load balancer to see.")
    ] = 0.0,
    traces: Annotated[int, typer.Option(min=0, help="How many of the latest requests are kept for /traces.")] = 256,
    lines: Annotated[float, typer.Option(min=0, max=1, help="The share of requests that get a line on stderr.")] = 0.0,
    index_hosts: Annotated[
        str | None,
        typer.Option(help="Index hosts: 0=host:port|host:port,1=... or a file with a shard a line; none by default."),
    ] = None,
    least_shards: Annotated[
        int, typer.Option(min=0, help="How many shards of the index hosts must answer for /readyz to say ready.")
    ] = 1,
    hosts_ca: HostsCa = None,
    hosts_cert: HostsCert = None,
    hosts_key: HostsKey = None,
    otel: Annotated[
        bool | None,
        typer.Option(help="Send OpenTelemetry spans; by default where OTEL_EXPORTER_OTLP_ENDPOINT is set."),
    ] = None,
    log_requests: Annotated[
        Path | None,
        typer.Option(help="A folder to log requests in, as answered: Parquet files to replay and train on."),
    ] = None,
    sample: Annotated[float, typer.Option(min=0, max=1, help="The share of requests that is logged.")] = 0.01,
    log_gb: Annotated[
        float | None, typer.Option(min=0, help="The oldest files of the log go when all take more; by default none.")
    ] = None,
    log_days: Annotated[
        float | None, typer.Option(min=0, help="A file of the log goes when it is so old; by default none.")
    ] = None,
) -> None:
    """Serve the live version over HTTP, and each that is promoted later.

    POST /v1/recommend answers; /docs describes it. The ranking stage alone is under /v2.
    """
    from prerank.serve.host_tls import CallerTls
    from prerank.serve.http import Limits  # the HTTP stack is only needed here
    from prerank.serve.http import serve as serve_http
    from prerank.serve.request_log import LogOptions
    from prerank.serve.seeing import Sight

    most_bytes = None if log_gb is None else int(log_gb * 1e9)
    logged = None if log_requests is None else LogOptions(log_requests, sample, most_bytes, log_days)
    sight = Sight(traces, lines, requests=logged)
    home = found_in(store, funnel)
    with placed(device, device_workers, device_wait_ms, device_dtype, device_whole, device_shards) as on_device:
        serve_http(
            home,
            host=host,
            port=port,
            limits=Limits(threads=threads),
            workers=workers,
            device=on_device,
            tail=tail,
            users=users,
            token_file=admin_token_file,
            linger_s=linger_s,
            grpc_port=grpc_port,
            sight=sight,
            index_hosts=index_hosts,
            least_shards=least_shards,
            hosts_tls=CallerTls.read(hosts_ca, hosts_cert, hosts_key),
            otel=otel,
            allow_hosts=allow_host,
        )


@serving.command()
def recommend(
    user: Annotated[int, typer.Option("--user", "-u", help="A user_id; one nobody knows is served as a new user.")],
    k: Annotated[int, typer.Option("-k", help="How many winners.")] = 10,
    context: Annotated[list[str], typer.Option("--context", "-x", help="name=value, once for each field.")] = [],  # noqa: B006 - typer reads the default
    exclude: Annotated[list[int], typer.Option("--exclude", "-e", help="An item_id that must not win; repeat.")] = [],  # noqa: B006 - typer reads the default
    store: StoreFolder = STORE,
    funnel: FunnelName = "",
    tail: TailUrl = None,
    users: UsersUrl = None,
    device: DeviceNames = [],  # noqa: B006 - typer reads the default
    device_whole: DeviceWhole = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer as the server would send it.")] = False,
) -> None:
    """Answer for one user, without a server."""
    from prerank.serve.funnel import Funnel
    from prerank.serve.wire import encode_answer

    home = found_in(store, funnel)
    with (
        placed(device, whole=device_whole) as on_device,
        Funnel.open(home, tail=tail, users=users, device=on_device) as opened,
    ):
        said = dict(_field(one) for one in context)
        now_ms = int(time.time() * 1000)
        answer = opened.recommend(Request(user, k, now_ms, said, exclude=tuple(exclude)))
    if as_json:
        print(json.dumps(json.loads(encode_answer(answer)), indent=1))
    else:
        out.print(render.answer(answer))


@serving.command()
def replay(
    folder: Annotated[Path, typer.Argument(help="A folder that `prerank serve --log-requests` wrote.")],
    version: Annotated[str, typer.Option("--version", help="The version to ask; by default the live one.")] = "",
    limit: Annotated[int, typer.Option(min=1, help="The most requests to ask, the oldest first.")] = 10_000,
    store: StoreFolder = STORE,
    funnel: FunnelName = "",
    tail: TailUrl = None,
    users: UsersUrl = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Ask a version the requests of a log again, with the features as served, and compare its winners.

    Of the same version they are the same, unless items changed since: bids, pacing, switches.
    """
    home = found_in(store, funnel)
    chosen = resolved(Registry(home), version) if version else None
    with progress(err) as report:
        told = requests.replay_log(folder, home, chosen, tail, users, limit, report)
    if as_json:
        print(json.dumps(render.plain(told), indent=1))
    else:
        out.print(requests.replayed(told), highlight=False)


@audit.command("metadata")
def audit_metadata(store: StoreFolder = STORE, funnel: FunnelName = "") -> None:
    """Tell which columns of metadata were ever read, and what each takes.

    Counted by every server of the store: by name in requests and in POST /v1/metadata, or sent for want of a choice.
    """
    found = found_in(store, funnel)
    path = Registry(found).path(live_of(Registry(found)))
    config, table = load_config(path / CONFIG_FILE), MetadataTable.open(path / METADATA)
    counts = ReadCounts.open(found / READS)
    try:
        out.print(render.reads(config.metadata, table, counts.all()))
    finally:
        counts.close()


@audit.command("skew")
def audit_skew(
    folder: Annotated[Path, typer.Argument(help="A folder that `prerank serve --log-requests` wrote.")],
    config: ConfigPath = CONFIG,
    data: DataFolder = DATA,
    store: StoreFolder = STORE,
    limit: Annotated[int, typer.Option(min=1, help="The most requests to compare, the oldest first.")] = 100_000,
    at_least: Annotated[
        float | None, typer.Option(min=0, max=1, help="Exit code 1 where a feature agrees in a smaller share.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Tell which features were served otherwise than training makes them of the tables, for the same user and moment.

    Feature by feature how often they agree, and the worst examples.
    """
    read = load_config(config)
    work = home_of(store, read.name) / "work"
    tables = open_tables(read, data, work)
    with progress(err) as report:
        told = requests.skew_of(folder, tables, work, limit, report)
    if as_json:
        print(json.dumps(render.plain(told), indent=1))
    else:
        out.print(requests.skew(told), highlight=False)
    if at_least is not None and any(one.agreement is not None and one.agreement < at_least for one in told.features):
        raise typer.Exit(1)


def _field(said: str) -> tuple[str, Given]:
    """name=value, the value as JSON where it reads as JSON and as text where not."""
    name, equals, value = said.partition("=")
    if not equals:
        raise RequestError(f"--context {said!r}: expected name=value")
    try:
        plain = json.loads(value)
    except ValueError:
        plain = value
    return name, plain if isinstance(plain, str | int | float | bool | list) else value
