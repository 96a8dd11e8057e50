"""Index hosts as processes, started by the command a user starts them with."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path


class HostProcess:
    """`prerank index-host` of the funnel in `store`; at `port` when it listens, 0 before."""

    def __init__(self, store: Path, shard: int, of: int, port: int = 0, options: Sequence[str] = ()) -> None:
        command = [sys.executable, "-m", "prerank", "index-host", "--store", str(store.parent), "--funnel", store.name]
        command += ["--shard", str(shard), "--of", str(of), "--port", str(port), *options]
        self.shard, self.port, self.said = shard, 0, ""
        self._listens = threading.Event()
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self._reading = threading.Thread(target=self._read)
        self._reading.start()

    def listening(self) -> HostProcess:
        """Itself, once it listens."""
        assert self._listens.wait(120), self.said
        assert self.port, self.said
        return self

    def end(self, kill: bool = False) -> int:
        """By SIGTERM, or SIGKILL; its exit code."""
        if kill:
            self.process.kill()
        else:
            self.process.terminate()
        code = self.process.wait(60)
        self._reading.join(60)
        return code

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for line in lines:
                self.said += line
                if '"index host listens"' in line:
                    self.port = json.loads(line)["port"]
                    self._listens.set()
        self._listens.set()
