"""Processes of their own without their own imports: forked from one that imported prerank once and then did nothing.

Importing prerank takes a process more than most commands do. What is forked has its own memory, arguments, environment,
streams and exit code, and can be signalled and killed. A test of the imports themselves, or of how an interpreter ends,
starts `python -m prerank` instead.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from io import TextIOWrapper
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess

import torch


def forked(target: Callable[..., None], *args: object) -> ForkServerProcess:
    """Started: `target(*args)` in a process of its own, on one torch thread as the whole session is."""
    process = _context().Process(target=_on_one_thread, args=(target, *args))
    process.start()
    return process


def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    return context


def _on_one_thread(target: Callable[..., None], *args: object) -> None:
    torch.set_num_threads(1)
    target(*args)


class Command:
    """`prerank ARGUMENTS` running in a process of its own; its streams are pipes, read as text.

    What `subprocess.Popen` calls the same does the same.
    """

    def __init__(self, *arguments: object, env: Mapping[str, str] | None = None) -> None:
        streams = [multiprocessing.Pipe(duplex=False) for _ in range(2)]
        words, environment = ["prerank", *map(str, arguments)], {**os.environ, **(env or {})}
        self._process = forked(_command, words, environment, os.getcwd(), *(write for _, write in streams))
        for _, write in streams:
            write.close()
        self.stdout, self.stderr = (_text(read) for read, _ in streams)

    @property
    def returncode(self) -> int | None:
        """The exit code, or the negative of the signal that ended it; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("prerank", timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            assert self._process.pid is not None
            os.kill(self._process.pid, number)

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: float) -> tuple[str, str]:
        """What it wrote on stdout and on stderr, once it has ended."""
        told = ["", ""]

        def read(number: int, stream: TextIOWrapper) -> None:
            with stream:
                told[number] = stream.read()

        reading = [threading.Thread(target=read, args=both) for both in enumerate((self.stdout, self.stderr))]
        for one in reading:
            one.start()
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        finally:
            for one in reading:
                one.join()
        return told[0], told[1]


def _text(read: Connection) -> TextIOWrapper:
    text = os.fdopen(os.dup(read.fileno()), encoding="utf-8")
    read.close()
    return text


def _command(words: list[str], environment: dict[str, str], folder: str, out: Connection, told: Connection) -> None:
    from prerank.cli import main

    for stream, number in ((out, 1), (told, 2)):
        os.dup2(stream.fileno(), number)
        stream.close()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = words
    main()
