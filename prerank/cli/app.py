"""prerank: from logs to served winners, one command a verb."""

from __future__ import annotations

import getpass
import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from prerank import __version__
from prerank.bundle.load import load
from prerank.bundle.manifest import CONFIG, METADATA
from prerank.bundle.registry import Registry
from prerank.cli import index_host, render, requests
from prerank.cli.demo import demo as run_demo
from prerank.cli.doctor import examine
from prerank.cli.progress import progress
from prerank.cli.retrain import register as register_retrain
from prerank.config import load_config
from prerank.data.check import check as check_tables
from prerank.data.logs import Tables, find_tables, open_tables
from prerank.errors import ConfigError, GateFailed, PrerankError, RequestError
from prerank.lifecycle.build import evaluate as evaluate_trained
from prerank.lifecycle.build import load_tail, load_users, publish_trained
from prerank.lifecycle.training import Trained
from prerank.lifecycle.training import train as train_models
from prerank.lifecycle.validate import validate as validate_version
from prerank.market.generate import generate_market
from prerank.stores.metadata import MetadataTable
from prerank.stores.reads import FILE as READS
from prerank.stores.reads import ReadCounts
from prerank.types import Given, Request

app = typer.Typer(
    name="prerank",
    help="The early half of an ads or recommendation funnel: from logs to served winners.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)
_PLAIN_WIDTH = 120  # of tables that go to a file or a pipe
out = Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
err = Console(stderr=True, width=None if sys.stderr.isatty() else _PLAIN_WIDTH)

audit_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(audit_app, name="audit", help="Tell what a store's servers were used for.")
ConfigPath = Annotated[Path, typer.Option("--config", "-c", help="The funnel file.")]
DataFolder = Annotated[Path, typer.Option("--data", "-d", help="The folder that [data] is relative to.")]
StoreFolder = Annotated[Path, typer.Option("--store", "-s", help="Where versions, users and work are kept.")]
FunnelName = Annotated[str, typer.Option("--funnel", "-f", help="Which funnel of the store; needed if it has several.")]
Teacher = Annotated[
    Path | None,
    typer.Option("--teacher", "-t", help="A teacher.safetensors of the same features, instead of training one."),
]
TailUrl = Annotated[
    str | None,
    typer.Option(
        "--tail", envvar="PRERANK_TAIL", help="redis://... that holds the items not in memory; by default the store."
    ),
]
UsersUrl = Annotated[
    str | None,
    typer.Option(
        "--users", envvar="PRERANK_USERS", help="redis://... that holds users and events; by default the store."
    ),
]
Version = Annotated[str, typer.Argument(help="A version id, or an unambiguous beginning of one.")]
Why = Annotated[str, typer.Option("--why", help="The reason, kept in the history.")]

_CONFIG, _DATA, _STORE = Path("funnel.toml"), Path(), Path("store")


def main() -> None:
    """Run the command line; an error meant for a user is one line and exit code 1."""
    try:
        app()
    except PrerankError as error:
        err.print("error:", style="bold red", end=" ")
        err.print(str(error), highlight=False, markup=False)
        sys.exit(1)
    except KeyboardInterrupt:
        err.print("\nstopped; the same command goes on where it was")
        sys.exit(130)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version of prerank and leave.")] = False,
) -> None:
    """The early half of an ads or recommendation funnel: from logs to served winners."""
    if version:
        out.print(__version__)
        raise typer.Exit


@app.command()
def market(
    ads: Annotated[int, typer.Option(help="How many ads, 100 to 20 million.")] = 100_000,
    folder: Annotated[Path, typer.Option("--out", "-o", help="Where to write the tables.")] = Path("market"),
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 7,
    users: Annotated[int | None, typer.Option(help="How many users; by default in proportion.")] = None,
    impressions: Annotated[int | None, typer.Option(help="How many impressions; by default in proportion.")] = None,
    days: Annotated[int, typer.Option(help="How many days of log.")] = 10,
) -> None:
    """Make a simulated ad market.

    It writes the tables a user brings, and beside them the truth no user has.
    """
    with progress(err) as report:
        made = generate_market(
            folder,
            num_ads=ads,
            seed=seed,
            num_users=users,
            num_impressions=impressions,
            days=days,
            progress=lambda what, share: report(what, round(100 * share), 100, "%"),
        )
    out.print(render.record(made), highlight=False)


@app.command()
def check(config: ConfigPath = _CONFIG, data: DataFolder = _DATA, store: StoreFolder = _STORE) -> None:
    """List every problem of the funnel file and the data.

    All at once, as a table; exit code 1 if one of them is an error.
    """
    funnel = load_config(config)
    problems = check_tables(funnel, find_tables(funnel, data, _home(store, funnel.name) / "work"))
    out.print(render.problems(problems))
    if any(p.severity == "error" for p in problems):
        raise typer.Exit(1)


@app.command()
def train(
    config: ConfigPath = _CONFIG, data: DataFolder = _DATA, store: StoreFolder = _STORE, teacher: Teacher = None
) -> None:
    """Train the towers, the heavy ranker if the funnel file has one, and the ranker.

    Goes on where it was stopped, and does again only what changed.
    """
    trained, _ = _trained(config, data, store, teacher)
    if trained.config.data.requests:
        out.print(requests.served(trained.prepared), highlight=False)
    out.print(render.epochs(trained))


@app.command()
def evaluate(
    config: ConfigPath = _CONFIG,
    data: DataFolder = _DATA,
    store: StoreFolder = _STORE,
    teacher: Teacher = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    report: Annotated[
        Path | None, typer.Option("--report", "-r", help="A folder for an HTML report and its numbers as JSON.")
    ] = None,
    segment: Annotated[
        str | None, typer.Option("--segment", "-g", help="A category to cut the report by; by default the domain.")
    ] = None,
) -> None:
    """Measure quality on the test days, beside floors.

    The floors are what anyone can compute; trains first if that is not done.
    """
    trained, _ = _trained(config, data, store, teacher)
    quality = evaluate_trained(trained, _home(store, trained.config.name))
    if as_json:
        print(json.dumps(render.plain(quality), indent=1))
    else:
        out.print(render.quality(quality))
    if report is not None:
        err.print(f"report: {_write_report(trained, report, segment)}", highlight=False, soft_wrap=True)


@app.command()
def publish(
    config: ConfigPath = _CONFIG,
    data: DataFolder = _DATA,
    store: StoreFolder = _STORE,
    teacher: Teacher = None,
    tail: TailUrl = None,
    users: UsersUrl = None,
) -> None:
    """Write one immutable version and measure its gates.

    The models (trained first if they are not), the items and the rules; exit code 1 if a gate fails.
    """
    trained, tables = _trained(config, data, store, teacher)
    home = _home(store, trained.config.name)
    with progress(err) as report:
        load_users(trained.config, tables, trained.prepared, home, report, users)
        load_tail(trained.config, tables, trained.prepared, home, tail, report)
        quality = evaluate_trained(trained, home)
        version = publish_trained(trained, tables, home, render.plain(quality), report)
        gates = validate_version(home, version, trained.prepared, tables, trained.heavy, report)
    out.print(f"published {version}")
    out.print(render.gates(gates))
    if not all(gate.holds for gate in gates):
        raise GateFailed(f"{version} stays unpointed: " + "; ".join(render.failed(gates)))
    out.print(f"next: prerank promote {version} --store {store}")


@app.command()
def promote(version: Version, store: StoreFolder = _STORE, funnel: FunnelName = "", why: Why = "") -> None:
    """Make a version live, if every gate holds."""
    registry = Registry(_found(store, funnel))
    chosen = _resolve(registry, version)
    registry.promote(chosen, getpass.getuser(), why)
    out.print(f"{chosen} is live")


@app.command()
def rollback(
    version: Annotated[str, typer.Argument(help="A version that was live before; by default the previous one.")] = "",
    store: StoreFolder = _STORE,
    funnel: FunnelName = "",
    why: Why = "",
) -> None:
    """Make a version live again that was before."""
    registry = Registry(_found(store, funnel))
    registry.rollback(_resolve(registry, version) if version else None, getpass.getuser(), why)
    out.print(f"{registry.live()} is live")


register_retrain(app, out, err)


@app.command()
def versions(store: StoreFolder = _STORE, funnel: FunnelName = "") -> None:
    """List versions, and who was live when and why."""
    registry = Registry(_found(store, funnel))
    out.print(render.versions(registry))


@app.command()
def show(
    version: Annotated[str, typer.Argument(help="By default the live one.")] = "",
    store: StoreFolder = _STORE,
    funnel: FunnelName = "",
) -> None:
    """Show one version, if it is whole.

    Where it came from, and every file, which is checked against its hash; then the golden answers are asked again.
    """
    registry = Registry(_found(store, funnel))
    chosen = _resolve(registry, version) if version else _live(registry)
    out.print(render.bundle(load(registry.path(chosen))))


@app.command()
def serve(
    store: StoreFolder = _STORE,
    funnel: FunnelName = "",
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")] = 8000,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Native threads that rank; one a core by default, 0 lets torch rank.")
    ] = None,
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
    from prerank.serve.http import serve as serve_http  # the HTTP stack is only needed here
    from prerank.serve.request_log import LogOptions
    from prerank.serve.seeing import Sight

    most_bytes = None if log_gb is None else int(log_gb * 1e9)
    logged = None if log_requests is None else LogOptions(log_requests, sample, most_bytes, log_days)
    sight = Sight(traces, lines, requests=logged)
    serve_http(
        _found(store, funnel),
        host=host,
        port=port,
        workers=workers,
        tail=tail,
        users=users,
        token_file=admin_token_file,
        linger_s=linger_s,
        grpc_port=grpc_port,
        sight=sight,
        index_hosts=index_hosts,
        otel=otel,
        allow_hosts=allow_host,
    )


@app.command()
def recommend(
    user: Annotated[int, typer.Option("--user", "-u", help="A user_id; one nobody knows is served as a new user.")],
    k: Annotated[int, typer.Option("-k", help="How many winners.")] = 10,
    context: Annotated[list[str], typer.Option("--context", "-x", help="name=value, once for each field.")] = [],  # noqa: B006 - typer reads the default
    exclude: Annotated[list[int], typer.Option("--exclude", "-e", help="An item_id that must not win; repeat.")] = [],  # noqa: B006 - typer reads the default
    store: StoreFolder = _STORE,
    funnel: FunnelName = "",
    tail: TailUrl = None,
    users: UsersUrl = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer as the server would send it.")] = False,
) -> None:
    """Answer for one user, without a server."""
    from prerank.serve.funnel import Funnel

    with Funnel.open(_found(store, funnel), tail=tail, users=users) as opened:
        said = dict(_field(one) for one in context)
        now_ms = int(time.time() * 1000)
        answer = opened.recommend(Request(user, k, now_ms, said, exclude=tuple(exclude)))
    if as_json:
        print(json.dumps(answer.to_dict(), indent=1))
    else:
        out.print(render.answer(answer))


@app.command()
def replay(
    folder: Annotated[Path, typer.Argument(help="A folder that `prerank serve --log-requests` wrote.")],
    version: Annotated[str, typer.Option("--version", help="The version to ask; by default the live one.")] = "",
    limit: Annotated[int, typer.Option(min=1, help="The most requests to ask, the oldest first.")] = 10_000,
    store: StoreFolder = _STORE,
    funnel: FunnelName = "",
    tail: TailUrl = None,
    users: UsersUrl = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Ask a version the requests of a log again, with the features as served, and compare its winners.

    Of the same version they are the same, unless items changed since: bids, pacing, switches.
    """
    home = _found(store, funnel)
    chosen = _resolve(Registry(home), version) if version else None
    with progress(err) as report:
        told = requests.replay_log(folder, home, chosen, tail, users, limit, report)
    if as_json:
        print(json.dumps(render.plain(told), indent=1))
    else:
        out.print(requests.replayed(told), highlight=False)


@audit_app.command("metadata")
def audit_metadata(store: StoreFolder = _STORE, funnel: FunnelName = "") -> None:
    """Tell which columns of metadata were ever read, and what each takes.

    Counted by every server of the store: by name in requests and in POST /v1/metadata, or sent for want of a choice.
    """
    found = _found(store, funnel)
    path = Registry(found).path(_live(Registry(found)))
    config, table = load_config(path / CONFIG), MetadataTable.open(path / METADATA)
    counts = ReadCounts.open(found / READS)
    try:
        out.print(render.reads(config.metadata, table, counts.all()))
    finally:
        counts.close()


@audit_app.command("skew")
def audit_skew(
    folder: Annotated[Path, typer.Argument(help="A folder that `prerank serve --log-requests` wrote.")],
    config: ConfigPath = _CONFIG,
    data: DataFolder = _DATA,
    store: StoreFolder = _STORE,
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
    work = _home(store, read.name) / "work"
    tables = open_tables(read, data, work)
    with progress(err) as report:
        told = requests.skew_of(folder, tables, work, limit, report)
    if as_json:
        print(json.dumps(render.plain(told), indent=1))
    else:
        out.print(requests.skew(told), highlight=False)
    if at_least is not None and any(one.agreement is not None and one.agreement < at_least for one in told.features):
        raise typer.Exit(1)


@app.command()
def doctor(
    measure: Annotated[bool, typer.Option(help="Measure what the machine can do at best, some seconds.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as one JSON object.")] = False,
) -> None:
    """Tell what this machine has, what it can do at best, and what is amiss.

    Leaves with exit code 1 where prerank would not work here.
    """
    found = examine(measure)
    if as_json:
        out.print_json(json.dumps(render.plain(found)))
    else:
        out.print(render.findings(found), highlight=False)
    if any(fault.is_error for fault in found.faults):
        raise typer.Exit(1)


@app.command()
def demo(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="The funnel file; by default the data's.")
    ] = None,
    data: Annotated[Path | None, typer.Option("--data", "-d", help="Real tables; by default a market is made.")] = None,
    store: StoreFolder = _STORE,
) -> None:
    """Run the whole funnel, from tables to winners.

    Train, evaluate, publish, validate, promote, then answer in process and over HTTP.
    """
    run_demo(config, data, store, out, err)


def _trained(config: Path, data: Path, store: Path, teacher: Path | None) -> tuple[Trained, Tables]:
    funnel = load_config(config)
    home = _home(store, funnel.name)
    tables = open_tables(funnel, data, home / "work")
    with progress(err) as report:
        return train_models(funnel, tables, home, report, teacher), tables


def _write_report(trained: Trained, folder: Path, segment: str | None) -> Path:
    from prerank.evaluate.judge import judge
    from prerank.evaluate.report import write_report  # plots are only needed here

    config = trained.config
    rankers = {str(config.ranker.model): trained.ranker}
    days, towers, heavy = config.data.days("test"), trained.towers, trained.heavy
    told = judge(rankers, trained.prepared, config, days, towers=towers, teacher=heavy, by=segment)
    return write_report(told, folder)


def _home(store: Path, name: str) -> Path:
    return store / name


def _found(store: Path, funnel: str) -> Path:
    """The one funnel of the store, or the one named."""
    names = sorted(p.parent.name for p in store.glob("*/versions")) if store.is_dir() else []
    if funnel and funnel not in names:
        raise ConfigError(f"{store}: no funnel {funnel!r} there; it has {', '.join(names) or 'none'}")
    if not funnel and len(names) != 1:
        what = f"has several ({', '.join(names)}); name one with --funnel" if names else "has no published funnel yet"
        raise ConfigError(f"{store}: the store {what}")
    return store / (funnel or names[0])


def _resolve(registry: Registry, beginning: str) -> str:
    matches = [name for name in registry.names() if name.startswith(beginning)]
    if len(matches) != 1:
        what = "no version begins so" if not matches else f"{len(matches)} versions begin so"
        raise ConfigError(f"{beginning!r}: {what}; see `prerank versions`")
    return matches[0]


def _live(registry: Registry) -> str:
    live = registry.live()
    if live is None:
        raise ConfigError("no version is live yet; promote one, or name one (see `prerank versions`)")
    return live


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


index_host.register(app, out, _found)
