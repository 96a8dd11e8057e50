"""Tables of a device that change while graphs read them: who reads sees all of a change or nothing of it.

Readers and writers take turns, and a turn is only as long as it takes to put work into a stream: what a reader puts
there follows the last change, and a change follows what every reader has put there. On a CPU, where work is done as it
is put, the same turns keep them apart.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from prerank.serve.device_replica import Replica
from prerank.serve.device_retrieval import RetrievalReplica
from prerank.serve.device_streams import Device, Event, Stream


class Turns:
    """Readers at once or one writer; a writer that waits comes before readers that come later."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_reading, self._num_waiting, self._is_writing = 0, 0, False
        self._written: Event | None = None
        self._read: dict[int, Event] = {}

    @contextmanager
    def reading(self, reader: int, stream: Stream) -> Iterator[None]:
        """What is put into `stream` while this lasts is of one moment. `reader` is its own number, one at a time."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_writing and not self._num_waiting)
            self._num_reading += 1
            written = self._written
        try:
            if written is not None:
                stream.follow(written)
            yield
        finally:
            try:
                self._read[reader] = stream.mark()  # also of what failed: some of it may be in the stream
            finally:
                with self._changed:
                    self._num_reading -= 1
                    self._changed.notify_all()

    @contextmanager
    def writing(self, stream: Stream) -> Iterator[None]:
        """What is put into `stream` while this lasts, nobody reads in the middle. Writers use one and the same."""
        with self._changed:
            self._num_waiting += 1
            self._changed.wait_for(lambda: not self._is_writing and not self._num_reading)
            self._num_waiting -= 1
            self._is_writing = True
        try:
            for event in self._read.values():
                stream.follow(event)
            yield
            self._written = stream.mark()
        finally:
            with self._changed:
                self._is_writing = False
                self._changed.notify_all()


class Updates:
    """Changes of `replica`, and of the `retrieval` beside it if there is one, through a stream of their own."""

    def __init__(self, device: Device, replica: Replica, retrieval: RetrievalReplica | None = None) -> None:
        self.turns = Turns()
        self.replica, self.retrieval, self._stream = replica, retrieval, device.stream()
        self._one = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """Of the tables."""
        return self.replica.num_bytes + (0 if self.retrieval is None else self.retrieval.num_bytes)

    def put(self, rows: Tensor | None = None, slots: Tensor | None = None, taken: Tensor | None = None) -> None:
        """Let every request that begins after this know what the host's scorer has of these rows and slots, int64 [n].

        `taken` int64 [n] are the rows whose vectors and bitmaps are others. Nothing waits for the device.
        """
        with self._one, torch.inference_mode():
            # what was changed before its caller came here is read here, whoever comes first
            staged, retrieval = self.replica.staged(rows, slots), self.retrieval
            pieces, num_bitmaps = ([], 0) if retrieval is None or taken is None else retrieval.staged(taken)
            staged.add(pieces)
            self._stream.do(staged.send)
            with self.turns.writing(self._stream):
                self._stream.do(staged.write)
            if retrieval is not None:  # who asks by a new one from here on comes after it
                retrieval.num_bitmaps = max(num_bitmaps, retrieval.num_bitmaps)
