"""Columns of more rows than memory holds, collected in files and put in order."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import IO

import numpy as np

from prerank.types import Array, Report

_CHUNK = 1 << 20


class Spool:
    """Columns appended batch by batch to files, then written once more in the order of the columns `by`."""

    def __init__(self, folder: Path, by: tuple[str, str] = ("user", "time_ms")) -> None:
        self.folder, self._by = folder, by
        self.num_rows = 0
        self._files: dict[str, IO[bytes]] = {}
        self._like: dict[str, Array] = {}

    def append(self, columns: Mapping[str, Array]) -> None:
        """More rows; the first ones say each column's type and shape."""
        for name, column in columns.items():
            if name not in self._files:
                self._files[name] = (self.folder / f"{name}.raw").open("wb")
                self._like[name] = column[:0]
            self._files[name].write(np.ascontiguousarray(column, dtype=self._like[name].dtype).data)
        self.num_rows += len(columns[self._by[0]])

    def write_sorted(self, what: str, report: Report) -> None:
        """One file a column, and nothing else. There must be rows. `what` is what `report` is told of."""
        assert self.num_rows, "nothing to order"
        for file in self._files.values():
            file.close()
        first, second = self._by
        order = np.lexsort((self._raw(second), self._raw(first)))
        for done, name in enumerate(self._files, start=1):
            raw = self._raw(name)
            path = self.folder / f"{name}.npy"
            out = np.lib.format.open_memmap(path, mode="w+", dtype=raw.dtype, shape=raw.shape)
            for start in range(0, self.num_rows, _CHUNK):
                out[start : start + _CHUNK] = raw[order[start : start + _CHUNK]]
            out.flush()
            (self.folder / f"{name}.raw").unlink()
            report(what, done, len(self._files), "columns")

    def _raw(self, name: str) -> Array:
        like = self._like[name]
        shape = (self.num_rows, *like.shape[1:])
        mapped: Array = np.memmap(self.folder / f"{name}.raw", dtype=like.dtype, mode="r", shape=shape)
        return mapped
