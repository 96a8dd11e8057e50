"""Who can reach a server, and so what it asks of callers and tells them."""

from __future__ import annotations

import hmac
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from prerank.errors import ConfigError
from prerank.serve.envelope import Refused

TOKEN_VARIABLE = "PRERANK_ADMIN_TOKEN"
_FEWEST = 16
_TOKEN = re.compile(f"[!-~]{{{_FEWEST},}}")
_HEADERS = {"www-authenticate": "Bearer"}


@dataclass(frozen=True, slots=True)
class Exposure:
    """`token` is what calls that change something must show, if any; `is_local` whether only this machine can call."""

    token: str | None = None
    is_local: bool = True

    @classmethod
    def of(cls, host: str, token_file: Path | None, environment: Mapping[str, str] = os.environ) -> Exposure:
        """Of a server that listens on `host`, with the token in the file or else the variable PRERANK_ADMIN_TOKEN.

        Raises ConfigError for an address that other machines reach without a token, and for a token that is none.
        """
        token, where = environment.get(TOKEN_VARIABLE), TOKEN_VARIABLE
        if token_file is not None:
            where = str(token_file)
            try:
                token = token_file.read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"{where}: expected a file that holds the admin token: {error}") from None
        if token is not None and not _TOKEN.fullmatch(token):
            raise ConfigError(
                f"{where}: expected an admin token, {_FEWEST} or more characters of ASCII without a space, got "
                f"{len(token)} characters; `openssl rand -hex 32` makes one"
            )
        is_local = _is_loopback(host)
        if token is None and not is_local:
            raise ConfigError(
                f"--host {host}: other machines could change items and events there, so it needs an admin token; name "
                f"a file that holds one with --admin-token-file, or set {TOKEN_VARIABLE}"
            )
        return cls(token, is_local)

    def check(self, authorization: str) -> None:
        """Raises Refused unless this header shows the token, where one is needed."""
        if self.token is None:
            return
        scheme, _, shown = authorization.partition(" ")
        # compared as bytes in a time that does not say how far they agree
        is_right = hmac.compare_digest(shown.strip().encode(), self.token.encode())
        if scheme.lower() != "bearer" or not is_right:
            came = "another token" if shown else "none"
            raise Refused(
                401, "Unauthorized", f"authorization: expected `Bearer` and the admin token, got {came}", _HEADERS
            )


LOCAL = Exposure()
"""Of a server that only this machine reaches."""


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False  # a name may be anything's
