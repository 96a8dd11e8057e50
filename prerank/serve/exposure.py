"""Who can reach a server, and so what it asks of callers and tells them."""

from __future__ import annotations

import binascii
import hmac
import os
import re
from base64 import b64decode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from prerank.errors import ConfigError
from prerank.serve.cross_site import check_name, check_page, host_names, is_loopback
from prerank.serve.envelope import Refused

TOKEN_VARIABLE = "PRERANK_ADMIN_TOKEN"
_FEWEST = 16
_TOKEN = re.compile(f"[!-~]{{{_FEWEST},}}")
_BEARER = {"www-authenticate": "Bearer"}
# a browser asks for a name and a password then
_EITHER = {"www-authenticate": 'Bearer, Basic realm="prerank: any name, and the admin token", charset="UTF-8"'}


@dataclass(frozen=True, slots=True)
class Exposure:
    """`token` is what calls that change something, or tell of users, must show, if any.

    `is_local` is whether only this machine can call; then, without a token, pages of others in its browsers may not,
    nor anybody by names that are neither this machine's own nor among `names`.
    """

    token: str | None = None
    is_local: bool = True
    names: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls,
        host: str,
        token_file: Path | None,
        environment: Mapping[str, str] = os.environ,
        allow_hosts: Sequence[str] = (),
        are_known: bool = False,
    ) -> Exposure:
        """Of a server that listens on `host`, with the token in the file or else the variable PRERANK_ADMIN_TOKEN.

        No token is needed where callers `are_known` before they say anything, as by their certificates. Raises
        ConfigError for an address that other machines reach without a token, for a token that is none, and for one of
        `allow_hosts` that is no name.
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
        is_local = is_loopback(host)
        if token is None and not is_local and not are_known:
            raise ConfigError(
                f"--host {host}: other machines could change items and events there, so it needs an admin token; name "
                f"a file that holds one with --admin-token-file, or set {TOKEN_VARIABLE}"
            )
        return cls(token, is_local, host_names(allow_hosts))

    def check_changes(self, headers: Mapping[str, str]) -> None:
        """Raises Refused unless a call with these headers may change something: by the token, where there is one."""
        if self.token is None:
            check_page(headers, self.names)
            return
        scheme, shown = _shown(headers)
        if scheme != "bearer" or not self._is_token(shown):
            came = "another token" if shown else "none"
            raise Refused(
                401, "Unauthorized", f"authorization: expected `Bearer` and the admin token, got {came}", _BEARER
            )

    def check_reads(self, headers: Mapping[str, str]) -> None:
        """Raises Refused unless a call with these headers may read what tells of users.

        A browser may show the token as a password: what comes back no page of others can read.
        """
        if self.token is None:
            check_name(headers, self.names)
            return
        scheme, shown = _shown(headers)
        token = _password(shown) if scheme == "basic" else shown
        if scheme not in ("bearer", "basic") or not self._is_token(token):
            came = "another token" if shown else "none"
            expected = "`Bearer` and the admin token, or `Basic` and it as the password"
            raise Refused(401, "Unauthorized", f"authorization: expected {expected}, got {came}", _EITHER)

    def _is_token(self, shown: str) -> bool:
        assert self.token is not None
        # compared as bytes in a time that does not say how far they agree
        return hmac.compare_digest(shown.encode(), self.token.encode())


LOCAL = Exposure()
"""Of a server that only this machine reaches."""


def _shown(headers: Mapping[str, str]) -> tuple[str, str]:
    """The scheme in small letters, and what comes after it."""
    scheme, _, shown = headers.get("authorization", "").partition(" ")
    return scheme.lower(), shown.strip()


def _password(shown: str) -> str:
    try:
        return b64decode(shown, validate=True).decode().partition(":")[2]
    except (binascii.Error, UnicodeDecodeError):
        return ""
