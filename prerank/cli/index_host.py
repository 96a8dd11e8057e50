"""The command of one shard of the index in a process of its own."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import structlog
import typer

from prerank.bundle.shard import Place

_HELP = {
    "shard": "Which shard, from 0.",
    "of": "How many shards there are.",
    "most": "How many versions are held at once; two while one takes the other's place.",
    "follow": "Hold whatever version is live; without it, what `load` says alone.",
    "token": "A file with the token that load and unload need; or set PRERANK_ADMIN_TOKEN.",
}


def register(app: typer.Typer, found: Callable[[Path, str], Path]) -> None:
    """Add `prerank index-host` to `app`; `found` finds the funnel of a store."""

    @app.command(name="index-host")
    def index_host(
        shard: Annotated[int, typer.Option(min=0, help=_HELP["shard"])],
        of: Annotated[int, typer.Option(min=1, help=_HELP["of"])],
        store: Annotated[Path, typer.Option("--store", "-s", help="Where versions are kept.")] = Path("store"),
        funnel: Annotated[str, typer.Option("--funnel", "-f", help="Which funnel of the store.")] = "",
        host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
        port: Annotated[int, typer.Option(min=0, max=65535, help="The port to listen on; 0 is any.")] = 8815,
        versions: Annotated[int, typer.Option(min=1, help=_HELP["most"])] = 2,
        follow: Annotated[bool, typer.Option(help=_HELP["follow"])] = True,
        threads: Annotated[int, typer.Option(min=1, help="How many threads a search may use.")] = 1,
        admin_token_file: Annotated[Path | None, typer.Option(help=_HELP["token"])] = None,
    ) -> None:
        """Serve one shard of the index over Arrow Flight.

        It holds the live version and each that is promoted later; `prerank serve --index-hosts` asks it.
        """
        from prerank.serve.index_flight import serve_index_host  # Flight is only needed here

        place = Place(shard, of)
        structlog.configure(
            processors=[
                structlog.processors.add_log_level,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                structlog.processors.format_exc_info,
                structlog.processors.JSONRenderer(),
            ],
            wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
            logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        )
        serve_index_host(
            found(store, funnel),
            place,
            host=host,
            port=port,
            most=versions,
            follow=follow,
            token_file=admin_token_file,
            threads=threads,
        )
