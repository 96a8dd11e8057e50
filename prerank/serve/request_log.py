"""A share of the requests, as they were answered, in Parquet files: written by a thread that no request waits for.

Which requests is a matter of their ids alone, so that every server that sees one keeps it, or none does. What the
thread cannot keep up with is dropped and counted; so is what the disk does not take.
"""

from __future__ import annotations

import queue
import secrets
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path

import structlog

from prerank.errors import ConfigError
from prerank.serve.served import Served
from prerank.stores.request_files import PATTERN, write_requests
from prerank.stores.requests import LoggedRequest, num_bytes

_log = structlog.get_logger(__name__)

OUTCOMES = ("written", "dropped", "failed")
"""What becomes of a request that is to be logged: it is in a file, there was no room, or it could not be written."""
_END_S = 30.0
_LEFT_BEHIND_S = 3600.0  # no file takes so long to write


@dataclass(frozen=True, slots=True)
class LogOptions:
    """Where to, and the `share` of requests, 0 to 1.

    A file is written when its rows take `file_bytes` of memory or its first is `file_s` seconds old. The oldest files
    go when all take more than `keep_bytes`, and each when it is `keep_days` old (None: never). `waiting` requests may
    wait for the thread.
    """

    folder: Path
    share: float = 0.01
    keep_bytes: int | None = None
    keep_days: float | None = None
    file_bytes: int = 32 << 20
    file_s: float = 60.0
    waiting: int = 256


class RequestLog:
    """An open log. Threads may share one; `close` writes what is waiting.

    Raises ConfigError at construction where the folder cannot be made or written to.
    """

    def __init__(self, options: LogOptions) -> None:
        self._options, self._below = options, int(options.share * (1 << 64))
        self._waiting: queue.Queue[tuple[Served, float] | None] = queue.Queue(options.waiting)
        self._counts: Counter[str] = Counter(dict.fromkeys(OUTCOMES, 0))
        self._lock = threading.Lock()
        self._rows: list[LoggedRequest] = []
        self._num_bytes, self._write_at = 0, 0.0
        self._is_failing = self._is_closed = False
        _check_folder(options.folder)
        self._thread = threading.Thread(target=self._work, name="request-log", daemon=True)
        self._thread.start()

    def wants(self, request_id: str) -> bool:
        """Whether a request of this id is logged, wherever it comes."""
        hashed = blake2b(request_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return int.from_bytes(hashed, "little") < self._below

    def put(self, served: Served, ms: float) -> None:
        """Log a request that took `ms`, or drop it where too many wait; returns at once."""
        try:
            if self._is_closed:
                raise queue.Full
            self._waiting.put_nowait((served, ms))
        except queue.Full:
            self._count("dropped")

    def counts(self) -> Mapping[str, int]:
        """How many requests came to what, by OUTCOMES."""
        with self._lock:
            return dict(self._counts)

    @property
    def num_waiting(self) -> int:
        """How many requests wait for the thread."""
        return self._waiting.qsize()

    def close(self) -> None:
        """Write what was put until now, and end."""
        if not self._is_closed:
            self._is_closed = True
            try:
                self._waiting.put(None, timeout=_END_S)
            except queue.Full:
                _log.error("the log of requests could not be ended", waiting=self.num_waiting)
                return
            self._thread.join(_END_S)

    def _work(self) -> None:
        while True:
            try:
                left_s = max(0.0, self._write_at - time.monotonic()) if self._rows else None
                entry = self._waiting.get(timeout=left_s)
            except queue.Empty:
                self._write()
                continue
            if entry is None:
                self._write()
                return
            self._take(*entry)
            del entry  # or its tensors would stay until the next one comes

    def _take(self, served: Served, ms: float) -> None:
        try:
            row = served.logged(ms)
        except Exception as error:
            self._failed(1, error)
            return
        if not self._rows:
            self._write_at = time.monotonic() + self._options.file_s
        self._rows.append(row)
        self._num_bytes += num_bytes(row)
        if self._num_bytes >= self._options.file_bytes or time.monotonic() >= self._write_at:
            self._write()

    def _write(self) -> None:
        rows, self._rows, self._num_bytes = self._rows, [], 0
        if not rows:
            return
        began = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")
        try:
            write_requests(self._options.folder, f"requests-{began}-{secrets.token_hex(4)}.parquet", rows)
        except Exception as error:
            self._failed(len(rows), error)
            return
        self._count("written", len(rows))
        self._is_failing = False
        try:
            _sweep(self._options)
        except OSError as error:  # another server of the folder may remove the same files
            _log.warning("old files of the log of requests stay", error=f"{type(error).__name__}: {error}")

    def _failed(self, num: int, error: Exception) -> None:
        """Say so once, until something is written again."""
        self._count("failed", num)
        if not self._is_failing:
            self._is_failing = True
            expected = isinstance(error, OSError)
            _log.error(
                "the log of requests cannot be written; requests are answered all the same",
                folder=str(self._options.folder),
                error=f"{type(error).__name__}: {error}",
                exc_info=None if expected else error,
            )

    def _count(self, outcome: str, num: int = 1) -> None:
        with self._lock:
            self._counts[outcome] += num


def _check_folder(folder: Path) -> None:
    """Make it, for its owner alone: what is in it is what users did."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        probe = folder / f".probe-{secrets.token_hex(4)}"
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"--log-requests {folder}: expected a folder that this process may write to: {error}"
        ) from None


def _sweep(options: LogOptions) -> None:
    """Remove the files that are too old, and the oldest while all take too much; the newest stays."""
    found = [(path, path.stat()) for path in sorted(options.folder.glob(PATTERN)) if path.exists()]
    left = sum(stat.st_size for _, stat in found)
    oldest = None if options.keep_days is None else time.time() - options.keep_days * 86_400
    for path, stat in found[:-1]:
        is_old = oldest is not None and stat.st_mtime < oldest
        is_more = options.keep_bytes is not None and left > options.keep_bytes
        if is_old or is_more:
            path.unlink(missing_ok=True)
            left -= stat.st_size
    for path in options.folder.glob(f".{PATTERN}-*"):  # of a process that was killed while it wrote
        if time.time() - path.stat().st_mtime > _LEFT_BEHIND_S:
            path.unlink(missing_ok=True)
