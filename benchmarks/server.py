"""`prerank serve` as a process of its own, and what it holds: memory and open files."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from benchmarks.machine import memory_of

_READY_S = 120.0


@contextmanager
def server(store: Path, *words: str) -> Iterator[tuple[int, int]]:
    """`prerank serve` with these `words` too, once it is ready: its port and its process."""
    port = free_port()
    command = [sys.executable, "-m", "prerank", "serve", "--store", str(store), "--port", str(port), *words]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        yield from _running(process, port, said)


def _running(process: subprocess.Popen[bytes], port: int, said: IO[bytes]) -> Iterator[tuple[int, int]]:
    try:
        deadline = time.monotonic() + _READY_S
        while not is_ready(port):
            if process.poll() is not None or time.monotonic() > deadline:
                said.seek(0)
                why = said.read().decode(errors="replace").strip()
                raise RuntimeError(f"the server was not ready (exit status {process.poll()}): {why}")
            time.sleep(0.02)
        yield port, process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)


@dataclass(slots=True)
class Held:
    """What a process held, looked at again and again: seconds since the first look, MiB of its own, open files."""

    seconds: list[float] = field(default_factory=list)
    mib: list[float] = field(default_factory=list)
    files: list[int] = field(default_factory=list)

    def between(self, start: float, end: float) -> tuple[list[float], list[int]]:
        """MiB and files of the looks from `start` seconds until `end`."""
        chosen = [n for n, at in enumerate(self.seconds) if start <= at < end]
        return [self.mib[n] for n in chosen], [self.files[n] for n in chosen]


@contextmanager
def watched(pid: int, every_s: float = 0.25) -> Iterator[Held]:
    """What the process holds while this lasts."""
    held, done, start = Held(), threading.Event(), time.monotonic()

    def look() -> None:
        while not done.wait(every_s):
            held.seconds.append(time.monotonic() - start)
            held.mib.append(memory_of("RssAnon", pid) / 2**20)  # pages of files that are mapped are the system's
            held.files.append(len(os.listdir(f"/proc/{pid}/fd")))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield held
    finally:
        done.set()
        thread.join()


def ask(port: int, path: str, body: bytes | None = None, content_type: str = "application/json") -> tuple[int, bytes]:
    """The status and content of one call."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET" if body is None else "POST", path, body, {"content-type": content_type})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def cli(words: Sequence[str]) -> None:
    """One prerank command; RuntimeError with what it said where it fails."""
    done = subprocess.run([sys.executable, "-m", "prerank", *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"prerank {' '.join(words)}: {done.stderr.strip()}")


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def is_ready(port: int) -> bool:
    """Whether the server there says so; not, where none listens."""
    try:
        return ask(port, "/readyz")[0] == 200
    except OSError:
        return False
