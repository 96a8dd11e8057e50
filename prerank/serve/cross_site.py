"""Pages of others in a browser on this machine: what they may not ask of a server that only this machine reaches.

A page from anywhere may POST to 127.0.0.1, and may give a name of its own that address (DNS rebinding) to read what
comes back. Browsers say which page asks and under which name, and no page can change that; other clients say nothing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from ipaddress import ip_address
from urllib.parse import urlsplit

from prerank.errors import ConfigError
from prerank.serve.envelope import Refused

_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?|\[[0-9a-f:.]+\]")
_OWN = ("same-origin", "none")  # none: a person typed the address
_SHOWN = 100


def is_loopback(host: str) -> bool:
    """Whether this name or address can only be this machine's."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False  # a name may be anything's


def host_names(given: Iterable[str]) -> frozenset[str]:
    """Names that a server may be called by besides this machine's own. Raises ConfigError for one that is none."""
    found = set()
    for one in given:
        if not _NAME.fullmatch(one.lower()):
            raise ConfigError(f"--allow-host {one!r}: expected a name such as ranker.example, without scheme and port")
        found.add(one.lower().strip("[]"))
    return frozenset(found)


def check_name(headers: Mapping[str, str], names: Collection[str]) -> None:
    """Raises Refused where the server is called by a name that is neither this machine's own nor one of `names`."""
    said = headers.get("host", "")
    host = _parts(said)[0]
    if said and not (is_loopback(host) or host in names):
        raise Refused(
            403,
            "CrossSite",
            f"host: expected 127.0.0.1, localhost or what --allow-host names, got {said[:_SHOWN]!r}",
        )


def check_page(headers: Mapping[str, str], names: Collection[str]) -> None:
    """Raises Refused also where a page that is not the server's own asks."""
    check_name(headers, names)
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    if origin is not None and _parts(headers.get("host", "")) != _parts(origin.partition("://")[2]):
        raise Refused(
            403,
            "CrossSite",
            f"origin: a page of {origin[:_SHOWN]!r} may change nothing here; expected one of this server, or a client "
            "that is no browser",
        )
    if site is not None and site not in _OWN:
        raise Refused(
            403, "CrossSite", f"sec-fetch-site: expected same-origin, for a page of this server, got {site[:_SHOWN]!r}"
        )


def _parts(host: str) -> tuple[str, int | None]:
    """Name in small letters and port of what a Host header says; no name where it says nothing that is one."""
    try:
        parts = urlsplit(f"//{host}")
        return parts.hostname or "", parts.port
    except ValueError:
        return "", None
