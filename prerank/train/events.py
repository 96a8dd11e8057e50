"""Scalars of a training in TensorBoard's event files: `tensorboard --logdir` the folder of a store.

Written record by record and not through `SummaryWriter`: its `flush` does not wait for its own queue, and two of its
writers in one second share a file name, so a resumed training could lose or overwrite what was told before.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX import RecordWriter  # type: ignore[import-untyped]
from tensorboardX.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
from tensorboardX.proto.summary_pb2 import Summary  # type: ignore[import-untyped]


class EventFile:
    """One event file in `folder`; what earlier files there say of steps from `first_step` on is void."""

    def __init__(self, folder: Path, first_step: int) -> None:
        # TensorBoard reads the files of a folder in the order of their names
        name = f"events.out.tfevents.{time.time():.0f}.{time.time_ns()}.{socket.gethostname()}"
        self._records = RecordWriter(str(folder / name))
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """One point of each of `scalars`, by its tag."""
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._write(Event(step=step, summary=Summary(value=values)))

    def flush(self) -> None:
        """Have the disk hold every point told."""
        self._records.flush()

    def close(self) -> None:
        """Nothing more is told."""
        self._records.flush()
        self._records.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
