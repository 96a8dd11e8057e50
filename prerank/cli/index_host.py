"""The commands of index hosts: one shard in a process of its own, and what all of them hold."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from prerank.bundle.shard import Place
from prerank.cli.options import STORE, FunnelName, HostsCa, HostsCert, HostsKey, StoreFolder, found_in, out
from prerank.errors import ConfigError, PrerankError
from prerank.serve.log_lines import log_to_stderr

if TYPE_CHECKING:
    from prerank.serve.index_flight import FlightHost

_HELP = {
    "shard": "Which shard, from 0.",
    "of": "How many shards there are.",
    "most": "How many versions are held at once; two while one takes the other's place.",
    "follow": "Hold whatever version is live; without it, what `load` says alone.",
    "compress": "Send candidates compressed (zstd), or as they are, which saves both ends a little work.",
    "cert": "PEM of the certificate to speak TLS with; with its key.",
    "key": "PEM of the key of --tls-cert, without a password.",
    "client_ca": "PEM of a CA: nobody calls without a certificate that it signed, and so nobody needs a token.",
    "token": "A file with the token that load and unload need; or set PRERANK_ADMIN_TOKEN.",
}


hosts_app = typer.Typer()


@hosts_app.command(name="index-hosts")
def index_hosts(
    hosts: Annotated[str, typer.Argument(help="0=host:port|host:port,1=... or a file with a shard a line.")],
    load: Annotated[str, typer.Option(help="A version that they are to hold too.")] = "",
    unload: Annotated[str, typer.Option(help="A version that they are to hold no more.")] = "",
    shard: Annotated[int | None, typer.Option(min=0, help="Of this shard alone.")] = None,
    timeout_s: Annotated[float, typer.Option(min=0.1, help="How long to wait for each.")] = 60.0,
    hosts_ca: HostsCa = None,
    hosts_cert: HostsCert = None,
    hosts_key: HostsKey = None,
) -> None:
    """List what index hosts hold, after they loaded a version or let one go.

    One after another, so that a roll-out stops at the first that cannot; exit code 1 if one does not answer.
    """
    from prerank.serve.exposure import TOKEN_VARIABLE  # Flight and the HTTP stack are only needed here
    from prerank.serve.host_tls import CallerTls
    from prerank.serve.index_flight import open_hosts

    tls = CallerTls.read(hosts_ca, hosts_cert, hosts_key)
    shards = open_hosts(hosts, os.environ.get(TOKEN_VARIABLE), tls)
    if not _tell(shards, load, unload, shard, timeout_s):
        raise typer.Exit(1)


@hosts_app.command(name="index-host")
def index_host(
    shard: Annotated[int, typer.Option(min=0, help=_HELP["shard"])],
    of: Annotated[int, typer.Option(min=1, help=_HELP["of"])],
    store: StoreFolder = STORE,
    funnel: FunnelName = "",
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port to listen on; 0 is any.")] = 8815,
    versions: Annotated[int, typer.Option(min=1, help=_HELP["most"])] = 2,
    follow: Annotated[bool, typer.Option(help=_HELP["follow"])] = True,
    threads: Annotated[int, typer.Option(min=1, help="How many threads a search may use.")] = 1,
    compress: Annotated[bool, typer.Option(help=_HELP["compress"])] = True,
    admin_token_file: Annotated[Path | None, typer.Option(help=_HELP["token"])] = None,
    tls_cert: Annotated[Path | None, typer.Option(help=_HELP["cert"])] = None,
    tls_key: Annotated[Path | None, typer.Option(help=_HELP["key"])] = None,
    tls_client_ca: Annotated[Path | None, typer.Option(help=_HELP["client_ca"])] = None,
) -> None:
    """Serve one shard of the index over Arrow Flight.

    It holds the live version and each that is promoted later; `prerank serve --index-hosts` asks it.
    """
    from prerank.serve.host_tls import HostTls
    from prerank.serve.index_flight import serve_index_host  # Flight is only needed here

    place = Place(shard, of)
    log_to_stderr()
    serve_index_host(
        found_in(store, funnel),
        place,
        host=host,
        port=port,
        most=versions,
        follow=follow,
        token_file=admin_token_file,
        threads=threads,
        is_compressed=compress,
        tls=HostTls.read(tls_cert, tls_key, tls_client_ca),
    )


def _tell(shards: list[list[FlightHost]], load: str, unload: str, shard: int | None, timeout_s: float) -> bool:
    """Whether all did as they were told; those after one that did not are told nothing, and asked what they hold."""
    if shard is not None and shard >= len(shards):
        raise ConfigError(f"--shard {shard}: expected a shard from 0 to {len(shards) - 1}")
    table, is_well = Table("host", "shard", "holds", "models"), True
    for number, replicas in enumerate(shards):
        for host in replicas if shard in (None, number) else []:
            try:
                if is_well and load:
                    host.load(load, timeout_s)
                if is_well and unload:
                    host.unload(unload, timeout_s)
                holding = host.holding(timeout_s)
                models = [", ".join(f"{k} {v}" for k, v in one.models.items()) for one in holding.versions.values()]
                place = f"{holding.number} of {holding.of}"
                table.add_row(host.address, place, "\n".join(holding.versions) or "nothing", "\n".join(models))
            except PrerankError as error:
                is_well = False
                table.add_row(host.address, str(number), f"error: {error}", "")
            finally:
                host.close()
    out.print(table)
    return is_well
