"""Several devices as one engine: each has all of a version, and a request goes where it will be done first.

What a device fails at is asked of the next one, and what none can do of the fallback. One that is lost is asked for
nothing but now and then a request, to see whether it is back.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from torch import Tensor

from prerank.bundle.judge import Ranked
from prerank.bundle.scorer import Scorer
from prerank.errors import DeviceBusy, DeviceFailed
from prerank.serve.device_asking import find, rank_each
from prerank.serve.device_many import Engines
from prerank.serve.device_options import Options
from prerank.serve.device_sought import Found, Sought, num_of
from prerank.serve.device_version import DeviceVersion
from prerank.serve.graph import Deadline
from prerank.types import CandidateSet, Features


class DeviceGroup(Engines):
    """`engines` of devices of different names, which it closes with itself. Threads may share one."""

    def load(self, scorer: Scorer, like: Features, options: Options) -> GroupVersion:
        """A version on each device; see `DeviceEngine.load`. Raises DeviceFull where one has no room; then none has it.

        All are told of changes, so they answer alike but for how they round.
        """
        loaded = self.load_each(scorer, like, [replace(options, fallback=None)] * len(self.engines))
        return GroupVersion(loaded, options)


@dataclass(slots=True, eq=False)
class _Inner:
    """What a request was last submitted as, until it ends: then nothing of it may keep a version in memory."""

    future: Future[Ranked] | None = None

    def left(self, outer: Future[Ranked]) -> None:
        """Called when the request has ended: where nobody waits for it any more, nothing of it is done."""
        inner, self.future = self.future, None
        if inner is not None and outer.cancelled():
            inner.cancel()


@dataclass(slots=True, eq=False)
class _Asked:
    """A request on its way, and whom it was `tried` with."""

    user_side: Features
    candidates: CandidateSet | Sought
    k: int
    deadline: Deadline | None
    tried: list[DeviceVersion] = field(default_factory=list)
    inner: _Inner = field(default_factory=_Inner)
    future: Future[Ranked] = field(default_factory=Future)


class GroupVersion:
    """A version on each of several devices, its `parts`. Threads may share one."""

    def __init__(self, parts: Sequence[DeviceVersion], options: Options) -> None:
        self.parts = tuple(parts)
        self.name = ",".join(one.name for one in parts)
        self._fallback, self._retry_s = options.fallback, options.retry_s
        self._looking = threading.Lock()
        self._look_at = dict.fromkeys(self.parts, 0.0)

    def submit(
        self, user_side: Features, candidates: CandidateSet | Sought, k: int, deadline: Deadline | None = None
    ) -> Future[Ranked]:
        """As `DeviceVersion.submit`; it is refused where the device that would be done first would be late."""
        asked = _Asked(user_side, candidates, k, deadline)
        asked.future.add_done_callback(asked.inner.left)
        ways = [*filter(self._is_to_be_looked_at, self.parts), *self._ways(asked)]
        if ways:
            self._submit(asked, ways[0])
        else:
            self._answer_without(asked, DeviceFailed(f"{self.name}: all are lost, and none is back yet"))
        return asked.future

    def rank(self, user_side: Features, candidates: CandidateSet, k: int) -> Ranked:
        """As `Scorer.rank`, of B requests that spread over the devices; see `device_asking.rank_each`."""
        return rank_each(self.submit, user_side, candidates, k)

    def find(self, user_side: Features, sought: Sought, k: int) -> Found:
        """One request whose candidates are sought; see `device_asking.find`."""
        return find(self, user_side, sought, k)

    def note_fallback(self) -> None:
        """None of the devices could answer a request; it is counted where the first of them counts."""
        self.parts[0].note_fallback()

    def put(self, rows: Tensor | None = None, slots: Tensor | None = None, taken: Tensor | None = None) -> None:
        """Let every request that begins after this, wherever it goes, know what the scorer has of them by now.

        Until this is done one device may know of it and another not.
        """
        for one in self.parts:
            one.put(rows, slots, taken)

    def close(self) -> None:
        """Take nothing new, wait for what runs, and leave the memory of the devices."""
        for one in self.parts:
            one.close()

    def _ways(self, asked: _Asked) -> list[DeviceVersion]:
        """Who is there and was not asked yet, by when they would be done."""
        num = num_of(asked.candidates)
        left = [one for one in self.parts if not one.is_lost and one not in asked.tried]
        return sorted(left, key=lambda one: one.wait_s + one.own_s(num))

    def _is_to_be_looked_at(self, version: DeviceVersion) -> bool:
        """Whether a lost one may be tried again: which is said to one request, and then for a while to nobody."""
        if not version.may_revive:
            return False
        with self._looking:
            now = time.monotonic()
            if now < self._look_at[version]:
                return False
            self._look_at[version] = now + self._retry_s
            return True

    def _submit(self, asked: _Asked, way: DeviceVersion) -> None:
        asked.tried.append(way)
        inner = way.submit(asked.user_side, asked.candidates, asked.k, asked.deadline)
        asked.inner.future = inner
        if asked.future.cancelled():  # before there was anything to cancel
            asked.inner.left(asked.future)
        inner.add_done_callback(lambda done: self._ended(asked, done))

    def _ended(self, asked: _Asked, inner: Future[Ranked]) -> None:
        """On a thread of whoever answered: settle it, or go on to the next device."""
        if inner.cancelled():
            return
        error = inner.exception()
        try:
            if isinstance(error, DeviceFailed):
                self._go_on(asked, error)
            elif asked.future.set_running_or_notify_cancel():
                if error is None:
                    asked.future.set_result(inner.result())
                else:
                    asked.future.set_exception(error)
        except Exception as failed:  # a callback's error would be nobody's, and the request wait for ever
            asked.future.set_exception(failed)

    def _go_on(self, asked: _Asked, error: DeviceFailed) -> None:
        for way in self._ways(asked):
            try:
                self._submit(asked, way)
            except DeviceBusy as late:
                error = late
            except DeviceFailed:
                continue  # it has been closed since; what the first one failed with says more
            else:
                return
        self._answer_without(asked, error)

    def _answer_without(self, asked: _Asked, error: DeviceFailed) -> None:
        if not asked.future.set_running_or_notify_cancel():
            return
        try:
            if self._fallback is None or isinstance(asked.candidates, Sought):
                raise error
            ranked = self._fallback(asked.user_side, asked.candidates, asked.k)
        except Exception as failed:
            asked.future.set_exception(failed)
        else:
            (asked.tried or self.parts)[-1].note_fallback()
            asked.future.set_result(ranked)
