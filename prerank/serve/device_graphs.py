"""Captured graphs of one worker, by a key each; what cannot be one is done by torch, and counted."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch

from prerank.serve.device_counts import Counts
from prerank.serve.device_streams import Device, Graph

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Key:
    """What a graph computes, and by the ranker of which segment; None where there is one for all."""

    what: Hashable
    segment: int | None = None

    def __str__(self) -> str:
        return f"{self.what}" if self.segment is None else f"{self.what}, segment {self.segment}"


class Graphs:
    """Graphs that share one pool of `device`, so that one is replayed at a time; what fails is told to `counts`."""

    def __init__(self, device: Device, counts: Counts) -> None:
        self._device, self._counts, self._pool = device, counts, device.pool()
        self._graphs: dict[Key, Graph] = {}
        self._works: dict[Key, Callable[[], None]] = {}

    @property
    def num_bytes(self) -> int:
        """What they hold."""
        return self._pool.num_bytes

    def capture(self, key: Key, work: Callable[[], None]) -> None:
        """`work` under this key, which is what logs call it. The largest first: its memory is enough for the others."""
        self._works[key] = work
        # once before: what is compiled or grown when it is needed first is so then
        self._pool.stream.do(work)
        self._pool.stream.mark().wait()
        try:
            self._graphs[key] = self._pool.capture(work)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if self._device.is_lost(error):
                raise
            self._counts.add(eager_captures=1)
            _log.warning("%s cannot be captured, torch does its work: %s", key, error)

    def time_s(self, key: Key) -> float:
        """How long the work of a key takes, in seconds."""
        graph = self._graphs.get(key)
        start = time.perf_counter()
        self._pool.stream.do(self._works[key] if graph is None else graph.replay)
        self._pool.stream.mark().wait()
        return time.perf_counter() - start

    def run(self, key: Key) -> None:
        """The graph of a key in the stream that is current; its work by torch where there is none."""
        graph = self._graphs.get(key)
        if graph is not None:
            try:
                graph.replay()
                return
            except Exception as error:
                if self._device.is_lost(error):
                    raise
                del self._graphs[key]
                self._counts.add(eager_replays=1)
                _log.warning("a graph of %s cannot be replayed, torch does its work from here on: %s", key, error)
        self._counts.add(eager=1)
        self._works[key]()

    def close(self) -> None:
        """Let go of graphs and works, which may hold what holds them; nothing may be running."""
        self._graphs.clear()
        self._works.clear()
