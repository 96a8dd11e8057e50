"""The engines of several devices, opened as one thing and closed as one."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from prerank.bundle.scorer import Scorer
from prerank.serve.device import DeviceEngine
from prerank.serve.device_counts import Snapshot, total
from prerank.serve.device_options import Options
from prerank.serve.device_version import DeviceVersion
from prerank.types import Features


class Engines:
    """`engines` of devices of different names, which it closes with itself. Threads may share one."""

    def __init__(self, engines: Sequence[DeviceEngine]) -> None:
        assert engines
        assert len({one.name for one in engines}) == len(engines)
        self.engines = tuple(engines)

    def load_each(self, scorer: Scorer, like: Features, options: Sequence[Options]) -> list[DeviceVersion]:
        """What each loads by its own options. Raises DeviceFull where one has no room; then none has it."""
        loaded = list[DeviceVersion]()
        try:
            for engine, own in zip(self.engines, options, strict=True):
                loaded.append(engine.load(scorer, like, own))
        except BaseException:
            for one in loaded:
                one.close()
            raise
        return loaded

    def snapshot(self) -> Snapshot:
        """Of all devices together; a request that went from one to the next is counted where it was answered."""
        return total(list(self.snapshots().values()))

    def snapshots(self) -> dict[str, Snapshot]:
        """Of each, by its name."""
        return {one.name: one.snapshot() for one in self.engines}

    def close(self) -> None:
        """Take nothing new, answer what waits, and end the threads."""
        for one in self.engines:
            one.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
