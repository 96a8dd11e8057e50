"""A CA and what it signed, made by the `openssl` of this machine, and one that nobody knows."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

_KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
_NAMES = "subjectAltName=DNS:localhost,IP:127.0.0.1"


@dataclass(frozen=True, slots=True)
class Signed:
    """A certificate and its key, as PEM files."""

    cert: Path
    key: Path


@dataclass(frozen=True, slots=True)
class Certificates:
    """`host` and `caller` are signed by `ca`; `elsewhere` is too, for another name; `stranger` signed itself."""

    ca: Path
    host: Signed
    caller: Signed
    elsewhere: Signed
    stranger: Signed


def make(folder: Path) -> Certificates:
    """All of them in `folder`; the test is skipped where there is no `openssl`."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command, which is not installed")
    ca = _own(folder, "ca")
    return Certificates(
        ca.cert,
        _signed(folder, "host", ca, _NAMES),
        _signed(folder, "caller", ca, _NAMES),
        _signed(folder, "elsewhere", ca, "subjectAltName=DNS:elsewhere.example"),
        _own(folder, "stranger"),
    )


def _own(folder: Path, name: str) -> Signed:
    one = Signed(folder / f"{name}.pem", folder / f"{name}.key")
    _openssl("req", "-x509", *_KEY, "-keyout", one.key, "-out", one.cert, "-subj", f"/CN={name}", "-days", "2")
    return one


def _signed(folder: Path, name: str, ca: Signed, names: str) -> Signed:
    one, asked, extensions = Signed(folder / f"{name}.pem", folder / f"{name}.key"), folder / "csr", folder / "ext"
    extensions.write_text(names)
    _openssl("req", *_KEY, "-keyout", one.key, "-out", asked, "-subj", f"/CN={name}")
    by = ["-CA", ca.cert, "-CAkey", ca.key, "-CAcreateserial"]
    _openssl("x509", "-req", "-in", asked, *by, "-days", "2", "-extfile", extensions, "-out", one.cert)
    return one


def _openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, timeout=60)
