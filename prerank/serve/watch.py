"""The version that a store says is live, loaded beside the one that serves, and in its place when it is ready.

The pointer is read each second by a thread of its own, which also loads, warms and lets go; neither the event loop nor
a request ever waits for it. Versions share the native threads and the stores, and two are in memory while one loads;
more only where a request does not end, for the version that it uses is kept until it does.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path

import structlog

from prerank.bundle.registry import Registry
from prerank.errors import DeadlineExceeded, NotOnDevice, PrerankError, RegistryError, RequestError
from prerank.kernels.engine import Engine
from prerank.serve.device_bundle import OnDevice
from prerank.serve.funnel import Funnel, engine_of
from prerank.serve.hosts import IndexHosts
from prerank.serve.live_version import Held, LiveVersion
from prerank.serve.threads import settle
from prerank.types import Request

_log = structlog.get_logger(__name__)

POLL_S = 1.0
"""Seconds between two looks at the pointer."""
AGAIN_S = 60.0
"""Seconds until a version that could not be loaded is tried again; at once where the pointer moved meanwhile."""
LEAVE_S = 5.0
"""Seconds that are waited for the last request of a version that was left, before others are looked for again."""


class VersionWatch:
    """The live version of a store in `live`, and what keeps it so from `start` to `close`.

    `settled` is called when another version was loaded, before it serves; `leave_s` is as LEAVE_S.
    """

    def __init__(
        self,
        store: Path,
        live: LiveVersion,
        engine: Engine | None,
        tail: str | None = None,
        settled: Callable[[], None] = lambda: None,
        poll_s: float = POLL_S,
        leave_s: float = LEAVE_S,
        users: str | None = None,
        hosts: IndexHosts | None = None,
        device: OnDevice | None = None,
    ) -> None:
        self.live = live
        self._store, self._registry, self._engine = store, Registry(store), engine
        self._tail, self._users, self._hosts, self._device = tail, users, hosts, device
        self._settled, self._poll_s, self._leave_s = settled, poll_s, leave_s
        self._leaving: list[Held] = []
        self._gave_up: tuple[str, float] | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="live-version", daemon=True)

    @classmethod
    def open(
        cls,
        store: Path,
        version: str | None = None,
        workers: int | None = None,
        tail: str | None = None,
        settled: Callable[[], None] = lambda: None,
        poll_s: float = POLL_S,
        leave_s: float = LEAVE_S,
        users: str | None = None,
        hosts: IndexHosts | None = None,
        device: OnDevice | None = None,
    ) -> VersionWatch:
        """`version` of `store`, the live one unless named; from `workers` to `device` all is as `Funnel.open` has it.

        One that cannot be loaded is `live.error`. Raises RegistryError where none is live and none is named, and
        NotOnDevice where a device is asked for what it cannot do with this one.
        """
        chosen = version or Registry(store).live()
        if chosen is None:
            raise RegistryError(f"{store}: no version is live; promote one, or name one with --version")
        engine = engine_of(workers)
        try:
            first = _opened(store, chosen, engine, tail, users, hosts, device)
            try:
                first.sweep()
            except BaseException:
                first.close()
                raise
            live = LiveVersion(first)
        except NotOnDevice:
            if engine is not None:
                engine.close()
            raise
        except PrerankError as error:
            live = LiveVersion(error)
        watch = cls(store, live, engine, tail, settled, poll_s, leave_s, users, hosts, device)
        if live.error is not None:
            watch._gave_up = chosen, time.monotonic() + AGAIN_S
        return watch

    def start(self) -> None:
        """Look at the pointer from here on."""
        self._thread.start()

    def look(self) -> bool:
        """Load and switch to the live version if it is another than serves, and let the old one go; whether it did.

        A version that cannot be loaded, or does not reproduce its golden answers, is logged and counted, and the old
        one serves on. One that was left and whose last request has ended since is let go.
        """
        self._let_go()
        try:
            wanted = self._registry.live()
        except (RegistryError, OSError, UnicodeDecodeError) as error:
            return self._failed("", error)
        serving = None if self.live.error is not None else self.live.version
        if wanted is None or wanted == serving:
            self._gave_up = None
            return False
        if self._gave_up is not None and self._gave_up[0] == wanted and time.monotonic() < self._gave_up[1]:
            return False
        return self._switch(wanted, serving)

    def close(self) -> None:
        """Look no more, and close what served; for when no request runs any more."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)
            if self._thread.is_alive():
                return  # it loads; what it uses goes with the process
        self._let_go()
        left = self.live.end()
        if left is not None:
            _close(left)
        if self._engine is not None and not self._leaving:  # else a request uses it, and it goes with the process
            self._engine.close()

    def _watch(self) -> None:
        settle()
        while not self._closing.wait(self._poll_s):
            try:
                self.look()
            except Exception:
                _log.exception("the live version could not be looked at")

    def _switch(self, wanted: str, serving: str | None) -> bool:
        start = time.perf_counter()
        self.live.note_changes()
        try:
            following = _opened(self._store, wanted, self._engine, self._tail, self._users, self._hosts, self._device)
        except Exception as error:
            return self._failed(wanted, error)
        try:
            if serving is not None:
                with self.live.taken() as old:
                    _warm(following, old.recent if isinstance(old, Funnel) else ())
            following.catch_up(self.live.noted())  # most of it while items may change; the rest is a moment's work
            if self._closing.is_set():
                following.close()
                return False
            self._settled()
            left = self.live.switch(following, following.catch_up)
        except Exception as error:
            following.close()
            return self._failed(wanted, error)
        seconds = time.perf_counter() - start
        loads = self.live.loads
        self.live.loads = replace(loads, switched=loads.switched + 1, last_s=seconds)
        self._gave_up = None
        _log.info("another version serves", version=wanted, before=serving, load_s=round(seconds, 3))
        if left is not None:
            self._leaving.append(left)
            if not left.ended.wait(self._leave_s):
                _log.warning("a version is kept, for a request that uses it does not end", version=serving)
        self._let_go(has_switched=True)
        return True

    def _let_go(self, has_switched: bool = False) -> None:
        """Close what was left and nobody uses; where nothing is left then, sweep what only that needed."""
        ended = [one for one in self._leaving if one.ended.is_set()]
        for one in ended:
            self._leaving.remove(one)
            version = one.funnel.version
            _close(one)
            _log.info("a version was let go", version=version)
        if ended:
            _give_back()
        self.live.loads = replace(self.live.loads, kept=len(self._leaving))
        if (ended or has_switched) and not self._leaving and self.live.error is None:
            # only now, for the version before may have read an older log, and would have missed them
            with self.live.taken() as serving:
                if isinstance(serving, Funnel):
                    serving.sweep()

    def _failed(self, version: str, error: Exception) -> bool:
        self.live.note_no_changes()
        is_new = self._gave_up is None or self._gave_up[0] != version
        self._gave_up = version, time.monotonic() + AGAIN_S
        if version or is_new:
            loads = self.live.loads
            self.live.loads = replace(loads, failed=loads.failed + 1)
            expected = isinstance(error, PrerankError | OSError)
            _log.error(
                "a version that is live cannot be served; the one before serves on",
                version=version,
                error=f"{type(error).__name__}: {error}",
                exc_info=None if expected else error,
            )
        return False


def _opened(
    store: Path,
    version: str,
    engine: Engine | None,
    tail: str | None,
    users: str | None,
    hosts: IndexHosts | None,
    device: OnDevice | None,
) -> Funnel:
    return Funnel.open(store, version, 0 if engine is None else None, tail, engine, users, hosts, device)


def _warm(funnel: Funnel, requests: Iterable[Request]) -> None:
    """Answer these for nobody, so that nobody waits for pages that a first request reads."""
    for one in tuple(requests):
        try:
            funnel.recommend(replace(one, deadline_ms=None))
        except (RequestError, DeadlineExceeded):
            continue  # of fields that the version before had; a stage that is cold, and has a deadline of its own


def _give_back() -> None:
    """Let the system have what was freed: glibc keeps it in pieces, and a server grows with every version it had."""
    trim = getattr(_c_library(), "malloc_trim", None)
    if trim is not None:
        trim(0)


@cache
def _c_library() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform == "linux" else None


def _close(left: Held) -> None:
    if isinstance(left.funnel, Funnel):
        left.funnel.close()
