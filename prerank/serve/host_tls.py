"""TLS between servers and index hosts: the files of both sides, read once, and checked before anybody calls."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path

from prerank.errors import ConfigError

SCHEME = "grpc+tls://"
"""What an address begins with where TLS is spoken."""


@dataclass(frozen=True, slots=True)
class HostTls:
    """PEM of an index host: its certificate, with those between it and the CA, its key, and the CA of its callers.

    With `client_ca` nobody calls without a certificate that it signed.
    """

    cert: bytes
    key: bytes = field(repr=False)
    client_ca: bytes | None = None

    @classmethod
    def read(cls, cert: Path | None, key: Path | None, client_ca: Path | None) -> HostTls | None:
        """Of these files, None where none is named. Raises ConfigError naming the one that is missing or wrong."""
        if cert is None and key is None:
            if client_ca is not None:
                raise ConfigError(
                    "--tls-client-ca: callers show certificates over TLS alone; name --tls-cert, --tls-key"
                )
            return None
        pair = _pair("--tls-cert", cert, "--tls-key", key)
        return cls(*pair, None if client_ca is None else _certificates("--tls-client-ca", client_ca))


@dataclass(frozen=True, slots=True)
class CallerTls:
    """PEM of who calls index hosts: the CA that signed their certificates, and a certificate and key of its own.

    Without `ca` those that the system trusts; without `cert` and `key` no certificate is shown.
    """

    ca: bytes | None = None
    cert: bytes | None = None
    key: bytes | None = field(default=None, repr=False)

    @classmethod
    def read(cls, ca: Path | None, cert: Path | None, key: Path | None) -> CallerTls | None:
        """Of these files, None where none is named. Raises ConfigError naming the one that is missing or wrong."""
        if ca is None and cert is None and key is None:
            return None
        pair = (None, None) if cert is None and key is None else _pair("--hosts-cert", cert, "--hosts-key", key)
        return cls(None if ca is None else _certificates("--hosts-ca", ca), *pair)


def why_not(address: str, said: str) -> str:
    """What gRPC said of a connection to `address` that did not come about, with what to do where that is known."""
    is_tls = address.startswith(SCHEME)
    if "wrong version number" in said:
        return "it does not speak TLS; start it with --tls-cert and --tls-key, or list it without grpc+tls://"
    if "certificate verify failed" in said:
        return "its certificate is signed by none that is trusted; name the CA's with --hosts-ca"
    if "is not in peer certificate" in said:
        return "its certificate names other hosts; list it by a name that is among them"
    if "Socket closed" in said and is_tls:
        return (
            "it closed the connection; if it was started with --tls-client-ca, name a certificate that this CA signed "
            "with --hosts-cert and --hosts-key"
        )
    if "Socket closed" in said:
        return f"it closed the connection; if it speaks TLS, list it as {SCHEME}{address.removeprefix('grpc://')}"
    return said


def _pair(cert_option: str, cert: Path | None, key_option: str, key: Path | None) -> tuple[bytes, bytes]:
    if cert is None or key is None:
        given, missing = (cert_option, key_option) if key is None else (key_option, cert_option)
        raise ConfigError(f"{given} and {missing} belong together, and {missing} is missing")
    found = _certificates(cert_option, cert), _read(key_option, key)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password=lambda: "")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(f"{key_option} {key}: this key does not fit the certificate in {cert}") from None
        raise ConfigError(f"{key_option} {key}: expected a private key as PEM, without a password: {error}") from None
    return found


def _certificates(option: str, path: Path) -> bytes:
    found = _read(option, path)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=found.decode("ascii"))
    except (ssl.SSLError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"{option} {path}: expected certificates as PEM: {error}") from None
    return found


def _read(option: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{option} {path}: expected a file of PEM: {error.strerror}") from None
