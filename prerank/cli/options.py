"""What several commands take, where they print, and how they find a funnel of a store and a version of it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from prerank.bundle.registry import Registry
from prerank.bundle.removed import removals
from prerank.errors import ConfigError

_PLAIN_WIDTH = 120  # of tables that go to a file or a pipe
out = Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
err = Console(stderr=True, width=None if sys.stderr.isatty() else _PLAIN_WIDTH)

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
HostsCa = Annotated[
    Path | None,
    typer.Option(help="PEM of the CA that signed the certificates of grpc+tls:// hosts; by default the system's."),
]
HostsCert = Annotated[Path | None, typer.Option(help="PEM of the certificate that such hosts are shown; with its key.")]
HostsKey = Annotated[Path | None, typer.Option(help="PEM of the key of --hosts-cert, without a password.")]
Version = Annotated[str, typer.Argument(help="A version id, or an unambiguous beginning of one.")]
Why = Annotated[str, typer.Option("--why", help="The reason, kept in the history.")]

CONFIG, DATA, STORE = Path("funnel.toml"), Path(), Path("store")


def home_of(store: Path, name: str) -> Path:
    """The folder of the funnel of this name."""
    return store / name


def found_in(
    store: Path, funnel: str, marks: Sequence[str] = ("versions",), none: str = "has no published funnel yet"
) -> Path:
    """The one funnel of the store, or the one named: a folder that has one of `marks` in it.

    Raises ConfigError where that is not to be found; `none` says so of a store without any.
    """
    names = sorted({found.parent.name for mark in marks for found in store.glob(f"*/{mark}")})
    if funnel and funnel not in names:
        raise ConfigError(f"{store}: no funnel {funnel!r} there; it has {', '.join(names) or 'none'}")
    if not funnel and len(names) != 1:
        what = f"has several ({', '.join(names)}); name one with --funnel" if names else none
        raise ConfigError(f"{store}: the store {what}")
    return store / (funnel or names[0])


def resolved(registry: Registry, beginning: str) -> str:
    """The one version whose id begins so.

    Raises ConfigError where there is none, or several, and RegistryError for one that was removed.
    """
    matches = [name for name in registry.names() if name.startswith(beginning)]
    removed = [name for name in removals(registry.store) if name.startswith(beginning)]
    if not matches and len(removed) == 1:
        registry.path(removed[0])  # which says when and why
    if len(matches) != 1:
        what = "no version begins so" if not matches else f"{len(matches)} versions begin so"
        raise ConfigError(f"{beginning!r}: {what}; see `prerank versions`")
    return matches[0]


def live_of(registry: Registry) -> str:
    """The version that is live. Raises ConfigError where none is."""
    live = registry.live()
    if live is None:
        raise ConfigError("no version is live yet; promote one, or name one (see `prerank versions`)")
    return live
