"""prerank: from logs to served winners, one command a verb."""

from __future__ import annotations

import getpass
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from prerank import __version__
from prerank.bundle.load import load
from prerank.bundle.registry import Registry
from prerank.cli import render, requests
from prerank.cli.clean import cleaning
from prerank.cli.demo import demo as run_demo
from prerank.cli.doctor import examine
from prerank.cli.index_host import hosts_app
from prerank.cli.options import (
    CONFIG,
    DATA,
    STORE,
    ConfigPath,
    DataFolder,
    FunnelName,
    StoreFolder,
    TailUrl,
    Teacher,
    UsersUrl,
    Version,
    Why,
    err,
    found_in,
    home_of,
    live_of,
    out,
    resolved,
)
from prerank.cli.profile import profiling
from prerank.cli.progress import progress
from prerank.cli.retrain import retraining
from prerank.cli.serving import serving
from prerank.config import load_config
from prerank.data.check import check as check_tables
from prerank.data.logs import Tables, find_tables, open_tables
from prerank.errors import GateFailed, PrerankError
from prerank.lifecycle.build import evaluate as evaluate_trained
from prerank.lifecycle.build import load_tail, load_users, publish_trained
from prerank.lifecycle.training import Trained
from prerank.lifecycle.training import train as train_models
from prerank.lifecycle.validate import validate as validate_version
from prerank.market.generate import generate_market

app = typer.Typer(
    name="prerank",
    help="The early half of an ads or recommendation funnel: from logs to served winners.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)


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
def check(config: ConfigPath = CONFIG, data: DataFolder = DATA, store: StoreFolder = STORE) -> None:
    """List every problem of the funnel file and the data.

    All at once, as a table; exit code 1 if one of them is an error.
    """
    funnel = load_config(config)
    problems = check_tables(funnel, find_tables(funnel, data, home_of(store, funnel.name) / "work"))
    out.print(render.problems(problems))
    if any(p.severity == "error" for p in problems):
        raise typer.Exit(1)


@app.command()
def train(
    config: ConfigPath = CONFIG, data: DataFolder = DATA, store: StoreFolder = STORE, teacher: Teacher = None
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
    config: ConfigPath = CONFIG,
    data: DataFolder = DATA,
    store: StoreFolder = STORE,
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
    quality = evaluate_trained(trained, home_of(store, trained.config.name))
    if as_json:
        print(json.dumps(render.plain(quality), indent=1))
    else:
        out.print(render.quality(quality))
    if report is not None:
        err.print(f"report: {_write_report(trained, report, segment)}", highlight=False, soft_wrap=True)


@app.command()
def publish(
    config: ConfigPath = CONFIG,
    data: DataFolder = DATA,
    store: StoreFolder = STORE,
    teacher: Teacher = None,
    tail: TailUrl = None,
    users: UsersUrl = None,
) -> None:
    """Write one immutable version and measure its gates.

    The models (trained first if they are not), the items and the rules; exit code 1 if a gate fails.
    """
    trained, tables = _trained(config, data, store, teacher)
    home = home_of(store, trained.config.name)
    with progress(err) as report:
        load_users(trained.config, tables, trained.prepared, home, report, users)
        load_tail(trained.config, tables, trained.prepared, home, tail, report)
        quality = evaluate_trained(trained, home)
        version = publish_trained(trained, tables, home, render.plain(quality), report)
        gates = validate_version(home, version, trained.prepared, tables, trained.heavy, report, users)
    out.print(f"published {version}")
    out.print(render.gates(gates))
    if not all(gate.holds for gate in gates):
        raise GateFailed(f"{version} stays unpointed: " + "; ".join(render.failed(gates)))
    out.print(f"next: prerank promote {version} --store {store}")


@app.command()
def promote(version: Version, store: StoreFolder = STORE, funnel: FunnelName = "", why: Why = "") -> None:
    """Make a version live, if every gate holds."""
    registry = Registry(found_in(store, funnel))
    chosen = resolved(registry, version)
    registry.promote(chosen, getpass.getuser(), why)
    out.print(f"{chosen} is live")


@app.command()
def rollback(
    version: Annotated[str, typer.Argument(help="A version that was live before; by default the previous one.")] = "",
    store: StoreFolder = STORE,
    funnel: FunnelName = "",
    why: Why = "",
) -> None:
    """Make a version live again that was before."""
    registry = Registry(found_in(store, funnel))
    registry.rollback(resolved(registry, version) if version else None, getpass.getuser(), why)
    out.print(f"{registry.live()} is live")


app.add_typer(retraining)
app.add_typer(cleaning)


@app.command()
def versions(store: StoreFolder = STORE, funnel: FunnelName = "") -> None:
    """List versions, and who was live when and why."""
    registry = Registry(found_in(store, funnel))
    out.print(render.versions(registry))


@app.command()
def show(
    version: Annotated[str, typer.Argument(help="By default the live one.")] = "",
    store: StoreFolder = STORE,
    funnel: FunnelName = "",
) -> None:
    """Show one version, if it is whole.

    Where it came from, and every file, which is checked against its hash; then the golden answers are asked again.
    """
    registry = Registry(found_in(store, funnel))
    chosen = resolved(registry, version) if version else live_of(registry)
    out.print(render.bundle(load(registry.path(chosen))))


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
    store: StoreFolder = STORE,
) -> None:
    """Run the whole funnel, from tables to winners.

    Train, evaluate, publish, validate, promote, then answer in process and over HTTP.
    """
    run_demo(config, data, store, out, err)


def _trained(config: Path, data: Path, store: Path, teacher: Path | None) -> tuple[Trained, Tables]:
    funnel = load_config(config)
    home = home_of(store, funnel.name)
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


app.add_typer(serving)
app.add_typer(profiling)
app.add_typer(hosts_app)
