"""`prerank clean`: old versions, old work and what crashes left, deleted."""

from __future__ import annotations

import getpass
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from prerank.bundle.registry import Registry
from prerank.cli.options import STORE, FunnelName, HostsCa, HostsCert, HostsKey, StoreFolder, found_in, out
from prerank.cli.retrain import BUSY, rollout_of, tell_error
from prerank.errors import AlreadyRunning
from prerank.lifecycle.retention import KEEP, WORK_DAYS, Cleaned, Policy
from prerank.lifecycle.retention import clean as clean_folder
from prerank.lifecycle.runs import alone
from prerank.serve.host_tls import CallerTls

_KEEP = "How many versions are kept beside the live one, and how many promotes back whatever was live."
_HOSTS = "Ask these what they hold, which is kept: 0=host:port,1=... or a file; for hosts of other machines."
cleaning = typer.Typer()


@cleaning.command()
def clean(
    store: StoreFolder = STORE,
    funnel: FunnelName = "",
    keep: Annotated[int, typer.Option(min=1, help=_KEEP)] = KEEP,
    work_days: Annotated[
        float, typer.Option(min=0, help="For how many days what training made under work/ is kept.")
    ] = WORK_DAYS,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell, and delete nothing.")] = False,
    index_hosts: Annotated[str, typer.Option(help=_HOSTS)] = "",
    hosts_ca: HostsCa = None,
    hosts_cert: HostsCert = None,
    hosts_key: HostsKey = None,
) -> None:
    """Delete versions that nobody needs any more, old work, and what crashes left; tell what that frees.

    Never the live version, those that a rollback may go to, or one that a process has loaded. Exit code 75 while a
    retrain runs.
    """
    home = found_in(store, funnel)
    policy, tls = Policy(keep, work_days), CallerTls.read(hosts_ca, hosts_cert, hosts_key)
    try:
        with alone(home):
            used = rollout_of(Registry(home), index_hosts, 0.0, tls).in_use()
            cleaned = clean_folder(home, policy, getpass.getuser(), used, dry_run)
    except AlreadyRunning as error:
        tell_error(error)
        raise typer.Exit(BUSY) from None
    out.print(_table(cleaned))
    for one in cleaned.spared:
        out.print(f"spared {one.name}: {one.why}", highlight=False, soft_wrap=True)
    would = "would be freed" if dry_run else "freed"
    out.print(f"{cleaned.num_bytes / 1e6:,.1f} MB {would}", highlight=False)


def _table(cleaned: Cleaned) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("what", overflow="fold")
    table.add_column("MB", justify="right")
    table.add_column("why")
    for one in cleaned.freed:
        table.add_row(Text(one.name), f"{one.num_bytes / 1e6:,.1f}", Text(one.why))
    return table
